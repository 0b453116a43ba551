"""Limits of the machine: eight-bit moments, overflow of half precision, out of memory."""

import sys

import pytest
import tiny
import torch
from safetensors.torch import load, load_file, save

from mu.files import read_json
from mu.parallel import Runtime
from mu.runs.folder import run_loop
from mu.state import State
from mu.train import Record, finetune


def train_adam(sets, optimizer, steps, tensors=None):
    """Fine-tune by an Adam; returns the change of the weights and the saved state."""
    unet = tiny.make_unet(block_out_channels=(32, 64))
    start = tiny.weights(unet)
    state = State(unet, "f", lr=1e-3, optimizer=optimizer, seed=2)
    if tensors:
        state.load(tensors)
    for _ in finetune(state, tiny.make_scheduler(), sets[0], steps=steps, batch_size=2):
        pass
    saved = save({name: value.contiguous() for name, value in state.tensors().items()})
    return tiny.weights(unet) - start, load(saved)


def moments(tensors):
    """Return the tensors of the optimizer in a saved state."""
    return [value for name, value in tensors.items() if name.startswith("optimizer/")]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_eight_bit_adam_is_near_adam_and_resumes(sets):
    full, tensors = train_adam(sets, "adamw", 4)
    eight, small = train_adam(sets, "adamw8bit", 4)
    assert (full - eight).norm() < 0.3 * full.norm()
    assert size(moments(small)) < 0.5 * size(moments(tensors))
    assert any(value.dtype == torch.uint8 for value in moments(small))
    _, half_way = train_adam(sets, "adamw8bit", 2)
    assert torch.equal(train_adam(sets, "adamw8bit", 4, half_way)[0], eight)


def test_without_bitsandbytes_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        State(tiny.make_unet(), optimizer="adamw8bit")


def test_an_overflow_of_half_precision_names_the_settings(sets, noise_scheduler):
    state = State(tiny.make_unet(), "f", lr=1e-3)
    start = tiny.weights(state.unet)
    runtime = Runtime(loss_scale=1e39)
    loop = finetune(state, noise_scheduler, sets[0], steps=1, batch_size=2, runtime=runtime)
    message = (
        r"gradient norm is \w+ in step 1.*lower .* loss_scale \(1e\+39\), "
        "or choose precision bf16 or no"
    )
    with pytest.raises(FloatingPointError, match=message):
        list(loop)
    assert torch.equal(tiny.weights(state.unet), start)
    assert state.step == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
    ],
)
def test_out_of_memory_names_settings_and_leaves_the_run_resumable(tmp_path, error):
    state = State(tiny.make_unet(), "f")

    def loop():
        for step in (1, 2):
            state.step = step
            yield Record(step, {"finetune": 1.0}, 1, 0.1)
        raise error

    message = (
        "out of memory in step 3; the state after step 2 is saved in .*"
        "gradient_checkpointing = True.*snapshot = 'cpu' and run again"
    )
    with pytest.raises(MemoryError, match=message):
        list(run_loop(tmp_path, state, loop()))
    again = State(tiny.make_unet(), "f")
    again.load(load_file(tmp_path / "checkpoint.safetensors"))
    assert again.step == 2
    assert [r["step"] for r in read_json(tmp_path / "records.json")] == [1, 2]


def test_other_errors_pass_unchanged(tmp_path):
    def loop():
        raise RuntimeError("something else")
        yield

    with pytest.raises(RuntimeError, match="something else"):
        list(run_loop(tmp_path, State(tiny.make_unet(), "f"), loop()))
