"""Meta-unlearning for text-to-image diffusion models (arXiv 2410.12777)."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or each import warns that torchvision is missing, which nothing here needs
