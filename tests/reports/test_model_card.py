"""Model cards: every number comes from the arguments."""

import pytest
import yaml

from mu.reports.model_card import model_card

FACTS = {
    "base_model": "owner/base",
    "license": "creativeml-openrail-m",
    "method": "meta-unlearning",
    "concept": 'a cat: "tabby"',
}
METRICS = {
    "rows": [
        {"group": group, "prompt": "p", "seed": seed, "hit": int(seed < hits)}
        for group, hits, images in (("forget", 1, 8), ("related", 6, 7))
        for seed in range(images)
    ],
    "protocol": {"judge": "j", "sampling_steps": 23, "run": {"steps": 1}},
}
each_kind = pytest.mark.parametrize("kind", ["pipeline", "difference", "lora"])


@each_kind
def test_the_header_names_base_model_license_and_kind(kind):
    text = model_card(kind, params={}, **FACTS)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "creativeml-openrail-m"
    assert header["base_model"] == "owner/base"
    assert header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image"
    assert {"unlearning", "meta-unlearning"} <= set(header["tags"])
    assert ("lora" in header["tags"]) == (kind == "lora")
    assert (header["base_model_relation"] == "adapter") == (kind == "lora")


@each_kind
def test_the_card_reports_parameters_scores_and_limits(kind):
    params = {"steps": 777, "inner_lr": [1e-5, 2e-4], "sets": "a|b"}
    text = model_card(kind, params=params, metrics=METRICS, **FACTS)
    for line in (
        "| steps | 777 |",
        "| inner_lr | [1e-05, 0.0002] |",
        '| sets | "a\\|b" |',
        "| forget | 12.5 % | 2.2 % to 47.1 % | 8 |",
        "| related | 85.7 % |",
        '"sampling_steps": 23',
        'a cat: "tabby"',
        "An attacker",
    ):
        assert line in text
    assert '"run"' not in text
    assert ("the base model still has the concept" in text) == (kind != "pipeline")


@each_kind
def test_the_code_compiles_and_names_the_base_model(kind):
    text = model_card(kind, params={}, **FACTS)
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len(code.splitlines()) in (2, 3, 4)
    assert ("owner/base" in code) == (kind != "pipeline")


@each_kind
def test_a_card_without_evaluation_makes_no_claim(kind):
    text = model_card(kind, params={}, **FACTS)
    assert "None: this card makes no claim" in text
    assert "%" not in text


@each_kind
def test_an_extracted_lora_reports_what_it_keeps(kind):
    left_out = [f"norm{i}.bias" for i in range(5)]
    text = model_card(kind, params={}, extracted=(0.625, left_out), **FACTS)
    assert "keeps 62.5 % of their squared difference" in text
    assert "are 5 tensors" in text
    assert ": norm0.bias, norm1.bias, norm2.bias, ..." in text


def test_an_unknown_kind_is_refused():
    with pytest.raises(KeyError):
        model_card("gguf", params={}, **FACTS)


def test_scores_of_different_steps_are_not_mixed():
    rows = [
        {"group": "forget", "step": step, "hit": int(step > 0)}
        for step in (0, 50)
        for _ in range(4)
    ]
    text = model_card("lora", "b", "mit", "esd", "cat", {}, {"rows": rows, "protocol": {}})
    assert "| forget, step 0 | 0.0 % |" in text
    assert "| forget, step 50 | 100.0 % |" in text
