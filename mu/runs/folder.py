"""Run folders: parameters, checkpoints, metrics with their protocol. Files are complete or absent, never half written."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tqdm import tqdm

from mu.files import digest, read_json, save_json, save_tensors
from mu.models import MODELS, without_lora
from mu.publish.weights import load_weights, save_model

LESS_MEMORY = (
    "gradient_checkpointing = True, accumulation = 2, 4, …, frozen = 'half', snapshot = 'cpu', and this run goes on; as a run of another name, smaller "
    "batch sizes, optimizer = 'adamw8bit', subset = 'lora'. 15_preflight says what each spares"
)


def run_loop(folder, state, records, checkpoint_every=25):
    """Pass a loop's records on; every `checkpoint_every` steps, at the end, and when it stops with an error (the last good step),
    save the records so far and the state in `folder`. Of several processes one writes.

    Raises FloatingPointError as the loop does; MemoryError with what to change where memory runs out: run again, changed, it goes on."""
    folder = Path(folder)
    history = [r for r in read_json(folder / "records.json", []) if r["step"] <= state.step]

    def checkpoint():
        if PartialState().is_main_process:
            save_json(history, folder / "records.json")
            save_tensors(state.tensors(), folder / "checkpoint.safetensors")

    try:
        for record in records:
            history.append(asdict(record))
            if record.step % checkpoint_every == 0:
                checkpoint()
            yield record
    except FloatingPointError as error:
        checkpoint()
        raise FloatingPointError(
            f"{error}; the last good state is {folder / 'checkpoint.safetensors'}"
        ) from error
    except RuntimeError as error:  # of which CUDA's own is a subclass
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
        checkpoint()
        raise MemoryError(
            f"out of memory in step {state.step + 1}; its {state.step} predecessors are kept in {folder / 'checkpoint.safetensors'}. "
            f"To make it fit: {LESS_MEMORY} ({str(error).splitlines()[0]})"
        ) from error
    checkpoint()


def resume(folder, state):
    """Continue from the folder's checkpoint, if there is one. Returns `state`."""
    file = Path(folder) / "checkpoint.safetensors"
    if file.exists():
        state.load(load_file(file))
    return state


def finish(folder, unet):
    """Save the result as a diffusers UNet in `folder`/unet, a LoRA fused into it and also alone in `folder`/lora; drop the checkpoint, which is
    six times as large. Of several processes one writes, and the others wait."""
    folder = Path(folder)
    from mu.formats import save_lora  # which needs this module

    main = PartialState().is_main_process
    if main and hasattr(unet, "peft_config"):
        save_lora(unet, folder / "lora")
    without_lora(unet, fuse=True)
    if main:
        save_model(unet, folder / "unet")
        for file in [
            folder / "checkpoint.safetensors",
            *folder.glob(".tmp*"),
            *folder.glob(".*.tmp"),
        ]:  # and what a kill has left of a file that was being written (safetensors has a name of its own for it)
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    PartialState().wait_for_everyone()


def identity(**paths):
    """Name → "path (digest)", the digest where the path is on this disk: a run that was made from other files is not taken for this one.

    Of a run's folder the digest is that of its UNet; an empty path stays empty."""

    def place(path):
        folder = Path(MODELS.get(path, path))
        return (
            folder / "unet"
            if (folder / "params.json").exists() and (folder / "unet").is_dir()
            else folder
        )

    return {
        name: f"{path} ({digest(place(path))})" if path and place(path).exists() else path
        for name, path in paths.items()
    }


def table(folder):
    """The records of a run: index step, columns losses, passes, seconds."""
    return pd.DataFrame(
        [record | record.pop("losses") for record in read_json(Path(folder) / "records.json")]
    ).set_index("step")


def run_to_end(folder, state, records, steps, checkpoint_every=25):
    """Run a loop to its end, from its checkpoint if it was stopped; a finished run is only read. `state.unet` then holds the result.

    Returns the `table` of the records."""
    if (Path(folder) / "unet").is_dir():
        load_weights(without_lora(state.unet), Path(folder) / "unet")
    else:
        loop = run_loop(folder, resume(folder, state), records, checkpoint_every)
        for _ in tqdm(
            loop,
            folder.name,
            steps,
            initial=state.step,
            file=sys.stdout,
            mininterval=5,
            disable=not PartialState().is_main_process,
        ):
            pass
        finish(folder, state.release())
    return table(folder)


def listed(concept_prompts):
    """The fact that pictures are of listed prompts, with the file's digest where it is one, for cards and parameters; nothing where they are the sets' own."""
    return identity(concept_prompts=concept_prompts) if concept_prompts else {}


def finished(out, runs):
    """The names in `runs` (with commas), each a finished run below `out`, or "original". Raises FileNotFoundError that lists those which are there."""
    names = [name.strip() for name in runs.split(",")]
    absent = [
        name for name in names if name != "original" and not (Path(out) / name / "unet").is_dir()
    ]
    if absent:
        there = (
            ", ".join(sorted(folder.parent.name for folder in Path(out).glob("*/unet"))) or "none"
        )
        raise FileNotFoundError(
            f"{', '.join(absent)}: no finished run below {out}; there are: {there}. Make it by 20_unlearn or 21_meta_unlearn, or name another `out`"
        )
    return names


def load_run(pipe, original, out, name):
    """Give the pipeline's UNet the weights of a run below `out`, or those of `original` (a state dict) for the name "original". Returns where they come from."""
    pipe.unet.load_state_dict(original)
    if name == "original":
        return ""
    load_weights(pipe.unet, f"{out}/{name}/unet")
    return f"{out}/{name}/unet"
