"""Carry out one training from the params.json of its run folder: prepare, train, save.

Called by a notebook, or on several GPUs by `accelerate launch` or torchrun:

    accelerate launch --num_processes 2 -m mu.runs.train runs/mine/meta
"""

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from mu.concepts.rehearsal import rehearsal_set
from mu.concepts.sets import load_sets, random_prompts, take_images
from mu.devices import loss_scale
from mu.draws import Data
from mu.files import locked, read_json, save_json
from mu.frozen import frozen_copy, offload
from mu.methods.closed_form import EditConfig, rece, uce
from mu.models import encode_prompts, load_pipeline
from mu.parallel import Runtime
from mu.phases import Phase, unlearn_in_phases
from mu.publish.weights import load_start, load_weights
from mu.runs.folder import finish, run_to_end, table
from mu.runs.parameters import Training, average_decay, check_method, make_phases
from mu.state import State
from mu.validation import Validation


@dataclass
class Setup:
    """What a training needs before its first step."""

    pipe: DiffusionPipeline  # its UNet is trained in place
    unet_frozen: torch.nn.Module | None
    state: State
    data: Data
    phases: list[Phase]
    validation: Validation
    runtime: Runtime

    @property
    def steps(self):
        """Return the largest number of outer steps."""
        return sum(phase.steps for phase in self.phases)


def edit(pipe, method, forget, preserve=(), replace=" ", tokens="rest", ridge=0.5, rounds=3):
    """Edit the pipeline's UNet in place by UCE, or by UCE and `rounds` of RECE.

    See `mu.methods.closed_form`. Returns records like a loop's, one for UCE and one per round:
    "change" is the mean relative change of the matrices, "adversarial" the relative size of the
    vectors that still reached the concept before the round.
    """

    def mean(changes):
        return sum(changes.values()) / len(changes)

    began = time.perf_counter()
    original = frozen_copy(pipe.unet) if method == "rece" else None
    config = EditConfig(tokens=tokens, ridge=ridge)
    losses = [{"change": mean(uce(pipe, forget, replace, preserve, config))}]
    if method == "rece":
        for found in rece(pipe, original, forget, replace, preserve, epochs=rounds):
            losses.append({"change": mean(found.changes), "adversarial": found.adversarial})
    seconds = (time.perf_counter() - began) / len(losses)
    return [
        {"step": step, "losses": found, "passes": 0, "seconds": seconds}
        for step, found in enumerate(losses, 1)
    ]


def read_training(folder):
    """Return the `Training` of a run folder. Raises FileNotFoundError if there is none."""
    params = read_json(Path(folder) / "params.json")
    if params is None:
        raise FileNotFoundError(
            f"{folder} has no params.json: run 20_unlearn or 21_meta_unlearn, or call "
            "mu.params.open_run"
        )
    return Training(**{name: value for name, value in params.items() if name != "files"})


def prepare_data(pipe, training, cache):
    """Return the `Data` of a training, encoded once and cached in a folder."""
    sets = load_sets(pipe, training.sets, cache)
    sets["forget"] = take_images(sets["forget"], training.forget_images)
    words = random_prompts(
        pipe.tokenizer, training.retain_prompts, sets["forget"].prompts, training.seed
    )
    rehearsal = None
    if training.rehearsal_images:
        prompts = sets["forget"].prompts
        rehearsal = rehearsal_set(pipe, prompts, training.rehearsal_images, cache=cache)
    return Data(
        **sets,
        rehearsal=rehearsal,
        unconditional=encode_prompts(pipe, [""]),
        retain_prompts=encode_prompts(pipe, words) if words else None,
        replace=encode_prompts(pipe, [training.replace]) if training.replace else None,
    )


def prepare_weights(pipe, training, folder):
    """Load the weights to start from, apply a closed form; returns the frozen UNet of the loop.

    The frozen UNet of ESD and SDD is the original. After a closed form it is the edited UNet: the
    original would undo the edit, which no loss of its own keeps. Saves the edit's records if there
    is no loop. Raises ValueError for frozen_dtype "none" if the run starts from other weights.
    """
    loss, _ = check_method(training.method)
    frozen_dtype = (training.runtime or {}).get("frozen_dtype", "same")
    if frozen_dtype == "none" and loss and training.start:
        raise ValueError(
            f"frozen_dtype 'none' needs a start from the original model, not {training.start!r}: "
            "choose frozen_dtype half or same"
        )
    unet_frozen = frozen_copy(pipe.unet, frozen_dtype) if training.loop and loss else None
    if training.start:
        loaded = load_start(pipe, training.start)
        if PartialState().is_main_process:
            print(f"start: {training.start}, {loaded}")
    if training.closed_form:
        replace = training.replace or " "
        records = edit(pipe, training.method, replace=replace, **training.closed_form)
        if training.loop is None:
            save_json(records, folder / "records.json")
    if training.loop and not loss:
        unet_frozen = frozen_copy(pipe.unet, frozen_dtype)
    return unet_frozen


def prepare(training, pipe, folder):
    """Return the `Setup` of a training; None if a closed form was all of it."""
    loss, subset = check_method(training.method)
    runtime = {"gradient_checkpointing": False, "offload": False} | (training.runtime or {})
    if runtime["gradient_checkpointing"]:
        pipe.unet.enable_gradient_checkpointing()
    else:
        pipe.unet.disable_gradient_checkpointing()
    data = prepare_data(pipe, training, folder.parent / "cache")
    unet_frozen = prepare_weights(pipe, training, folder)
    if training.loop is None:
        return None
    if runtime["offload"]:
        offload(pipe)
    kind = dict(seed=training.seed, rank=training.rank, ema=average_decay(training.ema, loss))
    subset = training.subset or subset
    state = State(pipe.unet, subset, training.lr, training.optimizer, **kind)
    computed = Runtime(
        runtime.get("accumulation", 1),
        runtime.get("snapshot") or None,
        runtime.get("half_pool", False),
        loss_scale(pipe.precision),
    )
    phases, validation = make_phases(training.loop, loss, training.lr)
    return Setup(pipe, unet_frozen, state, data, phases, validation, computed)


def train(setup):
    """Return the records of a training, as a generator."""
    return unlearn_in_phases(
        setup.state,
        setup.unet_frozen,
        setup.pipe.scheduler,
        setup.data,
        setup.phases,
        validation=setup.validation,
        runtime=setup.runtime,
    )


def train_run(folder, pipe=None, checkpoint_every=25):
    """Carry out the run of a folder, from its checkpoint if it was stopped; read a finished one.

    pipe: the pipeline of the run's model, if it is loaded; its UNet holds the result afterwards.
    Each of several processes takes its shard of every batch. Returns the table of records. Raises
    as `prepare_weights`, `mu.train.unlearn`, `mu.runs.folder.run_loop`, `mu.files.locked` and
    `mu.publish.weights.load_weights` do.
    """
    # without cpu=True, accelerate takes each of several processes on a CPU for the only one
    PartialState(cpu=not torch.accelerator.is_available())
    folder = Path(folder)
    training = read_training(folder)
    if pipe is None:
        pipe = load_pipeline(
            training.model, dtype=training.weights_dtype, precision=training.precision
        )
    if (folder / "unet").is_dir():
        load_weights(pipe.unet, folder / "unet")
        return table(folder)
    main = PartialState().is_main_process
    with locked(folder) if main else contextlib.nullcontext():
        setup = prepare(training, pipe, folder)
        if setup is None:
            finish(folder, pipe.unet)
            return table(folder)
        return run_to_end(folder, setup.state, train(setup), setup.steps, checkpoint_every)


def launch(folder, pipe=None, checkpoint_every=25, processes=1):
    """Call `train_run` in this process, or in several new ones by torchrun, one per GPU.

    The pipeline's UNet holds the result afterwards. (`accelerate.notebook_launcher` can start the
    same function from a kernel that has not imported `mu`, since bitsandbytes must not be loaded
    before it forks.) Raises RuntimeError if a process fails.
    """
    if processes > 1:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {processes:d}".split()
        command = [sys.executable, *torchrun, "-m", "mu.runs.train", str(folder)]
        if subprocess.run([*command, str(checkpoint_every)]).returncode:
            raise RuntimeError(
                f"the training of {folder} failed on {processes} processes (see above): run again "
                "to resume from its last checkpoint"
            )
    return train_run(folder, pipe, checkpoint_every)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: accelerate launch -m mu.runs.train RUN_FOLDER [CHECKPOINT_EVERY]")
    train_run(sys.argv[1], checkpoint_every=int((sys.argv + [25])[2]))
    PartialState().destroy_process_group()
