"""Assign a GPU to each job: Snakemake counts GPUs, but does not choose them."""

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout


def visible_gpus():
    """Return the names of this process's GPUs in CUDA_VISIBLE_DEVICES; if unset, of all GPUs."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [name.strip() for name in names if name.strip()]
    from torch.cuda import device_count  # here: torch takes seconds to import

    return [str(i) for i in range(device_count())]


@contextlib.contextmanager
def one_gpu(folder, names):
    """Hold the first free GPU of `names` during the block; yields its name.

    The lock is <folder>/gpu-<name>.lock; it is released when its process ends. Raises RuntimeError
    if no GPU is free: the caller must not start more jobs than GPUs.
    """
    for name in names:
        lock = FileLock(Path(folder) / f"gpu-{name.replace('/', '-')}.lock", timeout=0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            break
    else:
        taken = ", ".join(names) or "there is none"
        raise RuntimeError(
            f"all GPUs ({taken}) are taken by other notebooks: start fewer at once "
            f"(Snakemake: --resources gpu={len(names)})"
        )
    try:
        yield name
    finally:
        lock.release()
