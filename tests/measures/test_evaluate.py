"""Labels of the judge, evaluation prompts, and scores with intervals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mu.concepts.probe import make_probe
from mu.measures.evaluate import evaluate, find_rows, judge_images, load_judge, measure
from mu.measures.statistics import score
from mu.models import encode_prompts
from mu.sampling import draw_images

GROUPS = {
    "forget": {"a cat": "concept:cat", "a photo of a cat": "concept:cat"},
    "related": {"a tiger": "concept:tiger"},
    "unrelated": {
        "a banana on a blue background": "concept:banana",
        "a drawing of a tiger, noto style": "style:noto",
    },
}


class Colors:
    """A predictable judge: the brightest channel is the concept, the brightness the style.

    Its labels are in no order.
    """

    config = SimpleNamespace(
        num_labels=5,
        id2label={
            3: "concept:blue",
            0: "style:dark",
            1: "concept:red",
            4: "style:light",
            2: "concept:green",
        },
    )

    def __call__(self, pixels):
        assert pixels.shape[1:] == (3, 64, 64)
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        red, green, blue = pixels.mean((2, 3)).unbind(1)
        bright = pixels.mean((1, 2, 3))
        return SimpleNamespace(logits=10 * torch.stack([-bright, red, green, blue, bright], 1))


def plain(*colors, size=16):
    return torch.tensor(colors).float()[:, :, None, None].expand(-1, -1, size, size)


def test_the_judge_returns_labels_of_a_kind():
    images = plain((0.9, 0.1, 0.1), (0.1, 0.2, 0.3), (0.8, 0.9, 0.7))
    concepts = ["concept:red", "concept:blue", "concept:green"]
    assert judge_images(Colors(), images) == concepts
    assert judge_images(Colors(), images, "style") == ["style:dark", "style:dark", "style:light"]
    assert judge_images(Colors(), images.repeat(60, 1, 1, 1)) == concepts * 60
    with pytest.raises(KeyError, match="'mood'.*concept, style"):
        judge_images(Colors(), images, "mood")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(judge, bad):
    images = plain((0.9, 0.1, 0.1), (0.1, 0.2, 0.3), size=64).clone()
    images[1, 0, 5, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite.*diverged"):
        judge_images(judge, images)


def test_a_saved_judge_gives_the_same_labels(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    loaded = load_judge(tmp_path)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = judge(images * 2 - 1).logits
    concepts, styles = ["cat", "tiger", "banana"], ["noto", "fluent"]
    expected = [f"concept:{concepts[i]}" for i in logits[:, :3].argmax(1)]
    assert judge_images(loaded, images) == expected
    expected = [f"style:{styles[i]}" for i in logits[:, 3:].argmax(1)]
    assert judge_images(loaded, images, "style") == expected
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_every_prompt_is_drawn_with_every_seed(pipe):
    probe = make_probe(pipe, GROUPS, seeds=(4, 7))
    items = [
        tuple(item[k] for k in ("group", "prompt", "expected", "seed")) for item in probe.items
    ]
    assert items == [
        (group, prompt, expected, seed)
        for group, prompts in GROUPS.items()
        for prompt, expected in prompts.items()
        for seed in (4, 7)
    ]
    prompts = [item["prompt"] for item in probe.items]
    for conditioning, texts, atol in (
        (probe.conditioning, prompts, 1e-5),
        (probe.unconditional, [""], 1e-6),
    ):
        found = conditioning["encoder_hidden_states"]
        expected = encode_prompts(pipe, texts)["encoder_hidden_states"]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    json.dumps(probe.items)


def test_evaluation_draws_and_scores(pipe, monkeypatch):
    groups = {
        "forget": {"a cat": "concept:red"},
        "other": {"a cup": "concept:green", "a tiger": "style:dark"},
    }
    probe = make_probe(pipe, groups, seeds=(4, 7))
    rows, images = evaluate(pipe, Colors(), probe, guidance=3.0, steps=2)
    expected = draw_images(pipe, probe.conditioning, probe.unconditional, [4, 7] * 3, 3.0, 2)
    assert torch.equal(images, expected)
    by_color, by_style = judge_images(Colors(), images), judge_images(Colors(), images, "style")
    assert [row["seen"] for row in rows] == by_color[:4] + by_style[4:]

    shown = plain((1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (1, 1, 0.9))
    monkeypatch.setattr("mu.measures.evaluate.draw_images", lambda *_: shown)
    rows, _ = evaluate(pipe, Colors(), probe)
    assert [row["hit"] for row in rows] == [1, 0, 1, 0, 1, 0]
    assert [row["seen"] for row in rows] == [
        "concept:red",
        "concept:green",
        "concept:green",
        "concept:blue",
        "style:dark",
        "style:light",
    ]
    assert rows[0].keys() == probe.items[0].keys() | {"seen", "hit"}
    json.dumps(rows)


# --- scores


@pytest.mark.parametrize("rate, n", [(0.5, 24), (0.3, 60), (0.85, 80), (0.03, 24), (0.98, 40)])
def test_wilsons_interval_has_its_nominal_coverage(rate, n):
    rng = np.random.default_rng(0)
    found = [score(rng.random(n) < rate, seed=i) for i in range(300)]
    covered = np.mean([low <= rate <= high for _, low, high in found])
    assert 0.90 <= covered <= 0.985
    assert all(low <= mean <= high for mean, low, high in found)


def test_the_level_widens_the_interval():
    hits = np.arange(40) % 3 == 0
    found = [score(hits, level) for level in (0.5, 0.8, 0.95)]
    widths = [high - low for _, low, high in found]
    assert widths[0] < widths[1] < widths[2]
    assert score(hits) == score(hits)
    normal = 2 * 1.96 * (hits.mean() * (1 - hits.mean()) / 40) ** 0.5
    assert widths[2] == pytest.approx(normal, rel=0.1)


def test_no_hit_in_sixteen_is_not_certainty():
    """Wilson at k = 0: high = z² / (n + z²)."""
    edge = 1.95996**2 / (16 + 1.95996**2)
    assert score([0] * 16) == pytest.approx((0, 0, edge), abs=1e-4)
    assert score([1] * 16)[1] == pytest.approx(1 - score([0] * 16)[2])


def test_means_of_seeds_are_bootstrapped():
    means = [0.2, 0.4, 0.45, 0.6]
    mean, low, high = score(means, means=True)
    assert min(means) <= low < mean < high <= max(means)
    assert score([0.25, 0.5, 0.75], means=True)[0] == 0.5
    assert score([0.4], means=True) == (0.4, 0.4, 0.4)


def test_scores_of_nothing_nan_and_fractions_are_refused():
    for bad in ([], [1, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="at least one finite value"):
            score(bad)
    with pytest.raises(ValueError, match="means=True"):
        score([0, 0.5])


def test_rows_are_found_only_for_the_same_facts(pipe, judge, tmp_path):
    probe = make_probe(pipe, {"forget": {"a cat": "concept:cat"}}, seeds=(0,))
    facts = {"model": "tiny"}
    assert find_rows(tmp_path, probe, 2.0, 2, facts)[0] is None
    rows = measure(tmp_path, pipe, judge, probe, 2.0, 2, facts)
    assert find_rows(tmp_path, probe, 2.0, 2, facts)[0] == rows
    others = make_probe(pipe, {"forget": {"a cat": "concept:cat"}}, seeds=(0, 1))
    for changed in (
        (probe, 3.0, 2, facts),
        (probe, 2.0, 3, facts),
        (probe, 2.0, 2, {"model": "other"}),
        (others, 2.0, 2, facts),
    ):
        assert find_rows(tmp_path, *changed)[0] is None
