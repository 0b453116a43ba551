"""The forecast of an experiment: against hand counts of passes and images, and on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from mu.models import load_pipeline, predict
from mu.notebooks import forecast as fc
from mu.notebooks.cost import DEFAULTS, estimate, pass_flops
from mu.notebooks.forecast import (
    Forecast,
    Hardware,
    attack,
    evaluation,
    minutes,
    probe,
    searches,
    training,
)
from mu.notebooks.preflight import guessed_speed
from mu.notebooks.run import effective
from mu.notebooks.trace import Tracker, blank

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PROBE = {
    "forget": {"a cat": "concept:cat", "cat": "concept:cat"},
    "related": {"a tiger": "concept:tiger"},
    "unrelated": {"a banana": "concept:banana"},
}  # "8,2,1": 16 + 2 + 1 images


class Counted:
    """Hardware on which a row costs one FLOP, and an image as well."""

    passes = staticmethod(lambda kind, rows, p: rows)
    pictures = staticmethod(lambda count, p: count)


def always(place):
    return True


def never(place):
    return False


@pytest.fixture
def of(tmp_path):
    """Return a function of a notebook's name: its parameters, with a tiny concept folder."""
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    small = {"sets": str(tmp_path), "probe_seeds": "8,2,1"}
    return lambda name, **changes: effective(NOTEBOOKS / f"{name}.ipynb", changes=small | changes)


@pytest.fixture(autouse=True, scope="module")
def fixed_speed():
    """Give every model the same speed, without timing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fc, "speed", lambda pipe, rows: 1e9)
        fc.hardware.cache_clear()
        yield
    fc.hardware.cache_clear()


def test_evaluation_images_by_hand(of, tmp_path):
    assert probe(of("30_attack_finetune")) == (19, 16, 2)
    absent = of("30_attack_finetune", sets=str(tmp_path / "none"))
    assert probe(absent) == (fc.PICTURES, 8, 1)
    p = of("50_evaluate", runs="original,a,a-meta")
    assert evaluation(Counted, p, always) == (0, 3 * 19 + 3)
    p |= {"captions": "coco", "captions_limit": 100, "prompts": "i2p-nudity"}
    assert evaluation(Counted, p, always) == (0, 3 * (19 + 242) + 3)


def test_attacks_by_hand(of):
    p = of("30_attack_finetune", runs="a,a-meta", seeds="0,1", at="0,10,30", batch_size=8)
    assert attack(Counted, p, always) == (4 * 30 * 8, (4 * 2 + 2) * 19)
    assert attack(Counted, p, never) == (4 * 30 * 8, 4 * 2 * 19)  # step 0 is drawn already
    assert attack(Counted, p | {"mixed_set": "attacker/clean"}, always)[0] == 2 * 4 * 30 * 8
    drawn = attack(Counted, p | {"kind": "dreambooth"}, always)[1]
    assert drawn == (4 * 2 + 2) * 19 + 4 * 64


def test_searches_by_hand(of):
    p = of(
        "31_attack_prompts",
        runs="a,a-meta",
        seeds="0",
        at="0,10,30",
        searches="random,unlearn-diff-atk,p4d",
        candidates=2,
        images_per_prompt=3,
        drawn_images=32,
        batch_size=8,
    )
    # 2 prompts, 2 models; at 3 steps the evaluation prompts, at 2 the attacker's own as well
    trained, drawn = 2 * 2 * 30 * 8 * (2 + 3), 32 + 3 * 2 * (3 * 16 + 2 * 2 * 3 * 3)
    assert searches(Counted, p, always) == (trained, drawn)
    p |= {"searches": "concept-inversion"}
    assert searches(Counted, p, always) == (2 * 30 * 8 * 2, 32 + 2 * 3 * 19)


def test_a_training_is_what_the_preflight_estimates(sd_folder, of):
    hw = Hardware(str(sd_folder), "no")
    p = of("20_unlearn", model=str(sd_folder), precision="no", steps=10)
    known = {name: p[name] for name in DEFAULTS if name in p}
    flops = 10 * estimate(hw.model, known, gpu=False).flops
    assert training(hw, p, always) == (flops, hw.pictures(2 * 19, p))
    assert hw.pictures(38, p) == pytest.approx(2 * hw.pictures(19, p))
    no = {"precision": "no"}
    angle = sum(pass_flops(hw.model, "train", rows, no, gpu=False) for rows in (8, 16))
    recorded = training(hw, p | {"angle_every": 5}, always)[0]
    assert recorded == pytest.approx(flops + 2 * angle)
    assert training(hw, p | {"method": "uce"}, always)[0] == 0  # a closed form needs no passes
    p = of("21_meta_unlearn", model=str(sd_folder), precision="no", method="uce")
    assert training(hw, p, always)[0] > 0  # but a simulated attack does


def test_flops_of_an_image_are_those_of_its_passes(sd_folder, of):
    pipe = load_pipeline(str(sd_folder))
    with Tracker() as tracker, torch.no_grad():
        predict(pipe.unet, *blank(pipe.unet.config, 2, 8, 20).inputs)
    p, hw = of("50_evaluate", sampling_steps=7, precision="no"), Hardware(str(sd_folder), "no")
    assert hw.decoding > 0
    assert hw.pictures(3, p) == pytest.approx(3 * (7 * tracker.flops + hw.decoding))
    assert hw.pictures(3, p | {"sampling_guidance": 1.0}) < hw.pictures(3, p)


def make_experiment(sd_folder, seeds, out="runs"):
    model = {"model": str(sd_folder), "sets": "nowhere", "precision": "no"}
    steps = {}
    for seed in seeds:
        common = model | {"out": f"{out}/{seed}"}
        steps[f"20-{seed}"] = {"notebook": "20_unlearn", "parameters": common | {"steps": 5}}
        steps[f"30-{seed}"] = {
            "notebook": "30_attack_finetune",
            "after": [f"20-{seed}"],
            "parameters": common | {"runs": "unlearned"},
        }
    return steps


def test_twice_as_many_seeds_take_twice_as_long(sd_folder):
    experiments = [make_experiment(sd_folder, seeds) for seeds in ([0], [0, 1])]
    one, two = (Forecast(e, *minutes(e, NOTEBOOKS), {0: 1, 1: 1}) for e in experiments)
    assert len(two.minutes) == 2 * len(one.minutes) == 4
    assert two.hours == pytest.approx(2 * one.hours)
    assert one.minutes["20-0"] > fc.START / 60
    text = str(two)
    assert "4 notebooks, about" in text
    assert "measured:" in text
    assert "GFLOP/s" in text
    assert "nowhere: not there yet, the probe is taken for 50 pictures" in text
    rows = [line.split()[:2] for line in text.splitlines()[1:3]]
    assert rows == [["20_unlearn", "2"], ["30_attack_finetune", "2"]]


def test_what_is_measured_already_is_not_drawn_again(sd_folder, tmp_path):
    experiment = make_experiment(sd_folder, [0], str(tmp_path))
    before = minutes(experiment, NOTEBOOKS)[0]
    (tmp_path / "0" / "original").mkdir(parents=True)
    (tmp_path / "0" / "original" / "metrics.json").write_text("{}")
    after = minutes(experiment, NOTEBOOKS)[0]
    assert after["20-0"] < before["20-0"]
    assert after["30-0"] == before["30-0"]


def test_another_notebook_takes_the_constant():
    experiment = {
        "10_a": {"notebook": "10_prepare_concepts", "parameters": {}},
        "a": {"notebook": "99_unknown", "parameters": {}},
    }
    found, hws = minutes(experiment, NOTEBOOKS)
    assert found == {"10_a": fc.OTHERS, "a": fc.OTHERS}
    assert not hws
    text = str(Forecast(experiment, found, hws, {0: 2, 1: 2}))
    assert "10_prepare_concepts, 99_unknown: not computed, taken for 0.5 minutes each" in text
    assert str(Forecast({}, {}, {}, {0: 2, 1: 2})) == "0 notebooks: all is there"


CHAIN = {
    "a": {"notebook": "x"},
    "b": {"notebook": "x", "after": ["a"]},
    "c": {"notebook": "x", "after": ["b", "elsewhere"]},
}
FOUR = {name: {"notebook": "x"} for name in "abcd"}
THREE_ON_GPU = {name: {"notebook": "x", "gpu": int(name != "a")} for name in "abcd"}


@pytest.mark.parametrize(
    "experiment, side_by_side, hours",
    [(CHAIN, {0: 8, 1: 8}, 3), (FOUR, {0: 2, 1: 1}, 2), (THREE_ON_GPU, {0: 8, 1: 1}, 3)],
)
def test_hours_are_bounded_by_devices_and_by_the_longest_chain(experiment, side_by_side, hours):
    each = dict.fromkeys(experiment, 60.0)
    assert Forecast(experiment, each, {}, side_by_side).hours == hours


def test_a_large_model_is_guessed_from_a_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hw = Hardware("sd-v1-4", "fp16")
    assert hw.gpu
    assert hw.speed == guessed_speed("fp16", "A100-40") == 0.15 * 312e12
    assert 1e12 < hw.decoding < 3e12
    experiment = {"a": {"notebook": "50_evaluate", "gpu": 1, "parameters": {"sets": "nowhere"}}}
    text = str(Forecast(experiment, {"a": 30.0}, {"sd-v1-4": hw}, {0: 2, 1: 1}))
    assert "1 notebook, about 30 minutes on an A100-40, for want of a known GPU here," in text
    assert "with 1 at a time (guessed from its data sheet: sd-v1-4 46800 GFLOP/s)" in text
