"""What Snakemake starts for each notebook. By hand: `python -m mu.notebooks`."""

import os
import sys

from mu.notebooks import execute

job = snakemake  # noqa: F821, Snakemake provides it
os.environ["OMP_NUM_THREADS"] = str(job.threads)  # the notebook's kernel inherits it
try:
    execute(job.input.notebook, job.params.output, job.params.parameters, again=True)
except (OSError, ValueError, TypeError, RuntimeError) as error:
    sys.exit(f"\nerror: {error}\n")
except KeyboardInterrupt:
    sys.exit(f"\nstopped {job.input.notebook}; the same command goes on from here\n")
