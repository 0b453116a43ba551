"""Meta-unlearning for text-to-image diffusion models (arXiv 2410.12777)."""
