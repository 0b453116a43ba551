"""Optimizers by name, and one step along a given gradient."""

import torch

OPTIMIZERS = ("adamw", "adam", "sgd", "adamw8bit", "adam8bit")


def make_optimizer(name, parameters, lr, weight_decay=1e-4):
    """Return an optimizer of torch, or of bitsandbytes with moments of one byte each.

    weight_decay: for adamw and adamw8bit; the others have none. Raises ValueError for an unknown
    name, ImportError if bitsandbytes is missing.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, fused=True)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose {', '.join(OPTIMIZERS)}")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError(
            f"{name} needs bitsandbytes: `pip install bitsandbytes`, or choose adamw, adam or sgd"
        ) from error
    if name == "adam8bit":
        return optim.Adam8bit(parameters, lr=lr)
    return optim.AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)


def descend(parameters, gradient, optimizer):
    """Take one step of the optimizer along a gradient, in place."""
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
