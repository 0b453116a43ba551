"""The precision that "auto" chooses, from the device's flags and from timed passes."""

import pytest
import tiny
import torch

from mu import devices
from mu.models import encode_prompts, load_pipeline, predict

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that simulates a CPU: capability, flags, and gain of bfloat16."""

    def simulate(capability, claims_bf16, gain):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: claims_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(devices, "bf16_gain", lambda: gain)
        monkeypatch.setattr(devices, "cpu_precision", devices.decide_cpu_precision)

    return simulate


@pytest.mark.parametrize(
    "capability, claims_bf16, gain, expected",
    [
        ("AVX512", True, 1.3, "bf16"),
        ("AVX512", True, 0.05, "no"),  # the flag alone does not make it fast
        ("AVX512", False, 9.0, "no"),
        ("AVX2", True, 9.0, "no"),  # ATEN_CPU_CAPABILITY=avx2
        ("DEFAULT", False, 9.0, "no"),
    ],
)
def test_auto_chooses_bfloat16_only_where_it_is_faster(
    machine, capsys, capability, claims_bf16, gain, expected
):
    machine(capability, claims_bf16, gain)
    assert devices.resolve_precision("auto", CPU) == expected
    assert f"precision auto: {expected}" in capsys.readouterr().out


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_its_half_precision(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert devices.resolve_precision("auto", torch.device("cuda")) == expected


def test_timing_both_precisions_leaves_the_random_state():
    state = torch.random.get_rng_state()
    assert devices.bf16_gain(rows=1, repetitions=1) > 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_named_precisions_are_kept_and_unknown_ones_refused():
    assert [devices.resolve_precision(p, CPU) for p in ("no", "bf16")] == ["no", "bf16"]
    with pytest.raises(ValueError, match="'half': choose auto, no, bf16, fp16"):
        devices.resolve_precision("half", CPU)
    with pytest.raises(ValueError, match="'fp16' needs a GPU: choose auto, no or bf16"):
        devices.resolve_precision("fp16", CPU)


@pytest.mark.parametrize("precision", ["auto", "no", "bf16"])
def test_a_pipeline_runs_in_each_precision_of_this_machine(tmp_path, precision):
    tiny.make_pipeline(tmp_path)
    pipe = load_pipeline(str(tmp_path), precision=precision)
    assert pipe.precision == (precision if precision != "auto" else devices.cpu_precision())
    conditioning = encode_prompts(pipe, ["a cat"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predicted = predict(pipe.unet, noise, torch.tensor([10]), conditioning)
    assert predicted.shape == noise.shape and torch.isfinite(predicted).all()
