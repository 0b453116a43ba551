"""One training on two processes, by torchrun and by accelerate: the numbers of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training import LOOP, describe, difference, result

from mu.files import read_json
from mu.models import load_pipeline
from mu.runs.train import launch, train_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CELL = """
import sys
from accelerate import notebook_launcher

def train(folder):
    from mu.runs.train import train_run
    train_run(folder)
    from accelerate import PartialState
    state = PartialState()
    line = f"process {state.process_index} of {state.num_processes}\\n"
    print(line, end="", flush=True)  # one write: both processes print at once

notebook_launcher(train, (sys.argv[1],), num_processes=2, use_port=sys.argv[2])
"""


def read_records(folder):
    return read_json(folder / "records.json")


def assert_equal_losses(one, two, rel=1e-4, absolute=None):
    for mine, theirs in zip(read_records(one), read_records(two), strict=True):
        assert theirs["losses"] == pytest.approx(mine["losses"], rel=rel, abs=absolute)


@pytest.mark.parametrize(
    "changes, tolerance, close",
    [
        (dict(method="esd-f"), 1e-4, {}),
        (dict(method="sdd"), 1e-4, {}),
        # rounding dominates a small mean square in bf16, whose spacing at 1 is 2⁻⁸
        (dict(method="sdd", precision="bf16"), 0.1, dict(rel=0.15, absolute=5e-6)),
    ],
    ids=["esd-f", "sdd", "sdd-bf16"],
)
def test_two_processes_give_the_numbers_of_one(
    changes, tolerance, close, sd_folder, training_sets, tmp_path, monkeypatch
):
    """Each process takes half of every batch, so only the order of sums differs.

    tolerance: allowed difference of the weights, relative to that of another training seed.
    """
    changes |= dict(optimizer="sgd", lr=1.0, loop=LOOP | {"order": "first"})
    one, two, other = (
        describe(tmp_path / name, sd_folder, training_sets, seed=seed, **changes)
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    train_run(one)
    train_run(other)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    history = launch(two, load_pipeline(str(sd_folder), precision="no"), processes=2)
    assert history.passes.tolist() == [r["passes"] for r in read_records(one)]
    near, far = difference(result(one), result(two)), difference(result(one), result(other))
    assert near < tolerance * far
    assert_equal_losses(one, two, **close)


def test_the_notebook_launcher_gives_the_numbers_of_one(sd_folder, training_sets, tmp_path):
    one, two = (
        describe(tmp_path / name, sd_folder, training_sets, optimizer="sgd", lr=1.0)
        for name in ("one", "two")
    )
    train_run(one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", CELL, str(two), port],
        env=os.environ | ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    # two processes that each take themselves for the only one give the same numbers
    assert "process 0 of 2" in done.stdout
    assert "process 1 of 2" in done.stdout
    assert_equal_losses(one, two)
