"""The meta gradient: what an attack, simulated from θ, would end with, and how θ should change for it."""

import torch

from mu.objectives import gradients


def descend(parameters, gradient, optimizer):
    """One step of the optimiser along a gradient, in place."""
    for p, g in zip(parameters, gradient, strict=False):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def inner_step(parameters, loss, optimizer, scale=1.0, check=None):
    """One step of fine-tuning in place: the same for the simulated attack, the real one and the CLEAN one. Returns the loss before it.

    scale: of the loss, see `mu.objectives.gradients`. check: a function of the gradient that may raise, before anything has moved."""
    gradient = gradients(loss, parameters, scale)
    if check is not None:
        check(gradient)
    descend(parameters, gradient, optimizer)
    return loss.detach()


def angle(parameters, losses, scale=1.0):
    """(inner product, cosine) of the gradients of two losses, functions without arguments, at the parameters' present values. Below 0, a small step of SGD that lowers the one
    raises the other; to first order, ζ τ times the inner product is what self-destruction adds to the objective (arXiv 2410.12777, section 3). scale: see `mu.objectives.gradients`."""
    one, other = (gradients(loss(), parameters, scale) for loss in losses)
    product = sum(torch.sum(a.float() * b.float()) for a, b in zip(one, other, strict=False)).item()
    norms = [torch.nn.utils.get_total_norm(g).item() for g in (one, other)]
    return product, product / max(norms[0] * norms[1], torch.finfo(torch.float32).tiny)


def expansion(parameters, forget, related, gradient_norm=0.0, alignment=0.0):
    """What the meta objective is to first order, taken by itself: gradient_norm · ‖∇L(forget)‖² + alignment · ⟨∇L(forget), ∇L(related)⟩, sums over all parameters (section 3 of
    arXiv 2410.12777 has them with the factors τ and ζ τ), and its exact gradient, by differentiating twice.

    forget, related: functions without arguments, each a loss at the parameters' present values. Returns value (float), list of gradients."""
    one = gradients(forget(), parameters, create_graph=True)
    other = gradients(related(), parameters, create_graph=True) if alignment else one

    def product(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=False))

    value = gradient_norm * product(one, one) + alignment * product(one, other)
    return value.item(), [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, gradients(value, parameters, allow_unused=True), strict=False)
    ]


def eight_bit(name):
    """An optimiser of bitsandbytes, whose moments take one byte each. Raises ImportError with the command that installs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "8-bit Adam needs bitsandbytes: pip install bitsandbytes (or this project's extra `gpu`), or choose adamw, adam or sgd"
        ) from error
    return getattr(bitsandbytes.optim, name)


def make_inner_optimizer(name, parameters):
    """torch's SGD or Adam, or Adam in 8 bits, built once; `meta_gradient` sets its learning rate and clears its state for each simulated attack."""
    kinds = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.0, fused=True),
        "adam": lambda: torch.optim.Adam(parameters, lr=0.0, fused=True),
        "adam8bit": lambda: eight_bit("Adam8bit")(parameters, lr=0.0),
    }
    if name not in kinds:
        raise ValueError(f"unknown inner optimiser {name!r}: allowed are {', '.join(kinds)}")
    return kinds[name]()


def meta_gradient(
    parameters, inner_losses, outer_loss, optimizer, lr, order="first", snapshot=None, scale=1.0
):
    """∇_θ of outer_loss(θ_FT), θ_FT = θ after one `inner_step` for each of `inner_losses`.

    parameters: the trained tensors, holding θ; they hold θ again, bit for bit, when this returns.
    inner_losses: M functions without arguments, each the loss of one simulated step at the parameters' present values.
    outer_loss: a function without arguments, evaluated at θ_FT.
    order="first": the gradient at θ_FT stands for the gradient at θ (FOMAML). order="second": exact through SGD,
    v ← v − τ ∇²L_m(θ_m) v for m = M … 1, each a Hessian-vector product; θ_m is found again by repeating the first m − 1 steps,
    so that memory does not depend on M (at the cost of M(M − 1)/2 more passes).
    snapshot: the device that keeps θ meanwhile, by default the parameters' own; "cpu" spares a GPU one copy of them.
    scale: of the losses, see `mu.objectives.gradients`.
    Returns outer loss, list of gradients. Raises ValueError for another order, or the second with another optimiser than SGD."""
    if order not in ("first", "second"):
        raise ValueError(f"unknown order {order!r}: allowed are first, second")
    if order == "second" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            "order='second' is exact through SGD only: use inner_optimizer='sgd', or order='first'"
        )
    start = [p.detach().to(snapshot or p.device, copy=True) for p in parameters]

    def replay(m):
        optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = lr
        for loss in inner_losses[:m]:
            inner_step(parameters, loss(), optimizer, scale)

    @torch.no_grad()
    def restore():
        torch._foreach_copy_(parameters, start)

    try:
        replay(len(inner_losses))
        loss = outer_loss()
        gradient = gradients(loss, parameters, scale)
        for m in reversed(range(len(inner_losses))) if order == "second" else ():
            restore()
            replay(m)
            inner = gradients(inner_losses[m](), parameters, create_graph=True)
            product = gradients(inner, parameters, grad_outputs=gradient, allow_unused=True)
            gradient = [
                v if h is None else v - lr * h for v, h in zip(gradient, product, strict=False)
            ]
    finally:
        restore()
        optimizer.state.clear()
    return loss.detach(), gradient
