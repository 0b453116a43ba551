"""Meta-unlearning for text-to-image diffusion models (arXiv 2410.12777)."""

import logging
import os
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository: data/, notebooks/, reports/

# Threads that spin while they wait starve each other as soon as another process needs a core; a
# short spin costs little on an idle machine (measured in 85_benchmark). Read when torch loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Each import would warn that torchvision is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Progress bars are text, which executed notebooks keep: no widgets are missing.
warnings.filterwarnings("ignore", message="IProgress not found")
# peft imports it if it is installed; it would ask for CPU kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
