"""Controls without a simulated attack, and the angle of two gradients."""

from dataclasses import dataclass
from functools import partial

import torch
from accelerate import PartialState

from mu.draws import draw_pair
from mu.losses import denoising, gradients, squared_errors


@dataclass(frozen=True)
class Controls:
    """First-order terms of the meta objective taken by themselves, and what is recorded.

    The objective gets gradient_norm · ‖∇L(θ; forget)‖² + alignment · ⟨∇L(θ; forget),
    ∇L(θ; related)⟩: section 3 of arXiv 2410.12777 has them with the factors τ and ζ τ.
    """

    gradient_norm: float = 0.0
    alignment: float = 0.0
    angle_every: int = 0  # record the angle of both gradients every n steps; 0: never

    @property
    def active(self):
        """Return whether the objective has a control term."""
        return bool(self.gradient_norm or self.alignment)

    def check(self, runtime):
        """Raise ValueError where control terms are not exact."""
        if self.active and (PartialState().num_processes > 1 or runtime.loss_scale != 1):
            raise ValueError(
                "gradient_norm and alignment need one process and no float16: "
                "set processes 1 and precision no or bf16"
            )


def angle(parameters, losses, scale=1.0):
    """Return inner product and cosine of the gradients of two losses, given as functions.

    Below 0, a small SGD step that lowers one loss raises the other: to first order, ζ τ times the
    inner product is what self-destruction adds to the objective (arXiv 2410.12777, section 3).
    """
    one, other = (gradients(loss(), parameters, scale) for loss in losses)
    pairs = zip(one, other, strict=True)
    product = sum(torch.sum(a.float() * b.float()) for a, b in pairs).item()
    norms = [torch.nn.utils.get_total_norm(g).item() for g in (one, other)]
    return product, product / max(norms[0] * norms[1], torch.finfo(torch.float32).tiny)


def expansion(parameters, forget, related, controls):
    """Return value (float) and exact gradient of the control terms, by differentiating twice.

    forget, related: functions without arguments, each a loss at the present parameters.
    """

    def product(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    one = gradients(forget(), parameters, create_graph=True)
    other = gradients(related(), parameters, create_graph=True) if controls.alignment else one
    value = controls.gradient_norm * product(one, one) + controls.alignment * product(one, other)
    found = gradients(value, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return value.item(), [torch.zeros_like(p) if g is None else g for p, g in pairs]


def gradient_losses(state, batches, runtime):
    """Return each minibatch's denoising loss at θ as a function without arguments."""

    def loss(batch):
        return squared_errors(state.unet, [denoising(batch)], runtime.accumulation)[0]

    return [partial(loss, batch) for batch in batches]


def gradient_angle(state, data, objective, noise_scheduler, runtime):
    """Return inner product and cosine of the forget and related gradients, if due at this step."""
    every = objective.controls.angle_every
    if not every or state.step % every:
        return {}
    sizes = (objective.inner.batch_size, objective.retain_batch_size)
    g = state.generators["angle"]  # of its own: recording changes nothing else
    batches = draw_pair(data, objective, noise_scheduler, g, sizes)
    losses = gradient_losses(state, batches, runtime)
    product, cosine = angle(state.parameters, losses, runtime.loss_scale)
    return {"inner product": product, "cosine": cosine}


def add_controls(gradient, state, data, objective, noise_scheduler, runtime):
    """Add the control terms' gradient in place, if there are any; returns their value."""
    if not objective.controls.active:
        return {}
    sizes = (objective.inner.batch_size, objective.inner.batch_size)
    batches = draw_pair(data, objective, noise_scheduler, state.generators["meta"], sizes)
    losses = gradient_losses(state, batches, runtime)
    value, more = expansion(state.parameters, *losses, objective.controls)
    torch._foreach_add_(gradient, more)
    return {"expansion": value}
