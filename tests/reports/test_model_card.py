"""Model cards: every number comes from the arguments."""

import pytest
import yaml

from mu.reports.model_card import model_card

METRICS = {
    "rows": [
        {"group": g, "prompt": "p", "seed": s, "hit": int(s < k)}
        for g, k, n in (("forget", 1, 8), ("related", 6, 7))
        for s in range(n)
    ],
    "protocol": {"judge": "j", "sampling_steps": 23, "run": {"steps": 1}},
}


@pytest.mark.parametrize("kind", ["pipeline", "difference", "lora"])
def test_a_card_tells_what_was_done_and_measured(kind):
    facts = dict(
        base_model="owner/base",
        license="creativeml-openrail-m",
        method="meta-unlearning",
        concept='a cat: "tabby"',
    )
    text = model_card(
        kind,
        params={"steps": 777, "inner_lr": [1e-5, 2e-4], "sets": "a|b"},
        metrics=METRICS,
        **facts,
    )
    head = yaml.safe_load(text.split("---\n")[1])
    assert (
        head["license"] == "creativeml-openrail-m"
        and head["base_model"] == "owner/base"
        and head["library_name"] == "diffusers"
    )
    assert head["pipeline_tag"] == "text-to-image" and {"unlearning", "meta-unlearning"} <= set(
        head["tags"]
    )
    assert (
        ("lora" in head["tags"]) == (kind == "lora") == (head["base_model_relation"] == "adapter")
    )
    for line in (
        "| steps | 777 |",
        "| inner_lr | [1e-05, 0.0002] |",
        '| sets | "a\\|b" |',
        "| forget | 12.5 % | 2.2 % to 47.1 % | 8 |",
        "| related | 85.7 % |",
        '"sampling_steps": 23',
    ):
        assert line in text
    assert (
        'a cat: "tabby"' in text
        and "An attacker" in text.replace("an attacker", "An attacker")
        and '"run"' not in text
    )
    assert ("has the base model, concept and all" in text) == (kind != "pipeline")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len(code.splitlines()) in (2, 3, 4) and ("owner/base" in code) == (kind != "pipeline")
    text = model_card(kind, params={}, **facts)
    assert "Nothing: this card makes no claim" in text and "%" not in text
    text = model_card(
        kind, params={}, kept=0.625, left_out=[f"norm{i}.bias" for i in range(5)], **facts
    )
    assert (
        "keeps 62.5 % of their squared difference" in text
        and "are 5 tensors" in text
        and ": norm0.bias, norm1.bias, norm2.bias, ..." in text
    )
    with pytest.raises(KeyError):
        model_card("gguf", params={}, **facts)


def test_scores_of_different_steps_are_not_mixed():
    rows = [
        {"group": "forget", "step": step, "hit": int(step > 0)}
        for step in (0, 50)
        for _ in range(4)
    ]
    text = model_card("lora", "b", "mit", "esd", "cat", {}, {"rows": rows, "protocol": {}})
    assert "| forget, step 0 | 0.0 % |" in text and "| forget, step 50 | 100.0 % |" in text
