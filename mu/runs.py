"""Run folders: parameters, checkpoints, metrics with their protocol. Files are complete or absent, never half written."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file


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
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if "No space left" in str(error) or getattr(error, "errno", None) == 28:
            raise OSError(28, f"the disk is full: {path} was not written, what was there before is whole; free space and run again") from error
        raise


def save_json(value, path):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def save_tensors(tensors, path):
    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)


def open_run(folder, params):
    """The folder of one run. Made with its params.json, or the one of an earlier call with the same parameters.

    Raises ValueError that names the first parameter that differs: a folder holds one run."""
    folder = Path(folder)
    params = json.loads(json.dumps(params))
    file = folder / "params.json"
    if file.exists():
        earlier = json.loads(file.read_text())
        for name in sorted(earlier.keys() | params.keys()):
            if earlier.get(name) != params.get(name):
                raise ValueError(f"{folder} holds a run with {name}={earlier.get(name)!r}, asked for is {params.get(name)!r}: "
                                 "name another folder, or delete this one")
    else:
        save_json(params, file)
    return folder


def run_loop(folder, state, records, checkpoint_every=25):
    """Passes a loop's records on, and every `checkpoint_every` steps saves the state (and the records so far) in `folder`."""
    past = []
    for record in records:
        past.append(record)
        if record.step % checkpoint_every == 0:
            save_tensors(state.tensors(), Path(folder) / "checkpoint.safetensors")
        yield record


def resume(folder, state):
    """Continue from the folder's checkpoint, if there is one. Returns `state`."""
    file = Path(folder) / "checkpoint.safetensors"
    if file.exists():
        state.load(load_file(file))
    return state


def digest(path):
    """Short sha256 of a file, or of all files below a folder."""
    sha = hashlib.sha256()
    for file in sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()):
        sha.update(file.name.encode() + file.read_bytes())
    return sha.hexdigest()[:12]


def protocol(**facts):
    """The card that goes with every number: what was asked, plus versions, machine and commit."""
    root = Path(__file__).parent.parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return facts | {
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "safetensors")},
        "python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": git.stdout.strip() or "not a git checkout"}
