"""The gradient of a loss after a simulated fine-tuning of θ (MAML-style)."""

import torch

from mu.losses import gradients
from mu.optimizers import descend
from mu.parallel import Runtime


def inner_step(parameters, loss, optimizer, scale=1.0, check=None):
    """Take one step of fine-tuning in place: simulated attack, real attack and CLEAN alike.

    scale: of the loss, see `mu.losses.gradients`. check: called with the gradient before any
    weight moves; may raise. Returns the loss before the step.
    """
    gradient = gradients(loss, parameters, scale)
    if check is not None:
        check(gradient)
    descend(parameters, gradient, optimizer)
    return loss.detach()


def check_order(order, optimizer, attack):
    """Raise ValueError for an unknown order, and where the second is not exact."""
    if order not in ("first", "second"):
        raise ValueError(f"unknown order {order!r}: choose first or second")
    if order == "second" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError("order 'second' is exact through SGD only: choose inner_optimizer sgd")
    if order == "second" and attack is not None:
        raise ValueError(
            "order 'second' is exact for attacks that start at θ only: choose horizon 0, or order "
            "first"
        )


def through_step(gradient, parameters, loss, lr):
    """Return v − τ ∇²L v: a gradient v after an SGD step on L becomes the one before it."""
    inner = gradients(loss, parameters, create_graph=True)
    product = gradients(inner, parameters, grad_outputs=gradient, allow_unused=True)
    pairs = zip(gradient, product, strict=True)
    return [v if h is None else v - lr * h for v, h in pairs]


def meta_gradients(
    parameters, inner_losses, outer_losses, optimizer, lr, order="first", runtime=None, attack=None
):
    """Return (value at θ_FT, gradient in θ) of each outer loss.

    θ_FT is θ after one step per inner loss.

    parameters: the trained tensors. They hold θ, bit for bit, before and after.
    inner_losses: M functions without arguments, each the loss of one simulated step.
    outer_losses: functions without arguments, called at θ_FT.
    order: "first" takes the gradient at θ_FT for that at θ (FOMAML). "second" is exact through
    SGD: `through_step` for m = M … 1. Each θ_m is recomputed, so memory does not depend on M, at
    the cost of M(M − 1)/2 more passes.
    attack: goes on from an earlier call (`mu.pool.FullWeights`, `mu.lowrank.LowRank`): θ_FT is
    then θ + δ after the steps, and the attack keeps the new δ. None: it starts at θ.
    Raises ValueError as `check_order` does.
    """
    runtime = runtime or Runtime()
    check_order(order, optimizer, attack)
    start = [p.detach().to(runtime.snapshot or p.device, copy=True) for p in parameters]

    def replay(m):
        optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = lr
        if attack is not None:
            attack.enter(start)
        for loss in inner_losses[:m]:
            inner_step(parameters, loss(), optimizer, runtime.loss_scale)

    @torch.no_grad()
    def restore():
        torch._foreach_copy_(parameters, start)

    try:
        replay(len(inner_losses))
        if attack is not None and inner_losses:
            attack.leave(start)
        values, found = [], []
        for outer_loss in outer_losses:
            loss = outer_loss()
            values.append(loss.detach())
            found.append(gradients(loss, parameters, runtime.loss_scale))
        for m in reversed(range(len(inner_losses))) if order == "second" else ():
            restore()
            replay(m)
            found = [through_step(v, parameters, inner_losses[m](), lr) for v in found]
    finally:
        restore()
        optimizer.state.clear()
    return list(zip(values, found, strict=True))
