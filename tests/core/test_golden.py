"""The loop against the loop before the restructuring: equal weights and records, bit for bit."""

import flat
import legacy_unlearn as legacy
import pytest
import tiny
import torch

from mu.parallel import Runtime
from mu.state import State
from mu.train import finetune

META = dict(
    retain=1.0, relearn=0.3, self_destruct=4.0, clean=1.0, ascent=0.5, inner_lr=(1e-4, 4e-4)
)
CASES = {
    "esd": dict(eta=1.5, guidance=2.0, trajectory_steps=50),
    "sdd": dict(method="sdd"),
    "esd, reused trajectories": dict(trajectory_steps=7, trajectory_reuse=3),
    "full": META | dict(inner_steps=(1, 3), inner_optimizer=["sgd", "adam"], angle_every=2),
    "sdd, full": META | dict(method="sdd", inner_optimizer="adam", replace=True),
    "second order": META | dict(order="second", inner_steps=2),
    "bound and clip": META | dict(bound=0.5, clip=0.1, clean_every=2),
    "meta alone": META | dict(unlearn=0.0, drift_terms=["related", "any"], timestep=300),
    "ascent alone": dict(unlearn=0.0, ascent=1.0),
    "controls": dict(gradient_norm=0.5, alignment=0.3, inner_batch_size=3),
    "lora": META | dict(subset="lora", frozen=False),
    "accumulation": META | dict(accumulation=2, snapshot="cpu", trajectory_reuse=2),
    "float16's scale": META | dict(loss_scale=256.0),
}


def run_old(state, *fixed, **options):
    """Run the old loop, where `drift_terms` was called `keep`."""
    old = {"keep" if name == "drift_terms" else name: value for name, value in options.items()}
    return legacy.unlearn(state, *fixed, steps=6, **old)


def run_new(state, *fixed, **options):
    return flat.unlearn(state, *fixed, steps=6, **options)


def run_loop(make_state, loop, sets, options):
    """Return records, weights and saved state of one of the two loops."""
    options = {"trajectory_steps": 8} | options
    subset, frozen = options.pop("subset", "u"), options.pop("frozen", True)
    prompts = torch.randn(5, tiny.LENGTH, 16, generator=torch.Generator().manual_seed(3))
    prompts = {"encoder_hidden_states": prompts}
    first = {name: value[:1] for name, value in prompts.items()}
    replace = first if options.pop("replace", False) else None
    ema = 0.9 if options.get("method") == "sdd" else 0.0
    unet = tiny.make_unet()
    reference = tiny.frozen(unet) if frozen else None
    state = make_state(unet, subset, lr=1e-3, seed=3, rank=2, ema=ema)
    fixed = (reference, tiny.make_scheduler(), *sets, prompts, replace)
    records = [(r.step, r.losses, r.passes) for r in loop(state, *fixed, **options)]
    return records, tiny.weights(unet), state.tensors()


@pytest.mark.parametrize("case", CASES)
def test_six_steps_equal_the_old_loop(sets, case):
    records, weights, tensors = run_loop(legacy.State, run_old, sets, CASES[case])
    new_records, new_weights, new_tensors = run_loop(State, run_new, sets, CASES[case])
    assert len(records) == 6
    assert records == new_records
    assert torch.equal(weights, new_weights)
    # trajectories are saved by use, and two streams are new
    old_name = "trajectory/concept/", "trajectory/"
    new_tensors = {name.replace(*old_name): value for name, value in new_tensors.items()}
    new_streams = {"generator/attackers", "generator/sampled"}
    assert new_tensors.keys() - tensors.keys() == new_streams
    for name, value in tensors.items():
        assert torch.equal(value, new_tensors[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fine_tuning_equals_the_old_loop(sets, accumulation):
    found = []
    for make, loop in ((legacy.State, legacy.finetune), (State, finetune)):
        state = make(tiny.make_unet(), "f", lr=1e-3, optimizer="adam", seed=2)
        options = dict(steps=6, batch_size=4)
        if loop is finetune:
            options |= dict(mixed_set=sets[1], mixed_weight=0.5, runtime=Runtime(accumulation))
        else:
            options |= dict(others=sets[1], others_weight=0.5, accumulation=accumulation)
        records = list(loop(state, tiny.make_scheduler(), sets[0], **options))
        found.append(([list(r.losses.values()) for r in records], tiny.weights(state.unet)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
