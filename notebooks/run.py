"""Script that Snakemake runs for each notebook. By hand: `python -m mu.notebooks.run`."""

import contextlib
import os
import sys
from pathlib import Path

from mu.notebooks.gpus import one_gpu, visible_gpus
from mu.notebooks.run import execute

job = globals()["snakemake"]  # Snakemake defines it


def choose_gpu():
    """Return a context with one of several GPUs for the job; otherwise with None."""
    gpus = visible_gpus() if job.resources.get("gpu") == 1 else []
    if len(gpus) < 2:  # none, or the scheduler has chosen
        return contextlib.nullcontext()
    return one_gpu(Path(job.output[0]).parent, gpus)


# inherited by the notebook's kernel; for MU_STALE see `mu.params.open_run`
os.environ |= {"OMP_NUM_THREADS": str(job.threads), "MU_STALE": "aside"}
try:
    with choose_gpu() as gpu:
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        execute(job.input.notebook, job.params.output, job.params.parameters, again=True)
except (OSError, ValueError, TypeError, RuntimeError) as error:
    sys.exit(f"\nerror: {error}\n")
except KeyboardInterrupt:
    sys.exit(f"\nstopped {job.input.notebook}; run the same command to resume\n")
