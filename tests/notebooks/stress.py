"""Kill notebooks at random moments, begin them again, and compare with undisturbed runs.

    python tests/notebooks/stress.py --kills 20    # as `make stress` does

Kills are SIGKILL and, every second one, SIGTERM to all processes, as a cluster sends it at the time
limit. After each no file is half written; after the second start all results are those of a run
that nothing has disturbed, to the bit.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from experiment import ATTACK, META, PROBE, SETS, TRAINING  # noqa: E402
from tiny import make_images, make_judge, make_pipeline  # noqa: E402

POOL = META | dict(steps=8, horizon=[2, 4], head_start=[0, 2], one_prompt=0.5, ema=0.5)
SEARCH = dict(at="0,1,2", seeds="0", searches="random,unlearn-diff-atk", count=2, lr=0.1)
PLACES = dict(model="../model", sets="../sets", judge="../judge", out="runs", sampling_steps=2)
PROBED = PLACES | dict(probe_seeds="2,1,1")
# In this order: each reads the results of those before it.
STEPS = {
    "20_unlearn": PROBED | TRAINING | dict(steps=8),
    "21_meta_unlearn": PROBED | POOL,
    "30_attack_finetune": PROBED | ATTACK | dict(at="0,2,4,8"),
    "31_attack_prompts": PROBED | SEARCH | dict(batch_size=2, candidates=1),
    "50_evaluate": PROBED | dict(probe_seeds="4,2,2", least=4),
}
TIMES = ("seconds", "date", "commit")  # facts that differ between equal runs


@dataclass(frozen=True)
class Outcome:
    """What one kill led to."""

    notebook: str
    signal: str
    seconds: float  # from the start to the kill
    of: float  # seconds of the undisturbed run
    faults: list  # empty if all is well


def prepare(base):
    """Write tiny random components below a folder."""
    make_pipeline(base / "model")
    make_judge().save_pretrained(base / "judge")
    for seed, (name, captions) in enumerate(SETS.items()):
        make_images(base / "sets" / name, captions, seed=seed)
    (base / "sets" / "probe.json").write_text(json.dumps(PROBE))


def start(name, folder):
    """Start a notebook in a folder; returns the process."""
    options = []
    for key, value in STEPS[name].items():
        options += ["-p", key, value if isinstance(value, str) else repr(value)]
    files = [str(ROOT / "notebooks" / f"{name}.ipynb"), f"report/{name}.ipynb"]
    return subprocess.Popen(
        [sys.executable, "-m", "mu.notebooks.run", *files, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def run(name, folder):
    """Run a notebook to its end; returns its seconds. Raises RuntimeError if it fails."""
    began, process = time.monotonic(), start(name, folder)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} failed in {folder}: {errors.decode()[-2000:]}")
    return time.monotonic() - began


def kill(process, sent):
    """Send a signal to a process and its kernels, and SIGKILL to those that live 5 seconds on."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        family = psutil.Process(process.pid).children(recursive=True)
        family.insert(0, psutil.Process(process.pid))
    for last in (sent, signal.SIGKILL):
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(last)
        if last != signal.SIGKILL:
            psutil.wait_procs(family[1:], timeout=5)
    process.communicate()


def read(file):
    """Return the content of a result; raises an error for a file that is not whole."""
    if file.suffix == ".json":
        return scrub(json.loads(file.read_text()))
    if file.suffix == ".safetensors":
        return {name: t.numpy().tobytes() for name, t in load_file(file).items()}
    if file.suffix == ".png":
        with Image.open(file) as image:
            image.load()
    return file.read_bytes()


def scrub(value):
    """Return a JSON value without what differs between equal runs."""
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items() if key not in TIMES}
    return [scrub(item) for item in value] if isinstance(value, list) else value


def results(folder):
    """Return relative path → content of all results below a folder; temporary files are hidden."""
    files = [file for file in sorted((folder / "runs").rglob("*")) if file.is_file()]
    return {str(f.relative_to(folder)): read(f) for f in files if not f.name.startswith(".")}


def differences(found, expected):
    """Return the names of results that are missing, surplus or different."""
    names = found.keys() | expected.keys()
    return [name for name in sorted(names) if found.get(name) != expected.get(name)]


def disturb(name, whole, of, sent, moment, folder):
    """Kill one notebook at a moment (0 … 1 of its time), run it again; returns the `Outcome`.

    whole: folder of the undisturbed run. of: its seconds. sent: the signal.
    """
    shutil.copytree(whole / f"before-{name}", folder)
    process = start(name, folder)
    began, wait = time.monotonic(), moment * of
    while process.poll() is None and time.monotonic() - began < wait:
        time.sleep(0.01)
    after, faults = time.monotonic() - began, []
    kill(process, sent)
    try:
        results(folder)
    except Exception as error:
        faults.append(f"half a file after the kill: {error}")
    run(name, folder)
    expected = results(whole / f"after-{name}")
    faults += [f"differs: {file}" for file in differences(results(folder), expected)]
    shutil.rmtree(folder)
    return Outcome(name, sent.name, after, of, faults)


def undisturbed(whole, names):
    """Run all steps up to the last of `names`; returns name → seconds.

    Keeps a copy of what lies there before and after each step in before-<name> and after-<name>.
    """
    work, seconds = whole / "work", {}
    work.mkdir(parents=True)
    order = list(STEPS)
    for link in ("model", "judge", "sets"):
        (whole / link).symlink_to(whole.parent / link)
    for name in order[: max(order.index(n) for n in names) + 1]:
        shutil.copytree(work, whole / f"before-{name}")
        seconds[name] = run(name, work)
        shutil.copytree(work, whole / f"after-{name}")
    return seconds


def stress(base, kills, names=tuple(STEPS), seed=0):
    """Yield the `Outcome` of each kill, one notebook after the other in turn.

    The moments are drawn from `seed`.
    """
    prepare(base)
    seconds = undisturbed(base / "whole", names)
    draw = random.Random(seed)
    for i in range(kills):
        name, sent = names[i % len(names)], (signal.SIGKILL, signal.SIGTERM)[i % 2]
        arguments = base / "whole", seconds[name], sent, draw.random(), base / f"killed-{i}"
        yield disturb(name, *arguments)


def main():
    """Print a line for each kill; exit with 1 if one has left a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, failed = parser.parse_args(), False
    print(f"{'notebook':20} {'signal':8} {'after, s':>9} {'of, s':>6}  outcome")
    with tempfile.TemporaryDirectory() as base:
        for one in stress(Path(base), options.kills, seed=options.seed):
            outcome = "; ".join(one.faults) or "nothing lost, all results equal"
            facts = f"{one.notebook:20} {one.signal:8} {one.seconds:9.1f} {one.of:6.1f}"
            print(f"{facts}  {outcome}", flush=True)
            failed |= bool(one.faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
