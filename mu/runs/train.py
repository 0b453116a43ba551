"""One training, from the params.json of its run folder: called by a notebook, or by `accelerate launch` or torchrun on several GPUs.

accelerate launch --num_processes 2 -m mu.runs.train runs/mine/meta
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from mu.concepts.sets import load_sets, random_prompts, take_images
from mu.files import read_json, save_json
from mu.methods.closed_form import rece, uce
from mu.models import encode_prompts, frozen_copy, load_pipeline, offload
from mu.objectives import loss_scale
from mu.publish.weights import load_weights
from mu.runs.folder import finish, run_to_end, table
from mu.train import State, unlearn

# of params.json; what a run leaves out is as here. loop: keywords of `mu.train.unlearn`; closed_form: keywords of `edit`; None: no such part
DEFAULTS = dict(
    method="esd-f",
    start="",
    subset="",
    rank=16,
    replace="",
    retain_prompts=0,
    forget_images=0,
    lr=1e-5,
    optimizer="adamw",
    ema=0.999,
    weights="full",
    precision="no",
    seed=0,
    loop=None,
    closed_form=None,
)
# method → what the loop's objective is (None: a closed form comes first, and the meta gradient goes alone) and which weights are trained
METHODS = {
    "esd-x": ("esd", "x"),
    "esd-u": ("esd", "u"),
    "esd-f": ("esd", "f"),
    "sdd": ("sdd", "x"),
    "uce": (None, "f"),
    "rece": (None, "f"),
}


def check_method(method):
    """The entry of METHODS. Raises ValueError that lists the known ones, and says where the last figure of a name such as ESD-u-3 goes."""
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}: allowed are {', '.join(METHODS)} (the figure of a name such as ESD-u-3 is the parameter eta = 3.0)"
        )
    return METHODS[method]


def keywords(loop, objective):
    """Keywords of `mu.train.unlearn` from the parameters of a notebook: lists are pairs there, for want of tuples in JSON, and a closed form has no loss of its own."""
    pairs = {
        name: tuple(value)
        if name in ("inner_steps", "inner_lr") and isinstance(value, list)
        else value
        for name, value in loop.items()
    }
    if isinstance(pairs.get("inner_optimizer"), str):
        pairs["inner_optimizer"] = pairs["inner_optimizer"].split(",")
    return pairs | {"method": objective or "esd"} | ({} if objective else {"unlearn": 0.0})


def edit(pipe, method, forget, preserve=(), replace=" ", tokens="rest", ridge=0.5, rounds=3):
    """UCE, or UCE and then `rounds` of RECE with its own official settings, on the pipeline's UNet in place: see `mu.methods.closed_form`.

    Returns records like a loop's, one for UCE and one for each round: "change" is the mean of the matrices' relative changes, "adversarial"
    the relative size of the vectors that still reached the concept before the round."""
    began, original = time.perf_counter(), frozen_copy(pipe.unet) if method == "rece" else None

    def mean(changes):
        return sum(changes.values()) / len(changes)

    losses = [{"change": mean(uce(pipe, forget, replace, preserve, tokens=tokens, ridge=ridge))}]
    if method == "rece":
        losses += [
            {"change": mean(r.changes), "adversarial": r.adversarial}
            for r in rece(pipe, original, forget, replace, preserve, epochs=rounds)
        ]
    return [
        {
            "step": i,
            "losses": loss,
            "passes": 0,
            "seconds": (time.perf_counter() - began) / len(losses),
        }
        for i, loss in enumerate(losses, 1)
    ]


def train_run(folder, pipe=None, checkpoint_every=25):
    """Carry out the run that the folder's params.json describes (see `mu.params.open_run`), from its checkpoint if it was stopped; a finished one is only read.

    pipe: the pipeline of `params["model"]` where it has been loaded; its UNet holds the result afterwards. On several processes each takes its
    share of every batch. Returns the table of records. Raises ValueError for frozen "none" where the run does not start from the model itself, and as `mu.train.unlearn`, `mu.runs.folder.run_loop` and `mu.publish.weights.load_weights` do."""
    PartialState(
        cpu=not torch.accelerator.is_available()
    )  # unless told so, accelerate takes each of several processes on a CPU for the only one
    folder = Path(folder)
    params = read_json(folder / "params.json")
    if params is None:
        raise FileNotFoundError(
            f"{folder} has no params.json: a notebook (20_unlearn, 21_meta_unlearn) writes it, or mu.params.open_run"
        )
    params = DEFAULTS | params
    how, loop = params.get("how", {}), params["loop"]
    pipe = pipe or load_pipeline(
        params["model"], dtype=params["weights"], precision=params["precision"]
    )
    if (folder / "unet").is_dir():
        load_weights(pipe.unet, folder / "unet")
        return table(folder)
    objective, subset = check_method(params["method"])
    getattr(
        pipe.unet,
        "enable_gradient_checkpointing"
        if how.get("gradient_checkpointing")
        else "disable_gradient_checkpointing",
    )()
    concept_sets = load_sets(pipe, params["sets"], folder.parent / "cache")
    concept_sets["forget"] = take_images(concept_sets["forget"], params["forget_images"])
    words = random_prompts(
        pipe.tokenizer, params["retain_prompts"], concept_sets["forget"].prompts, params["seed"]
    )
    conditionings = dict(
        unconditional=encode_prompts(pipe, [""]),
        retain_prompts=encode_prompts(pipe, words) if words else None,
        replace=encode_prompts(pipe, [params["replace"]]) if params["replace"] else None,
    )
    if how.get("frozen") == "none" and objective and params["start"]:
        raise ValueError(
            "frozen 'none' asks the weights that the run starts from, and this one does not start from the original: choose frozen 'half' or 'same'"
        )

    def copied():
        return frozen_copy(pipe.unet, how.get("frozen", "same")) if loop else None

    unet_frozen = copied() if objective else None
    if params["start"]:
        load_weights(pipe.unet, params["start"])
    if params["closed_form"]:
        records = edit(
            pipe, params["method"], replace=params["replace"] or " ", **params["closed_form"]
        )
        if loop is None:
            save_json(records, folder / "records.json")
            finish(folder, pipe.unet)
            return table(folder)
    if not objective:  # what retention holds is the edited model: the original would take the edit back, and no loss of its own keeps it
        unet_frozen = copied()
    if how.get("offload"):
        offload(pipe)
    state = State(
        pipe.unet,
        params["subset"] or subset,
        params["lr"],
        params["optimizer"],
        seed=params["seed"],
        rank=params["rank"],
        ema=params["ema"] if objective == "sdd" else 0.0,
    )
    records = unlearn(
        state,
        unet_frozen,
        pipe.scheduler,
        **concept_sets,
        **conditionings,
        **keywords(loop, objective),
        accumulation=how.get("accumulation", 1),
        snapshot=how.get("snapshot") or None,
        loss_scale=loss_scale(params["precision"]),
    )
    return run_to_end(folder, state, records, loop["steps"], checkpoint_every)


def launch(folder, pipe=None, checkpoint_every=25, processes=1):
    """`train_run` in this process, or in several new ones by torchrun, one a GPU (on the CPU where there is none; `accelerate launch` knows GPUs only); the given pipeline's
    UNet holds the result afterwards. (`accelerate.notebook_launcher` starts the same function, in a kernel that has not imported `mu` yet, since bitsandbytes must not be there before:
    def train(folder): from mu.runs.train import train_run; train_run(folder); then notebook_launcher(train, (folder,), num_processes=2).)

    Raises RuntimeError where a process failed: what it said is above."""
    if processes > 1:
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            "-m",
            "mu.runs.train",
            str(folder),
            str(checkpoint_every),
        ]
        if subprocess.run([sys.executable, *command]).returncode:
            raise RuntimeError(
                f"the training of {folder} on {processes} processes failed; run again, it goes on from its last checkpoint"
            )
    return train_run(folder, pipe, checkpoint_every)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(
            "one run folder, and perhaps the steps between checkpoints: accelerate launch -m mu.runs.train runs/mine/meta 25"
        )
    train_run(sys.argv[1], checkpoint_every=int((sys.argv + [25])[2]))
    PartialState().destroy_process_group()
