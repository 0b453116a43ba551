"""Parameters and protocol of a folder of results: params.json."""

import itertools
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from mu import ROOT
from mu.files import read_json, save_json

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
    MU_STALE=aside, as an experiment does which makes a changed cell again, is it `put_aside`, and a new one begun."""
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
