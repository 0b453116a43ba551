"""Share rows among processes and micro-batches."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce


@dataclass(frozen=True)
class Runtime:
    """How a step is computed; changes results by rounding only."""

    accumulation: int = 1  # micro-batches per pass: less memory, one more forward pass each
    snapshot: str | None = None  # device that holds theta during a simulated attack; None: its own
    half_pool: bool = False  # keep attackers that persist in bfloat16: half the memory, rounded
    loss_scale: float = 1.0  # float16 loses gradients below 6e-8; see `mu.losses.gradients`


def shard(value, index, count):
    """Return every `count`-th row of a tensor, dict or named tuple of tensors, from row `index`.

    Strided shards hold small and large timesteps alike. Raises ValueError if the rows do not
    divide evenly: the mean of the shards' means would not be the mean.
    """
    if count == 1:
        return value
    if isinstance(value, dict):
        return {name: shard(rows, index, count) for name, rows in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(shard(rows, index, count) for rows in value))
    if len(value) % count:
        raise ValueError(
            f"{len(value)} rows do not divide into {count} equal shards: choose batch sizes that "
            "are multiples of processes × accumulation"
        )
    return value[index::count]


def local_shard(value):
    """Return this process's shard of the rows."""
    state = PartialState()
    return shard(value, state.process_index, state.num_processes)


def gather_rows(value):
    """Return the rows of all processes in their original order (the inverse of `local_shard`)."""
    count = PartialState().num_processes
    if count == 1:
        return value
    return gather(value.contiguous()).unflatten(0, (count, -1)).transpose(0, 1).flatten(0, 1)


def process_mean(value):
    """Return the mean of a tensor over all processes."""
    return reduce(value, "mean") if PartialState().num_processes > 1 else value


def straight_through_mean(losses):
    """Return losses with the value of all processes' mean and this process's own gradient."""
    if PartialState().num_processes == 1:
        return losses
    return losses + (process_mean(losses.detach()) - losses.detach())


def interleave(shards):
    """Return the rows of all shards of one process in their original order."""
    return torch.stack(shards, 1).flatten(0, 1)
