"""Guards of the loops: values that are not finite, the norm of a gradient, the number of passes."""

import contextlib
import math
import re

import torch


@contextlib.contextmanager
def count_passes(*nets):
    """Count forward passes: yields a list that gets an entry for each."""
    passes = []
    hooks = [net.register_forward_hook(lambda *_: passes.append(1)) for net in nets if net]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def refuse_nan(losses, step, scale=1.0):
    """Raise FloatingPointError for a value that is not finite."""
    for name, value in losses.items():
        if not math.isfinite(value):
            half = f" or loss_scale ({scale:g}), or choose precision bf16 or no"
            raise FloatingPointError(
                f"{name} is {value} in step {step + 1}; the weights of step {step} are kept: lower "
                f"the learning rate, a weight or the bound{half if scale != 1 else ''}"
            )


def check_norm(gradient, state, scale):
    """Raise FloatingPointError for a gradient that is not finite."""
    norm = torch.nn.utils.get_total_norm(gradient).item()
    refuse_nan({"gradient norm": norm}, state.step, scale)


def clip_gradient(gradient, losses, largest, step, scale):
    """Clip the gradient's norm in place. Raises FloatingPointError if it or a loss is infinite."""
    norm = torch.nn.utils.get_total_norm(gradient).item()
    refuse_nan(losses | {"gradient norm": norm}, step, scale)
    torch._foreach_mul_(gradient, min(1.0, largest / (norm + 1e-6)))


def limit(gradient, other, largest):
    """Scale a gradient in place to at most `largest` times the norm of another.

    Returns both norms as they were.
    """
    norm, reference = (torch.nn.utils.get_total_norm(g).item() for g in (gradient, other))
    torch._foreach_mul_(gradient, min(1.0, largest * reference / (norm + 1e-12)))
    return norm, reference


def calm(losses, drift_bound):
    """Return min(1, drift_bound / drift), the factor by which `meta_clip` shrinks.

    The drift is the larger of two means: of what has related prompts, and of the rest. What breaks
    first are the model's own related samples, a small part of all.
    """
    related, rest = [], []
    for name, value in losses.items():
        if name.endswith(" drift"):
            (related if re.search(r"\brelated\b", name) else rest).append(value)
    largest = max((sum(part) / len(part) for part in (related, rest) if part), default=0.0)
    return drift_bound / largest if largest > drift_bound else 1.0
