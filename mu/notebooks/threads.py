"""Time a pass of the UNet under several thread settings, on an idle and on a busy machine.

OpenMP reads its environment once, when it starts, so every setting runs in a process of its own.
"""

import contextlib
import json
import os
import subprocess
import sys

import pandas as pd

from mu import ROOT

WAITING = {  # how threads wait for each other → environment of OpenMP
    "spin (OpenMP's default)": {"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": ""},
    "spin briefly (ours)": {},
    "sleep": {"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": "passive"},
}
PASS = """
import json, statistics, sys, time
import torch  # before mu, which would set the environment that is measured here
from mu.losses import denoising, draw_minibatch, gradients, squared_errors
from mu.models import load_pipeline
from mu.notebooks.measure import random_data

model, precision, threads, repetitions = json.loads(sys.argv[1])
torch.set_num_threads(threads)
pipe = load_pipeline(model, precision=precision)
parameters = list(pipe.unet.requires_grad_(True).parameters())
images, g = random_data(pipe, rows=16).forget, torch.Generator().manual_seed(0)
batch, times = draw_minibatch(images, pipe.scheduler, 16, g), []
for _ in range(repetitions + 1):
    began = time.perf_counter()
    gradients(squared_errors(pipe.unet, [denoising(batch)])[0], parameters)
    times.append(time.perf_counter() - began)
print(json.dumps(statistics.median(times[1:])))
"""


@contextlib.contextmanager
def busy_cores(count):
    """Keep so many cores busy for the block."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def pass_seconds(model, precision, threads, waiting, busy=0, repetitions=5):
    """Return the median seconds of a forward and backward pass of 16 rows, in a new process.

    waiting: key of WAITING. busy: number of cores that other processes keep busy meanwhile.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    for name, value in WAITING[waiting].items():
        environment[name] = value
    environment = {name: value for name, value in environment.items() if value}
    arguments = json.dumps([model, precision, threads, repetitions])
    command = [sys.executable, "-c", PASS, arguments]
    with busy_cores(busy):
        found = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
    return json.loads(found.stdout.splitlines()[-1])


def thread_table(model, precision, threads, repetitions=5, busy=1):
    """Return seconds of a pass by thread count and way of waiting, idle and with busy cores."""
    rows = []
    for count in range(1, threads + 1 if repetitions else 1):
        for waiting in WAITING if count > 1 else ["spin briefly (ours)"]:
            setting = (model, precision, count, waiting)
            row = {"threads": count, "waiting": waiting if count > 1 else "alone"}
            row["idle"] = pass_seconds(*setting, repetitions=repetitions)
            row["busy"] = pass_seconds(*setting, busy, repetitions)
            rows.append(row)
    return pd.DataFrame(rows, columns=["threads", "waiting", "idle", "busy"])
