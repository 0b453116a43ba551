"""Run folders: checkpoints, results and records. Files are complete or absent."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from mu.files import digest, read_json, save_json, save_tensors
from mu.hub import MODELS
from mu.publish.export import save_lora, save_model
from mu.publish.weights import load_weights
from mu.trainable import without_lora

LESS_MEMORY = (
    "set gradient_checkpointing = True, accumulation = 2, 4, …, frozen_dtype = 'half' or snapshot "
    "= 'cpu' and run again to resume; or start a run of another name with smaller batch sizes, "
    "optimizer = 'adamw8bit' or subset = 'lora'. 15_preflight shows what each saves"
)


def run_loop(folder, state, records, checkpoint_every=25):
    """Yield a loop's records and save them with the state in `folder`.

    Saves every `checkpoint_every` steps, at the end, and at the last good step before an error. Of
    several processes, the main one writes. Raises FloatingPointError as the loop does, and
    MemoryError that names settings which need less memory.
    """
    folder = Path(folder)
    saved = folder / "checkpoint.safetensors"
    history = [r for r in read_json(folder / "records.json", []) if r["step"] <= state.step]

    def checkpoint():
        if PartialState().is_main_process:
            save_json(history, folder / "records.json")
            save_tensors(state.tensors(), saved)

    try:
        for record in records:
            history.append(asdict(record))
            if record.step % checkpoint_every == 0:
                checkpoint()
            yield record
    except FloatingPointError as error:
        checkpoint()
        raise FloatingPointError(f"{error}; the last good state is {saved}") from error
    except RuntimeError as error:  # CUDA's own is a subclass
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        checkpoint()
        raise MemoryError(
            f"out of memory in step {state.step + 1}; the state after step {state.step} is saved "
            f"in {saved}. To need less, {LESS_MEMORY} ({str(error).splitlines()[0]})"
        ) from error
    checkpoint()


def resume(folder, state):
    """Load the folder's checkpoint into the state, if there is one; returns the state.

    Raises ValueError for a damaged checkpoint and for one of another training.
    """
    file = Path(folder) / "checkpoint.safetensors"
    if file.exists():
        try:
            state.load(load_file(file))
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged, or of another training ({error}): delete it to begin anew"
            ) from error
    return state


def finish(folder, unet):
    """Save the result as a diffusers UNet in `folder`/unet, with LoRA fused, and drop the rest.

    A LoRA is also saved alone, in `folder`/lora. The checkpoint, six times as large, is deleted,
    and so are temporary files of killed processes. Of several processes, the main one writes and
    the others wait.
    """
    folder = Path(folder)
    main = PartialState().is_main_process
    if main and hasattr(unet, "peft_config"):
        save_lora(unet, folder / "lora")
    without_lora(unet, fuse=True)
    if main:
        save_model(unet, folder / "unet")
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        for pattern in (".tmp*", ".*.tmp", ".*.old"):  # the first is safetensors' own
            for leftover in folder.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
    PartialState().wait_for_everyone()


def with_digests(**paths):
    """Return name → "path (digest)", so that a run made from other files counts as another run.

    The digest of a run folder is that of its UNet. Paths that are not on disk stay as they are.
    """

    def label(path):
        place = Path(MODELS.get(path, path))
        if (place / "params.json").exists() and (place / "unet").is_dir():
            place = place / "unet"
        return f"{path} ({digest(place)})" if place.exists() else path

    return {name: label(path) if path else path for name, path in paths.items()}


def prompt_facts(concept_prompts):
    """Return a prompt list's path with its digest as a fact; {} if the sets' prompts are used."""
    return with_digests(concept_prompts=concept_prompts) if concept_prompts else {}


def table(folder):
    """Return the records of a run as a table: index step; columns losses, passes, seconds."""
    rows = [r | r.pop("losses") for r in read_json(Path(folder) / "records.json", [])]
    return pd.DataFrame(rows or {"step": [], "passes": [], "seconds": []}).set_index("step")


def run_to_end(folder, state, records, steps, checkpoint_every=25):
    """Run a loop to its end, from its checkpoint if it was stopped; only read a finished run.

    `state.unet` holds the result afterwards. Returns the `table` of the records.
    """
    folder = Path(folder)
    if (folder / "unet").is_dir():
        load_weights(without_lora(state.unet), folder / "unet")
        return table(folder)
    loop = run_loop(folder, resume(folder, state), records, checkpoint_every)
    silent = not PartialState().is_main_process
    bar = dict(initial=state.step, file=sys.stdout, mininterval=5, disable=silent)
    for _ in tqdm(loop, folder.name, steps, **bar):
        pass
    finish(folder, state.release())
    return table(folder)


def finished_runs(out, runs):
    """Return the comma-separated names of `runs`: finished runs below `out`, or "original".

    Raises FileNotFoundError that lists the finished runs.
    """
    names = [name.strip() for name in runs.split(",")]
    absent = [name for name in names if not (Path(out) / name / "unet").is_dir()]
    absent = [name for name in absent if name != "original"]
    if absent:
        found = sorted(folder.parent.name for folder in Path(out).glob("*/unet"))
        raise FileNotFoundError(
            f"{', '.join(absent)}: no finished run below {out}; there are: "
            f"{', '.join(found) or 'none'}. Run 20_unlearn or 21_meta_unlearn, or set another `out`"
        )
    return names


def load_run(pipe, original, out, name):
    """Load the UNet of a run below `out`; of "original", the state dict `original`.

    Returns the folder of the weights, "" for the original.
    """
    pipe.unet.load_state_dict(original)
    if name == "original":
        return ""
    load_weights(pipe.unet, f"{out}/{name}/unet")
    return f"{out}/{name}/unet"
