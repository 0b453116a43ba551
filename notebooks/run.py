"""What Snakemake starts for each notebook. By hand: `python -m mu.notebooks.run`."""

import contextlib
import os
import sys
from pathlib import Path

from mu.notebooks.gpus import one_gpu, visible
from mu.notebooks.run import execute

job = snakemake  # noqa: F821, Snakemake provides it
os.environ |= {
    "OMP_NUM_THREADS": str(job.threads),
    "MU_STALE": "aside",
}  # the notebook's kernel inherits them; see `mu.params.open_run`
try:
    several = (
        visible() if job.resources.get("gpu") == 1 else []
    )  # a scheduler that has chosen one leaves nothing to choose
    with (
        one_gpu(Path(job.output[0]).parent, several)
        if len(several) > 1
        else contextlib.nullcontext() as gpu
    ):
        os.environ |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        execute(job.input.notebook, job.params.output, job.params.parameters, again=True)
except (OSError, ValueError, TypeError, RuntimeError) as error:
    sys.exit(f"\nerror: {error}\n")
except KeyboardInterrupt:
    sys.exit(f"\nstopped {job.input.notebook}; the same command goes on from here\n")
