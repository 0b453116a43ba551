"""Judging, scoring, and the attack that is looked at on the way."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import mu.attack
from mu.attack import attack_run
from mu.evaluate import evaluate, judge_images, load_judge, make_probe, score
from mu.models import draw_images, encode_prompts

GROUPS = {"forget": {"a cat": "concept:cat", "a photo of a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"},
          "unrelated": {"a banana on a blue background": "concept:banana", "a drawing of a tiger, noto style": "style:noto"}}


class Colors:
    """A judge that can be foretold: concepts by the brightest channel, styles by whether the image is bright. Labels are in no order."""
    config = SimpleNamespace(num_labels=5, id2label={3: "concept:blue", 0: "style:dark", 1: "concept:red", 4: "style:light", 2: "concept:green"})

    def __call__(self, pixels):
        assert pixels.shape[1:] == (3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1
        red, green, blue = pixels.mean((2, 3)).unbind(1)
        bright = pixels.mean((1, 2, 3))
        return SimpleNamespace(logits=10 * torch.stack([-bright, red, green, blue, bright], 1))


def plain(*colors, size=16):
    return torch.tensor(colors).float()[:, :, None, None].expand(-1, -1, size, size)


def test_the_judge_names_what_it_sees():
    images = plain((0.9, 0.1, 0.1), (0.1, 0.2, 0.3), (0.8, 0.9, 0.7))
    assert judge_images(Colors(), images) == ["concept:red", "concept:blue", "concept:green"]
    assert judge_images(Colors(), images, "style") == ["style:dark", "style:dark", "style:light"]
    assert judge_images(Colors(), images.repeat(60, 1, 1, 1)) == ["concept:red", "concept:blue", "concept:green"] * 60
    with pytest.raises(KeyError, match="'mood'.*concept, style"):
        judge_images(Colors(), images, "mood")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(judge, bad):
    images = plain((0.9, 0.1, 0.1), (0.1, 0.2, 0.3), size=64).clone()
    images[1, 0, 5, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite.*diverged"):
        judge_images(judge, images)


def test_a_real_judge_is_read_as_it_was_saved(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    loaded = load_judge(tmp_path)
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = judge(images * 2 - 1).logits
    assert judge_images(loaded, images) == [f"concept:{['cat', 'tiger', 'banana'][i]}" for i in logits[:, :3].argmax(1)]
    assert judge_images(loaded, images, "style") == [f"style:{['noto', 'fluent'][i]}" for i in logits[:, 3:].argmax(1)]
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_probe_is_every_prompt_with_every_seed(pipe):
    probe = make_probe(pipe, GROUPS, seeds=(4, 7))
    assert [(i["group"], i["prompt"], i["expected"], i["seed"]) for i in probe.items] == [
        (group, prompt, expected, seed) for group, prompts in GROUPS.items() for prompt, expected in prompts.items() for seed in (4, 7)]
    expected = encode_prompts(pipe, [item["prompt"] for item in probe.items])["encoder_hidden_states"]
    torch.testing.assert_close(probe.conditioning["encoder_hidden_states"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(probe.unconditional["encoder_hidden_states"], encode_prompts(pipe, [""])["encoder_hidden_states"], rtol=0, atol=1e-6)
    json.dumps(probe.items)


def test_evaluation_draws_and_hits(pipe, monkeypatch):
    probe = make_probe(pipe, {"forget": {"a cat": "concept:red"}, "other": {"a cup": "concept:green", "a tiger": "style:dark"}}, seeds=(4, 7))
    rows, images = evaluate(pipe, Colors(), probe, guidance=3.0, steps=2)
    expected = draw_images(pipe, probe.conditioning, probe.unconditional, [4, 7] * 3, 3.0, 2)
    assert torch.equal(images, expected)
    by_color, by_style = judge_images(Colors(), images), judge_images(Colors(), images, "style")
    assert [row["seen"] for row in rows] == by_color[:4] + by_style[4:]

    shown = plain((1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (1, 1, 0.9))
    monkeypatch.setattr("mu.evaluate.draw_images", lambda *_: shown)
    rows, _ = evaluate(pipe, Colors(), probe)
    assert [row["hit"] for row in rows] == [1, 0, 1, 0, 1, 0]
    assert [row["seen"] for row in rows] == ["concept:red", "concept:green", "concept:green", "concept:blue", "style:dark", "style:light"]
    assert rows[0].keys() == probe.items[0].keys() | {"seen", "hit"}
    json.dumps(rows)


# --- scores --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate, n", [(0.5, 24), (0.3, 60), (0.85, 80), (0.03, 24), (0.98, 40)])
def test_the_interval_covers_the_truth_as_often_as_it_says(rate, n):
    rng = np.random.default_rng(0)
    found = [score(rng.random(n) < rate, seed=i) for i in range(300)]
    covered = np.mean([low <= rate <= high for _, low, high in found])
    assert 0.90 <= covered <= 0.985
    assert all(low <= mean <= high for mean, low, high in found)


def test_the_level_moves_the_interval():
    hits = np.arange(40) % 3 == 0
    widths = [high - low for _, low, high in (score(hits, level) for level in (0.5, 0.8, 0.95))]
    assert widths[0] < widths[1] < widths[2] and score(hits) == score(hits)
    assert widths[2] == pytest.approx(2 * 1.96 * (hits.mean() * (1 - hits.mean()) / 40) ** 0.5, rel=0.1)


def test_no_hit_in_sixteen_is_not_certainty():
    """Wilson at k = 0: high = z² / (n + z²)."""
    assert score([0] * 16) == pytest.approx((0, 0, 1.95996**2 / (16 + 1.95996**2)), abs=1e-4)
    assert score([1] * 16)[1] == pytest.approx(1 - score([0] * 16)[2])


def test_means_of_seeds_are_bootstrapped():
    means = [0.2, 0.4, 0.45, 0.6]
    mean, low, high = score(means, means=True)
    assert min(means) <= low < mean < high <= max(means)


def test_scores_of_means_of_nothing_and_of_nan():
    assert score([0.25, 0.5, 0.75], means=True)[0] == 0.5 and score([0.4], means=True) == (0.4, 0.4, 0.4)
    for bad in ([], [1, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="at least one finite value"):
            score(bad)
    with pytest.raises(ValueError, match="means=True"):
        score([0, 0.5])


# --- the attack ----------------------------------------------------------------------------------------------------

@pytest.fixture
def attacked(pipe, judge, sets):
    probe = make_probe(pipe, {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}}, seeds=(0, 1))
    options = dict(at=(0, 2, 3), lr=1e-2, seed=5, guidance=2.0, sampling_steps=2)
    return lambda folder, **other: attack_run(folder, pipe, judge, probe, sets[0], **options | other)


def test_an_attack_is_plain_fine_tuning_and_gives_the_weights_back(pipe, judge, sets, attacked, tmp_path, monkeypatch):
    before, seen = tiny.weights(pipe.unet), []
    real = mu.attack.evaluate
    monkeypatch.setattr(mu.attack, "evaluate", lambda pipe, *a: seen.append(tiny.weights(pipe.unet)) or real(pipe, *a))
    rows = attacked(tmp_path / "run")
    assert torch.equal(tiny.weights(pipe.unet), before) and torch.equal(seen[0], before)
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4 and {"group", "hit", "seen", "seed"} <= rows[0].keys()

    from mu.train import State, finetune
    unet = tiny.frozen(pipe.unet)
    state = State(unet, "f", lr=1e-2, optimizer="adam", seed=5)
    for record in finetune(state, pipe.scheduler, sets[0], steps=3):
        if record.step in (2, 3):
            assert torch.equal(tiny.weights(unet), seen[record.step - 1])
    assert not torch.equal(seen[1], seen[2]) and len(seen) == 3
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["records.json"] + [f"step-000{i}.{end}" for i in (0, 2, 3) for end in ("json", "png")]

    monkeypatch.setattr(mu.attack, "finetune", lambda *_, **__: pytest.fail("a finished attack was run again"))
    assert attacked(tmp_path / "run") == rows


def test_what_was_judged_at_the_start_is_not_drawn_again(attacked, tmp_path, monkeypatch):
    whole = attacked(tmp_path / "whole")
    real, calls = mu.attack.evaluate, []
    monkeypatch.setattr(mu.attack, "evaluate", lambda *a: calls.append(1) or real(*a))
    known = [{key: value for key, value in row.items() if key != "step"} for row in whole if row["step"] == 0]
    assert attacked(tmp_path / "again", before=(known, tmp_path / "whole" / "step-0000.png")) == whole and len(calls) == 2
    for step in (0, 2, 3):
        assert (tmp_path / "again" / f"step-000{step}.png").read_bytes() == (tmp_path / "whole" / f"step-000{step}.png").read_bytes()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_killed_attack_goes_on_with_the_same_numbers(pipe, attacked, tmp_path, monkeypatch, stop):
    """Killed at the first, second or third evaluation, or before it."""
    expected, before = attacked(tmp_path / "whole"), tiny.weights(pipe.unet)
    real, calls = mu.attack.evaluate, []

    def evaluate(*a):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(mu.attack, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        attacked(tmp_path / "killed")
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert attacked(tmp_path / "killed") == expected and len(calls) == 4  # every evaluation once, the interrupted one twice
    for step in (0, 2, 3):
        name = f"step-000{step}.png"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(tiny.weights(pipe.unet), before)


def test_a_model_that_diverges_under_attack_is_said_so(pipe, attacked, tmp_path):
    before = tiny.weights(pipe.unet)
    with pytest.raises((FloatingPointError, ValueError), match="not finite|diverged"):
        attacked(tmp_path / "run", lr=1e25, optimizer="sgd")
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert (tmp_path / "run" / "step-0000.json").exists() and not (tmp_path / "run" / "step-0003.json").exists()
