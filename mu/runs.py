"""Run folders: parameters, checkpoints, metrics with their protocol. Files are complete or absent, never half written."""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from mu.files import read_json, save_json, save_tensors
from mu.models import without_lora
from mu.publish.weights import save_model

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
