"""A loop that is interrupted and resumed from bytes gives the numbers of one run."""

import pytest
import tiny
import torch
from flat import FULL, facts, run
from safetensors.torch import load, save

from mu.state import State
from mu.train import finetune


def run_twice(make_state, loop, steps):
    """Return records and weights of `steps` steps in one go, and resumed half way from bytes."""
    whole = make_state()
    records = list(loop(whole, steps))
    first = make_state()
    half = list(loop(first, steps // 2))
    saved = save({name: t.contiguous() for name, t in first.tensors().items()})
    del first
    second = make_state()
    with torch.no_grad():
        for p in second.parameters:
            p.add_(1)  # `load` must replace whatever the state held before
    second.load(load(saved))
    assert second.step == steps // 2
    resumed = half + list(loop(second, steps))
    return (records, tiny.weights(whole.unet)), (resumed, tiny.weights(second.unet))


def test_unlearning_resumes_with_the_same_numbers(sets):
    (records, whole), (again, resumed) = run_twice(
        lambda: State(tiny.make_unet(), "u", lr=1e-3, seed=5),
        lambda state, steps: run(state, sets, steps, **FULL),
        6,
    )
    assert facts(records) == facts(again)
    assert [r.step for r in again] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(whole, resumed)
    # the stop was inside one pool of trajectories; step 5 sampled the next
    assert records[3].passes < 15 < records[4].passes
    assert "unrelated after" in records[2].losses
    assert "forget after" in records[3].losses


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_fine_tuning_resumes_with_the_same_numbers(sets, noise_scheduler, optimizer):
    (records, whole), (again, resumed) = run_twice(
        lambda: State(tiny.make_unet(), "f", lr=1e-3, optimizer=optimizer, seed=5),
        lambda state, steps: list(finetune(state, noise_scheduler, sets[0], steps=steps)),
        6,
    )
    assert facts(records) == facts(again)
    assert len(again) == 6
    assert torch.equal(whole, resumed)


def test_a_state_of_other_weights_is_refused(unet):
    saved = State(unet, "x").tensors()
    with pytest.raises(ValueError, match="first difference: "):
        State(unet, "u").load(saved)


def test_seeds_differ_and_repeat(sets, noise_scheduler):
    def weights(seed):
        state = State(tiny.make_unet(), "f", lr=1e-3, seed=seed)
        list(finetune(state, noise_scheduler, sets[0], steps=1))
        return tiny.weights(state.unet)

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
