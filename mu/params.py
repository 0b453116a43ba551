"""Run folders: the parameters in params.json, and the facts that go with results."""

import itertools
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from mu import ROOT
from mu.devices import cpu_name, resolve_precision
from mu.files import read_json, save_json

ASIDE = "aside"  # folder of replaced runs; no run has this name


def put_aside(folder):
    """Move a run to aside/<its name>-<number> beside it. Return the new place."""
    folder = Path(folder)
    places = (folder.parent / ASIDE / f"{folder.name}-{n}" for n in itertools.count(1))
    place = next(place for place in places if not place.exists())
    place.parent.mkdir(exist_ok=True)
    return folder.rename(place)


def open_run(folder, params, runtime=None):
    """Return the folder of one run, created with params.json unless it exists.

    runtime: parameters that change results by rounding only (micro-batches, snapshot, …). They may
    differ from an earlier call's and replace them.
    Raises ValueError that names the first other parameter that differs. With MU_STALE=aside in the
    environment, the old run is `put_aside` instead.
    """
    folder = Path(folder)
    params, runtime = json.loads(json.dumps([params, runtime or {}]))
    file = folder / "params.json"
    earlier = read_json(file, params)
    earlier.pop("runtime", None)
    for name in sorted(earlier.keys() | params.keys()):
        old, new = earlier.get(name), params.get(name)
        if old != new:
            differs = f"{folder} holds a run with {name}={old!r}, not the requested {new!r}"
            if os.environ.get("MU_STALE") != ASIDE:
                raise ValueError(f"{differs}: choose another folder, or delete this one")
            print(f"{differs}: moved to {put_aside(folder)}")
            break
    wanted = params | ({"runtime": runtime} if runtime else {})
    if read_json(file) != wanted:
        save_json(wanted, file)
    return folder


def protocol(**facts):
    """Return the facts with versions, machine and commit: the protocol of every result.

    Adds what precision "auto" chose as "computed_in".
    """
    if facts.get("precision") == "auto":
        facts["computed_in"] = resolve_precision("auto", PartialState().device)
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    return facts | {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit or "not a git checkout",
    }
