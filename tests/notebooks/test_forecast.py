"""What an experiment would cost: against hand counts of passes and pictures, and on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from mu.models import load_pipeline, predict_noise
from mu.notebooks import forecast as fc
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
from mu.notebooks.preflight import DEFAULTS, Tracker, blank, estimate, guessed_speed, pass_flops
from mu.notebooks.run import effective

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PROBE = {
    "forget": {"a cat": "concept:cat", "cat": "concept:cat"},
    "related": {"a tiger": "concept:tiger"},
    "unrelated": {"a banana": "concept:banana"},
}  # "8,2,1": 16 + 2 + 1 pictures


class Counted:
    """Hardware on which a row is a FLOP, and a picture too."""

    passes = staticmethod(lambda kind, rows, p: rows)
    pictures = staticmethod(lambda count, p: count)


@pytest.fixture
def of(tmp_path):
    """Parameters of a notebook, its sets being tiny."""
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    return lambda name, **changes: effective(
        NOTEBOOKS / f"{name}.ipynb",
        changes={"sets": str(tmp_path), "probe_seeds": "8,2,1"} | changes,
    )


@pytest.fixture(autouse=True, scope="module")
def briefly():
    """The speed of a tiny model says nothing: one that is the same at every call does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fc, "speed", lambda pipe, rows: 1e9)
        fc.hardware.cache_clear()
        yield
    fc.hardware.cache_clear()


def test_passes_and_pictures_by_hand(of, tmp_path):
    def first(place):
        return True

    assert probe(of("30_attack_finetune")) == (19, 16, 2) and probe(
        of("30_attack_finetune", sets=str(tmp_path / "none"))
    ) == (fc.PICTURES, 8, 1)
    p = of("30_attack_finetune", runs="a,a-meta", seeds="0,1", at="0,10,30", batch_size=8)
    assert attack(Counted, p, first) == (4 * 30 * 8, (4 * 2 + 2) * 19) and attack(
        Counted, p, lambda place: False
    ) == (4 * 30 * 8, 4 * 2 * 19), "what all begin with is drawn once"
    assert (
        attack(Counted, p | {"mixed_set": "attacker/clean"}, first)[0] == 2 * 4 * 30 * 8
        and attack(Counted, p | {"kind": "dreambooth"}, first)[1] == (4 * 2 + 2) * 19 + 4 * 64
    )
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
    assert searches(Counted, p, first) == (
        2 * 2 * 30 * 8 * (2 + 3),
        32 + 3 * 2 * (3 * 16 + 2 * 2 * 3 * 3),
    ), "two prompts, two models, three times of the probe's and two of the attacker's own pictures"
    assert searches(Counted, p | {"searches": "concept-inversion"}, first) == (
        2 * 30 * 8 * 2,
        32 + 2 * 3 * 19,
    )
    p = of("50_evaluate", runs="original,a,a-meta")
    assert evaluation(Counted, p, first) == (0, 3 * 19 + 3) and evaluation(
        Counted, p | {"captions": "coco", "captions_limit": 100, "prompts": "i2p-nudity"}, first
    ) == (0, 3 * (19 + 242) + 3)


def test_a_training_is_what_the_preflight_estimates(sd_folder, of):
    hw, first = Hardware(str(sd_folder), "no"), lambda place: True
    p = of("20_unlearn", model=str(sd_folder), precision="no", steps=10)
    flops = estimate(hw.model, {name: p[name] for name in DEFAULTS if name in p}, gpu=False).flops
    assert training(hw, p, first) == (10 * flops, hw.pictures(2 * 19, p)) and hw.pictures(
        38, p
    ) == pytest.approx(2 * hw.pictures(19, p))
    looked = sum(
        pass_flops(hw.model, "train", rows, {"precision": "no"}, gpu=False) for rows in (8, 16)
    )
    assert training(hw, p | {"angle_every": 5}, first)[0] == pytest.approx(10 * flops + 2 * looked)
    assert training(hw, p | {"method": "uce"}, first)[0] == 0, (
        "a closed form is no matter of passes"
    )
    assert training(hw, of("21_meta_unlearn", model=str(sd_folder), method="uce"), first)[0] > 0, (
        "but rehearsing an attack is"
    )


def test_flops_of_a_picture_are_those_of_its_passes(sd_folder, of):
    pipe = load_pipeline(str(sd_folder))
    with Tracker() as pass_, torch.no_grad():
        predict_noise(pipe.unet, *blank(pipe.unet.config, 2, 8, 20)[:3])
    p, hw = of("50_evaluate", sampling_steps=7, precision="no"), Hardware(str(sd_folder), "no")
    assert (
        hw.decoding > 0
        and hw.pictures(3, p) == pytest.approx(3 * (7 * pass_.flops + hw.decoding))
        and hw.pictures(3, p | {"sampling_guidance": 1.0}) < hw.pictures(3, p)
    )


def steps(sd_folder, seeds, out="runs", **more):
    experiment = {}
    for seed in seeds:
        common = {
            "model": str(sd_folder),
            "sets": "nowhere",
            "out": f"{out}/{seed}",
            "precision": "no",
        }
        experiment |= {
            f"20-{seed}": {"notebook": "20_unlearn", "parameters": common | {"steps": 5}},
            f"30-{seed}": {
                "notebook": "30_attack_finetune",
                "after": [f"20-{seed}"],
                "parameters": common | {"runs": "unlearned"},
            },
        }
    return {name: step | more for name, step in experiment.items()}


def test_twice_as_many_seeds_take_twice_as_long(sd_folder):
    one, two = (
        Forecast(experiment, *minutes(experiment, NOTEBOOKS), {0: 1, 1: 1})
        for experiment in (steps(sd_folder, [0]), steps(sd_folder, [0, 1]))
    )
    assert (
        len(two.minutes) == 2 * len(one.minutes) == 4
        and two.hours == pytest.approx(2 * one.hours)
        and one.minutes["20-0"] > fc.START / 60
    )
    assert (
        "4 notebooks, about" in str(two)
        and "measured:" in str(two)
        and "GFLOP/s" in str(two)
        and "nowhere: not there yet, the probe is taken for 50 pictures" in str(two)
    )
    assert [line.split()[:2] for line in str(two).splitlines()[1:3]] == [
        ["20_unlearn", "2"],
        ["30_attack_finetune", "2"],
    ]


def test_what_is_measured_already_is_not_drawn_again(sd_folder, tmp_path):
    before = minutes(steps(sd_folder, [0], str(tmp_path)), NOTEBOOKS)[0]
    tiny_run = tmp_path / "0" / "original"
    tiny_run.mkdir(parents=True)
    (tiny_run / "metrics.json").write_text("{}")
    after = minutes(steps(sd_folder, [0], str(tmp_path)), NOTEBOOKS)[0]
    assert after["20-0"] < before["20-0"] and after["30-0"] == before["30-0"]


def test_a_notebook_of_another_kind_takes_the_constant():
    experiment = {
        "10_a": {"notebook": "10_prepare_concepts", "parameters": {}},
        "a": {"notebook": "99_unknown", "parameters": {}},
    }
    found, hws = minutes(experiment, NOTEBOOKS)
    assert found == {"10_a": fc.OTHERS, "a": fc.OTHERS} and not hws
    assert "10_prepare_concepts, 99_unknown: not computed, taken for 0.5 minutes each" in str(
        Forecast(experiment, found, hws, {0: 2, 1: 2})
    )
    assert str(Forecast({}, {}, {}, {0: 2, 1: 2})) == "0 notebooks: all is there"


def test_hours_are_bounded_by_what_there_is_and_by_the_longest_chain():
    chain = {
        "a": {"notebook": "x"},
        "b": {"notebook": "x", "after": ["a"]},
        "c": {"notebook": "x", "after": ["b", "elsewhere"]},
    }

    def hours(experiment, side):
        return Forecast(experiment, dict.fromkeys(experiment, 60.0), {}, side).hours

    assert (
        hours(chain, {0: 8, 1: 8}) == 3
        and hours({name: {"notebook": "x"} for name in "abcd"}, {0: 2, 1: 1}) == 2
    )
    assert (
        hours({name: {"notebook": "x", "gpu": int(name != "a")} for name in "abcd"}, {0: 8, 1: 1})
        == 3
    )


def test_a_large_model_is_guessed_from_a_data_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hw = Hardware("sd-v1-4", "fp16")
    assert (
        hw.gpu
        and hw.speed == guessed_speed("fp16", "A100-40") == 0.15 * 312e12
        and 1e12 < hw.decoding < 3e12
    )
    experiment = {"a": {"notebook": "50_evaluate", "gpu": 1, "parameters": {"sets": "nowhere"}}}
    said = str(Forecast(experiment, {"a": 30.0}, {"sd-v1-4": hw}, {0: 2, 1: 1}))
    assert (
        "1 notebook, about 30 minutes on an A100-40, for want of a known GPU here, with 1 at a time (guessed from its data sheet: sd-v1-4 46800 GFLOP/s)"
        in said
    )
