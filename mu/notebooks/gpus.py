"""A GPU for each job: Snakemake counts them, but does not say which is whose."""

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout


def visible():
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use: those that a scheduler has given it, or else all of the machine."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [
            name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()
        ]
    from torch.cuda import device_count  # here: torch takes seconds to import

    return [str(i) for i in range(device_count())]


@contextlib.contextmanager
def one_gpu(folder, names):
    """The first of the GPUs `names` that no other process holds, for the block: by a lock on <folder>/gpu-<name>.lock, which ends with its process at the latest.

    Raises RuntimeError where all are taken: as many jobs as there are GPUs is for the one to see to who starts the jobs."""
    with contextlib.ExitStack() as held:
        for name in names:
            with contextlib.suppress(Timeout):
                held.enter_context(
                    FileLock(Path(folder) / f"gpu-{name.replace('/', '-')}.lock", timeout=0)
                )
                break
        else:
            raise RuntimeError(
                f"all GPUs ({', '.join(names) or 'there is none'}) are taken by other notebooks: start fewer at once (Snakemake: --resources gpu={len(names)})"
            )
        yield name
