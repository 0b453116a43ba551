"""Preflight: the device, the advice until a training fits, and its minutes."""

import math

import pytest
import torch

from mu.notebooks import preflight as pf
from mu.notebooks.cost import estimate
from mu.notebooks.preflight import RESERVE, find_device, guessed_speed, preflight

META = dict(
    batch_size=4,
    trajectory_steps=4,
    trajectory_reuse=2,
    retain=1.0,
    retain_batch_size=8,
    ascent=0.1,
    relearn=0.1,
    self_destruct=0.1,
    inner_batch_size=8,
    inner_steps=2,
    inner_optimizer="sgd",
    precision="no",
    steps=100,
)


@pytest.mark.parametrize("share, possible", [(2.0, True), (0.6, True), (0.3, True), (1e-3, False)])
def test_advice_makes_it_fit(share, possible, pipe, monkeypatch):
    whole = estimate(pipe, META).gib
    monkeypatch.setitem(pf.GPUS, "nano", pf.Gpu(RESERVE + share * whole, 1, 0.5, True))
    found = preflight(pipe, META, "nano")
    assert found.fits == (share > 1)
    assert found.needs[0][:2] == ({}, whole)
    assert (found.needs[-1].gib <= found.usable) == possible
    assert (len(found.needs) == 1) == found.fits
    gib = [need.gib for need in found.needs]
    assert gib == sorted(set(gib), reverse=True)
    changed = META
    for change, gib, minutes in found.needs:
        changed = changed | change
        assert estimate(pipe, changed).gib == gib
        speed = (1e12 if changed["precision"] != "no" else 0.5e12) * pf.UTILISATION
        assert minutes == pytest.approx(estimate(pipe, changed).flops * 100 / speed / 60)
    text = str(found)
    assert ("does not fit" in text) != found.fits
    assert ("still too much" in text) != possible
    assert f"{whole:.1f} GiB" in text
    assert "guess" in text


def test_a_pass_is_timed_on_the_device_at_hand(pipe, monkeypatch):
    found = preflight(pipe, META | dict(steps=10))
    assert found.fits == (found.needs[0].gib <= found.usable)
    assert found.timed
    assert 0 < found.needs[0].minutes < 60
    assert found.device == "this CPU" or torch.cuda.is_available()
    monkeypatch.setattr(pf, "speed", lambda *_: 1e9)  # timings differ while other processes run
    ten, twenty = (preflight(pipe, META | dict(steps=n)).needs[0].minutes for n in (10, 20))
    assert twenty == pytest.approx(2 * ten)


def test_sd_fits_a_t4():
    p = META | dict(
        method="esd-x",
        precision="auto",
        gradient_checkpointing=True,
        frozen_dtype="half",
        offload=True,
        inner_optimizer="adam",
    )
    found = preflight("sd-v1-4", p, "T4")
    assert found.fits
    assert 5 < found.estimate.gib < 14.5 - RESERVE
    assert not found.timed
    assert found.needs[0].minutes > 1
    assert found == preflight("sd-v1-4", p | dict(precision="fp16"), "T4")


def test_auto_is_the_half_precision_of_the_gpu_asked_about(monkeypatch):
    assert find_device("T4").resolve("auto") == "fp16"
    assert find_device("A100-40").resolve("auto") == "bf16"
    assert guessed_speed("auto", "T4") == guessed_speed("fp16", "T4") == 65e12 * pf.UTILISATION
    assert guessed_speed("bf16", "T4") == 8.1e12 * pf.UTILISATION
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pf, "resolve_precision", lambda precision, device: f"{precision} {device}")
    assert find_device().resolve("auto") == "auto cpu"
    assert find_device().resolve("no") == "no"
    assert math.isnan(find_device().guessed_speed("auto"))


@pytest.mark.parametrize(
    "model, parameters, gpu, match",
    [
        ("sd-v1-4", dict(batchsize=1), None, "batchsize.*batch_size"),
        ("sd-v9", {}, None, "sd-v9.*sdxl"),
        (None, {}, "V2", "V2.*T4"),
        (None, dict(method="esd"), None, "esd-x"),
        (None, META | dict(accumulation=3), None, "batch_size.*3 micro-batches"),
        (None, dict(subset="x", weights_dtype="half"), None, "lora"),
        (None, dict(frozen_dtype="none"), None, "lora"),
        (None, dict(weights_dtype="quarter"), None, "quarter.*half"),
        (None, dict(precision="fp8"), None, "fp8.*bf16"),
    ],
)
def test_impossible_trainings_are_refused(model, parameters, gpu, match, pipe):
    with pytest.raises(ValueError, match=match):
        preflight(model or pipe, parameters, gpu)
