"""The loop with flat keywords and test defaults: one inner step of SGD, fresh trajectories."""

import math

from mu import train
from mu.draws import Data
from mu.parallel import Runtime
from mu.runs.parameters import FLAT, make_objective

DEFAULTS = dict(
    trajectory_steps=50,
    trajectory_reuse=1,
    retain_batch_size=8,
    inner_steps=1,
    inner_lr=1e-5,
    inner_optimizer="sgd",
    bound=math.inf,
)
RUNTIME = ("accumulation", "snapshot", "loss_scale")


def objective(method="esd", clip=1.0, **flat):
    """Return the objective of flat keywords."""
    values = DEFAULTS | flat
    optimizer = values.pop("inner_optimizer")  # a string here is one name, without a draw
    made = make_objective(values, method)
    inner = made.inner.__class__(**vars(made.inner) | {"optimizer": optimizer})
    return made.__class__(**vars(made) | {"clip": clip, "inner": inner})


def unlearn(state, unet_frozen, noise_scheduler, *sets, steps, **flat):
    """Run `mu.train.unlearn`. sets: forget, related, unrelated, unconditional, prompts, replace."""
    runtime = Runtime(**{name: flat.pop(name) for name in RUNTIME if name in flat})
    extra = {name: flat.pop(name) for name in ("retain_prompts", "replace") if name in flat}
    unknown = set(flat) - set(FLAT) - {"method", "clip"}
    assert not unknown, unknown
    data, what = Data(*sets, **extra), objective(**flat)
    arguments = (state, unet_frozen, noise_scheduler, data, what)
    return train.unlearn(*arguments, steps=steps, runtime=runtime)
