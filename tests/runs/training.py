"""Small trainings from a params.json, and what their results are compared by."""

from safetensors.torch import load_file

from mu.params import open_run
from mu.runs.parameters import METHODS

LOOP = dict(
    steps=4,
    batch_size=2,
    trajectory_steps=4,
    trajectory_reuse=2,
    retain=1.0,
    retain_batch_size=4,
    relearn=0.5,
    self_destruct=1.0,
    clean=1.0,
    clean_every=3,
    inner_steps=[1, 2],
    inner_lr=[1e-3, 2e-3],
    inner_optimizer=["sgd", "adam"],
    inner_batch_size=2,
)
META_ALONE = LOOP | {"unlearn": 0.0}  # after a closed form
PARAMETERS = dict(
    method="esd-f",
    subset="",
    rank=2,
    weights_dtype="full",
    precision="no",
    start="",
    replace="",
    retain_prompts=3,
    lr=1e-2,
    optimizer="adamw",
    ema=0.9,
    seed=3,
    loop=LOOP,
)


def is_closed(method):
    return METHODS[method][0] is None


def describe(folder, model, sets, runtime=None, **changes):
    """Return a run folder with its params.json."""
    params = PARAMETERS | dict(model=str(model), sets=str(sets)) | changes
    if "closed_form" not in changes:
        edit = dict(forget=["cat"], preserve=["tiger", "cup"])
        params["closed_form"] = edit if is_closed(params["method"]) else None
    return open_run(folder, params, runtime)


def result(folder):
    """Return the weights that a run saved, by name."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def difference(one, two):
    """Return the largest difference between the weights of two results."""
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)
