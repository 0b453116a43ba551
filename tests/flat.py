"""The loop with flat keywords and test defaults: one inner step of SGD, fresh trajectories."""

import math
from dataclasses import replace

import tiny
import torch

from mu import train
from mu.draws import Data
from mu.frozen import frozen_copy
from mu.parallel import Runtime
from mu.runs.parameters import FLAT, make_objective
from mu.state import State

DEFAULTS = dict(
    trajectory_steps=50,
    trajectory_reuse=1,
    retain_batch_size=8,
    inner_steps=1,
    inner_lr=1e-5,
    inner_optimizer="sgd",
    bound=math.inf,
)
RUNTIME = ("accumulation", "snapshot", "loss_scale", "half_pool")
FULL = dict(
    retain=1.0,
    relearn=0.3,
    self_destruct=4.0,
    clean=1.0,
    inner_steps=(1, 2),
    inner_lr=(1e-4, 4e-4),
    inner_optimizer="adam",
    inner_batch_size=4,
    trajectory_reuse=4,
    batch_size=1,
)
META = dict(retain=1.0, relearn=1.0, self_destruct=1.0)
SHORT = dict(
    batch_size=2,
    trajectory_steps=4,
    trajectory_reuse=2,
    retain=1.0,
    retain_batch_size=4,
    ascent=0.2,
    relearn=0.5,
    self_destruct=1.0,
    clean=1.0,
    clean_every=2,
    inner_steps=2,
    inner_lr=1e-2,
    inner_batch_size=2,
    bound=0.9,
)


def objective(method="esd", clip=1.0, **flat):
    """Return the objective of flat keywords."""
    values = DEFAULTS | flat
    optimizer = values.pop("inner_optimizer")  # a string here is one name, without a draw
    made = make_objective(values, method)
    return replace(made, clip=clip, inner=replace(made.inner, optimizer=optimizer))


def unlearn(state, unet_frozen, noise_scheduler, *sets, steps, **flat):
    """Run `mu.train.unlearn`. sets: forget, related, unrelated, unconditional, prompts, replace."""
    runtime = Runtime(**{name: flat.pop(name) for name in RUNTIME if name in flat})
    extra = {name: flat.pop(name) for name in ("retain_prompts", "replace") if name in flat}
    unknown = set(flat) - set(FLAT) - {"method", "clip"}
    assert not unknown, unknown
    data, what = Data(*sets, **extra), objective(**flat)
    arguments = (state, unet_frozen, noise_scheduler, data, what)
    return train.unlearn(*arguments, steps=steps, runtime=runtime)


def run(state, sets, steps, unet_frozen=None, **options):
    """Return all records of `unlearn` with a fresh scheduler and, by default, frozen UNet."""
    unet_frozen = unet_frozen or tiny.frozen(tiny.make_unet())
    return list(unlearn(state, unet_frozen, tiny.make_scheduler(), *sets, steps=steps, **options))


def facts(records):
    """Return what two equal runs share: everything but the time."""
    return [(r.step, r.losses, r.passes) for r in records]


def train_short(sets, frozen="same", checkpointing=False, state=None, subset="f", **options):
    """Run two steps with every term, by SGD at a large learning rate.

    Returns the change of the trained weights as one vector, and the records.
    """
    unet = tiny.make_unet()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet_frozen = frozen_copy(unet, frozen)
    state = state or State(unet, subset, lr=0.5, optimizer="sgd", seed=5, rank=2)
    start = [p.detach().clone() for p in state.parameters]
    loop = unlearn(state, unet_frozen, tiny.make_scheduler(), *sets, steps=2, **SHORT | options)
    records = list(loop)
    pairs = zip(state.parameters, start, strict=True)
    return torch.cat([(p.detach() - q).flatten() for p, q in pairs]), records


def assert_close(one, two, tolerance):
    """Check that two results of `train_short` moved, and moved alike."""
    assert one[0].norm() > 1e-3
    assert distance(one, two) < tolerance


def distance(one, two):
    """Return the relative difference of the changes of two results of `train_short`."""
    return (one[0] - two[0]).norm() / one[0].norm()
