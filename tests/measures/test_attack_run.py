"""Runs of attacks by training: evaluation at chosen steps, resuming, budget, restored weights."""

from functools import partial

import pytest
import tiny
import torch

import mu.concepts.sets
import mu.measures.evaluate
import mu.measures.under_attack
from mu.attacks.finetune import AttackConfig, dreambooth, fine_tuning, inversion
from mu.concepts.probe import make_probe
from mu.concepts.sets import encode_images
from mu.files import read_json
from mu.measures.under_attack import Schedule, attack_run
from mu.sampling import Sampling
from mu.state import State
from mu.train import finetune

GROUPS = {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}}
SAMPLING = Sampling(guidance=2.0, steps=2)


@pytest.fixture
def probe(pipe):
    return make_probe(pipe, GROUPS, seeds=(0,))


@pytest.fixture
def attacked(pipe, judge, sets):
    """Return a function that attacks on two seeds per prompt and returns the rows."""
    probe = make_probe(pipe, GROUPS, seeds=(0, 1))

    def attacked(folder, at=(0, 2, 3), before=None, **config):
        config = AttackConfig(**{"lr": 1e-2} | config)
        make_attack = partial(fine_tuning, pipe, sets[0], probe, config, seed=5)
        schedule = Schedule(at=at, sampling=SAMPLING)
        return attack_run(folder, pipe, judge, make_attack, schedule, before)

    return attacked


@pytest.fixture
def evaluations(monkeypatch):
    """List the calls of `evaluate`; the call of number `stop` is interrupted."""
    real, calls = mu.measures.evaluate.evaluate, Calls()

    def evaluate(pipe, *args):
        calls.append(tiny.weights(pipe.unet))
        if len(calls) == calls.stop:
            raise KeyboardInterrupt
        return real(pipe, *args)

    monkeypatch.setattr(mu.measures.evaluate, "evaluate", evaluate)
    return calls


class Calls(list):
    stop = None

    def restart(self, stop=None):
        self.clear()
        self.stop = stop


def images_of(folder, steps=(0, 2, 3)):
    return [(folder / f"step-{step:04d}.png").read_bytes() for step in steps]


def test_an_attack_is_plain_fine_tuning_and_restores_the_weights(
    pipe, sets, attacked, tmp_path, monkeypatch, evaluations
):
    before, folder = tiny.weights(pipe.unet), tmp_path / "run"
    rows = attacked(folder)
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert torch.equal(evaluations[0], before)
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4
    assert {"group", "hit", "seen", "seed"} <= rows[0].keys()

    unet = tiny.frozen(pipe.unet)
    state = State(unet, "f", lr=1e-2, optimizer="adam", seed=5)
    for record in finetune(state, pipe.scheduler, sets[0], steps=3):
        if record.step in (2, 3):
            assert torch.equal(tiny.weights(unet), evaluations[record.step - 1])
    assert not torch.equal(evaluations[1], evaluations[2])
    assert len(evaluations) == 3
    files = [f"step-000{step}.{end}" for step in (0, 2, 3) for end in ("json", "png")]
    assert sorted(f.name for f in folder.iterdir()) == ["budget.json", "records.json", *files]

    def fail(*_, **__):
        pytest.fail("a finished attack was repeated")

    monkeypatch.setattr(mu.measures.under_attack, "finetune", fail)
    assert attacked(folder) == rows


def test_an_earlier_evaluation_at_step_0_is_not_repeated(attacked, tmp_path, evaluations):
    whole = attacked(tmp_path / "whole")
    evaluations.restart()
    known = []
    for row in whole:
        if row["step"] == 0:
            known.append({key: value for key, value in row.items() if key != "step"})
    before = (known, tmp_path / "whole" / "step-0000.png")
    assert attacked(tmp_path / "again", before=before) == whole
    assert len(evaluations) == 2
    assert images_of(tmp_path / "again") == images_of(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_killed_attack_resumes_with_the_same_numbers(pipe, attacked, tmp_path, evaluations, stop):
    expected = attacked(tmp_path / "whole")
    before = tiny.weights(pipe.unet)
    evaluations.restart(stop)
    with pytest.raises(KeyboardInterrupt):
        attacked(tmp_path / "killed")
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert attacked(tmp_path / "killed") == expected
    assert len(evaluations) == 4  # each evaluation once, the interrupted one twice
    assert images_of(tmp_path / "killed") == images_of(tmp_path / "whole")
    assert torch.equal(tiny.weights(pipe.unet), before)


@pytest.mark.parametrize("killed", [True, False])
def test_a_new_earlier_step_equals_that_of_one_run(attacked, tmp_path, evaluations, killed):
    """After a kill at a later step and after the end: the same rows, images and passes."""
    expected = attacked(tmp_path / "whole", at=(0, 1, 2, 3))
    again = tmp_path / "again"
    if killed:
        evaluations.restart(stop=3)
        with pytest.raises(KeyboardInterrupt):
            attacked(again, at=(0, 2, 3))
    else:
        attacked(again, at=(0, 2, 3))
        (again / "budget.json").unlink()
    assert attacked(again, at=(0, 1, 2, 3)) == expected
    assert images_of(again, [1]) == images_of(tmp_path / "whole", [1])
    assert [b["passes"] for b in read_json(again / "budget.json")] == [0, 1, 2, 3]


def test_an_attack_that_diverges_raises_and_restores_the_weights(pipe, attacked, tmp_path):
    before = tiny.weights(pipe.unet)
    with pytest.raises(FloatingPointError, match=r"finetune is (nan|inf) in step \d"):
        attacked(tmp_path, lr=1e25, optimizer="sgd")
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert (tmp_path / "step-0000.json").exists()
    assert not (tmp_path / "step-0003.json").exists()


def test_the_budget_lists_what_was_spent_until_each_step(attacked, sets, tmp_path):
    attacked(tmp_path)
    budget = read_json(tmp_path / "budget.json")
    assert [b["step"] for b in budget] == [0, 2, 3]
    assert [b["images"] for b in budget] == [0, len(sets[0]), len(sets[0])]
    assert [b["passes"] for b in budget] == [0, 2, 3]
    assert 0 == budget[0]["seconds"] < budget[1]["seconds"] < budget[2]["seconds"]


def test_class_images_have_seeds_of_their_own_and_cost_passes(
    pipe, judge, sets, probe, tmp_path, monkeypatch
):
    seeds, passes, real = [], [], mu.concepts.sets.draw_images

    def draw(pipe, conditioning, unconditional, drawn, *args):
        seeds.extend(drawn)
        return real(pipe, conditioning, unconditional, drawn, *args)

    monkeypatch.setattr(mu.concepts.sets, "draw_images", draw)
    monkeypatch.setattr("mu.attacks.finetune.images_per_batch", lambda pipe: 2)
    monkeypatch.setattr(mu.concepts.sets, "images_per_batch", lambda pipe: 2)
    hook = pipe.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    config = AttackConfig("dreambooth", lr=1e-3, class_images=5)
    attack = partial(dreambooth, pipe, sets[0], probe, config, sampling=Sampling(2.0, 3))
    assert attack(seed=0).passes == len(passes) == 3 * 3
    assert len(seeds) == 5
    hook.remove()
    attack(seed=1)
    assert len(set(seeds)) == 10
    assert min(seeds) >= 1000, "the probe's seeds start at 0"
    attack_run(tmp_path, pipe, judge, attack, Schedule(at=(0, 1), sampling=SAMPLING))
    assert [b["passes"] for b in read_json(tmp_path / "budget.json")] == [0, 9 + 1]


def test_a_killed_inversion_resumes_with_the_same_numbers(
    pipe, judge, probe, tmp_path, evaluations
):
    images = encode_images(pipe, torch.rand(4, 3, 16, 16) * 2 - 1, ["a cat"] * 4)
    config = AttackConfig("textual-inversion", lr=0.1, word="cup", init_word="banana")

    def rewrite(text):
        return text.replace("cat", "cup")

    attack = partial(inversion, pipe, images, probe, config, rewrite)
    options = (pipe, judge, attack, Schedule(at=(0, 2, 4), sampling=SAMPLING))
    expected = attack_run(tmp_path / "whole", *options)
    evaluations.restart(stop=3)
    with pytest.raises(KeyboardInterrupt):
        attack_run(tmp_path / "killed", *options)
    assert attack_run(tmp_path / "killed", *options) == expected
    assert images_of(tmp_path / "killed", (0, 2, 4)) == images_of(tmp_path / "whole", (0, 2, 4))


def test_lora_leaves_no_adapters_behind(pipe, judge, probe, sets, tmp_path):
    before = tiny.weights(pipe.unet)
    config = AttackConfig(subset="lora", rank=64, lr=1e-2)
    attack = partial(fine_tuning, pipe, sets[0], probe, config)
    schedule = Schedule(at=(0, 2), sampling=SAMPLING)
    rows = attack_run(tmp_path, pipe, judge, attack, schedule)
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert not hasattr(pipe.unet, "peft_config")
    assert len(rows) == 4
