"""Run folders: parameters, checkpoints, metrics with their protocol. Files are complete or absent, never half written."""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from mu import ROOT
from mu.models import without_lora


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, which takes its place only when the block succeeds. A full disk is said so."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt too
        temporary.unlink(missing_ok=True)
        if "No space left" in str(error) or getattr(error, "errno", None) == 28:
            raise OSError(
                28,
                f"the disk is full: {path} was not written, what was there before is whole; free space and run again",
            ) from error
        raise


def read_json(path, default=None):
    """The value in a JSON file, or `default` where there is no file."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else default


def save_json(value, path):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def fill(document, text, mark="figures"):
    """Put text between `<!-- mark -->` and `<!-- /mark -->` of a Markdown file: measured figures are written, never typed.

    Raises ValueError for a file without the two marks."""
    document, (start, end) = Path(document), (f"<!-- {mark} -->\n", f"<!-- /{mark} -->")
    old = document.read_text()
    if not 0 <= old.find(start) < old.find(end):
        raise ValueError(
            f"{document} has no place for figures: it needs the lines {start.strip()} and {end}"
        )
    with atomic(document) as temporary:
        temporary.write_text(old[: old.index(start)] + start + text + old[old.index(end) :])


def save_tensors(tensors, path):
    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)


ASIDE = "aside"  # where stale runs go; no name of a run


def put_aside(folder):
    """Move a run to `aside`/<its name>-<number> beside it: out of the way, and not lost. Returns the new place."""
    folder = Path(folder)
    places = (folder.parent / ASIDE / f"{folder.name}-{n}" for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    place.parent.mkdir(exist_ok=True)
    return folder.rename(place)


def open_run(folder, params, how=None):
    """The folder of one run. Made with its params.json, or the one of an earlier call with the same parameters.

    how: parameters of where and how it is computed, which do not change the numbers but by rounding (micro-batches, snapshot, …): these may differ from an
    earlier call's, and take their place. Raises ValueError that names the first parameter that differs: a folder holds one run. Only where the environment says
    MU_STALE=aside, as a walk does which makes a changed cell again, is it `put_aside`, and a new one begun."""
    folder = Path(folder)
    params, how = json.loads(json.dumps([params, how or {}]))
    file = folder / "params.json"
    earlier = read_json(file, params)
    earlier.pop("how", None)
    for name in sorted(earlier.keys() | params.keys()):
        if earlier.get(name) != params.get(name):
            differs = f"{folder} holds a run with {name}={earlier.get(name)!r}, asked for is {params.get(name)!r}"
            if os.environ.get("MU_STALE") != ASIDE:
                raise ValueError(f"{differs}: name another folder, or delete this one")
            print(f"{differs}: it was put aside, {put_aside(folder)}")
            break
    wanted = params | ({"how": how} if how else {})
    if read_json(file) != wanted:
        save_json(wanted, file)
    return folder


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


def forget_paths(folder):
    """Take out of the configs below a folder where the parts were loaded from: a path of somebody's machine has no place in a published model."""
    for file in [*Path(folder).rglob("config.json"), *Path(folder).glob("model_index.json")]:
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def save_model(model, folder):
    """Save a model or pipeline of diffusers or transformers as the folder, which appears whole, in place of an earlier one."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    forget_paths(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


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


def digest(path):
    """Short sha256 of a file, or of all files below a folder."""
    sha = hashlib.sha256()
    for file in sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()):
        sha.update(file.name.encode())
        with open(file, "rb") as f:  # in pieces: weights may be larger than the memory
            while piece := f.read(2**22):
                sha.update(piece)
    return sha.hexdigest()[:12]


def protocol(**facts):
    """The card that goes with every number: what was asked, plus versions, machine and commit."""
    git = (
        shutil.which("git")
        and subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    )
    return facts | {
        "versions": {
            name: version(name)
            for name in ("torch", "diffusers", "transformers", "accelerate", "safetensors")
        },
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": git or "not a git checkout",
    }
