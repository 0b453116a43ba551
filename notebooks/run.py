"""What Snakemake starts for each notebook. By hand: `python -m mu.notebooks`."""

import os
import sys

from mu.notebooks import execute

os.environ["OMP_NUM_THREADS"] = str(snakemake.threads)  # noqa: F821, Snakemake provides it; the notebook's kernel inherits it
try:
    execute(snakemake.input.notebook, snakemake.params.output, snakemake.params.parameters, again=True)  # noqa: F821
except (OSError, ValueError, TypeError, RuntimeError) as error:
    sys.exit(f"\nerror: {error}\n")
