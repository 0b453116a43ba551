"""Meta-unlearning for text-to-image diffusion models (arXiv 2410.12777)."""

import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # or each import warns that torchvision is missing, which nothing here needs
warnings.filterwarnings(
    "ignore", message="IProgress not found"
)  # bars are text, so that executed notebooks keep them: no widgets are missing
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # peft imports it where it is installed, and it would ask for CPU kernels that nothing here uses

ROOT = Path(__file__).parent.parent  # of the repository: data/, notebooks/, reports/
