"""The meta gradient against closed forms, finite differences and plain torch."""

from functools import partial

import pytest
import tiny
import torch

from mu.controls import Controls, angle, expansion
from mu.meta import inner_step, meta_gradients
from mu.models import predict
from mu.optimizers import make_optimizer
from mu.trainable import trainable


def meta_gradient(parameters, inner, outer, *args, **options):
    """Return value and gradient of one outer loss."""
    (found,) = meta_gradients(parameters, inner, [outer], *args, **options)
    return found


def quadratics(steps, n=6):
    """Return θ, `steps` + 1 pairs (A, a), and their losses ½(θ − a)ᵀA(θ − a); the last is outer.

    The matrices A do not commute.
    """
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    pairs = []
    for _ in range(steps + 1):
        root = randn(n, n)
        pairs.append((root @ root.T / n + torch.eye(n), randn(n)))
    theta = randn(n).requires_grad_()

    def value(A, a):
        return 0.5 * (theta - a) @ A @ (theta - a)

    return theta, pairs, [partial(value, A, a) for A, a in pairs]


def sgd(parameters):
    return make_optimizer("sgd", parameters, lr=0.0)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("order", ["first", "second"])
def test_quadratic_has_the_closed_form(steps, order):
    theta, matrices, losses = quadratics(steps)
    tau, start = 0.05, theta.detach().clone()
    *inner, outer = losses
    value, (gradient,) = meta_gradient([theta], inner, outer, sgd([theta]), tau, order)

    fine_tuned, jacobian = start.clone(), torch.eye(6, dtype=torch.float64)
    for A, a in matrices[:-1]:
        fine_tuned = a + (torch.eye(6) - tau * A) @ (fine_tuned - a)
        jacobian = (torch.eye(6) - tau * A) @ jacobian
    B, b = matrices[-1]
    at_fine_tuned = B @ (fine_tuned - b)
    expected = jacobian.T @ at_fine_tuned if order == "second" else at_fine_tuned
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(value, 0.5 * (fine_tuned - b) @ at_fine_tuned, rtol=1e-12, atol=0)
    assert torch.equal(theta, start)
    if order == "second" and steps:  # the two orders must differ
        assert (expected - at_fine_tuned).norm() > 0.01 * expected.norm()


def test_the_expansion_and_the_angle_have_their_closed_forms():
    """Quadratics have the gradient A(θ − a).

    That of ‖A(θ − a)‖² is 2A²(θ − a), that of ⟨A(θ − a), B(θ − b)⟩ is AB(θ − b) + BA(θ − a).
    """
    theta, ((A, a), (B, b)), (forget, related) = quadratics(1)
    one, other = A @ (theta.detach() - a), B @ (theta.detach() - b)
    value, (gradient,) = expansion([theta], forget, related, Controls(0.7, -0.3))
    assert value == pytest.approx((0.7 * one @ one - 0.3 * one @ other).item(), rel=1e-12)
    expected = 1.4 * A @ one - 0.3 * (A @ other + B @ one)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    product, cosine = angle([theta], [forget, related])
    assert product == pytest.approx((one @ other).item(), rel=1e-5)
    expected = torch.nn.functional.cosine_similarity(one, other, 0).item()
    assert cosine == pytest.approx(expected, rel=1e-5)
    assert angle([theta], [forget, forget])[1] == pytest.approx(1, rel=1e-6)
    assert angle([theta], [forget, lambda: -forget()])[1] == pytest.approx(-1, rel=1e-6)


def unet_losses(unet, n):
    """Return n float64 denoising losses on fixed noise, as functions without arguments."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def loss(z, noise, t, c):
        return (predict(unet, z, t, c) - noise).pow(2).mean()

    made = []
    for _ in range(n):
        z, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8)
        t = torch.randint(1000, (2,), generator=g)
        made.append(partial(loss, z, noise, t, {"encoder_hidden_states": randn(2, 5, 16)}))
    return made


@pytest.fixture
def unet64():
    return tiny.make_unet().double()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def shift(parameters, start, direction, size):
    """Set parameters to start + size · direction, in place."""
    with torch.no_grad():
        for p, s, d in zip(parameters, start, direction, strict=True):
            p.copy_(s + size * d)


@pytest.mark.parametrize("subset", ["f", "x"])
def test_second_order_equals_finite_differences_on_a_unet(unet64, subset):
    parameters, tau = list(trainable(unet64, subset).values()), 0.3
    *inner, outer = unet_losses(unet64, 4)
    optimizer = sgd(parameters)
    _, second = meta_gradient(parameters, inner, outer, optimizer, tau, "second")
    _, first = meta_gradient(parameters, inner, outer, optimizer, tau, "first")

    start = [p.detach().clone() for p in parameters]

    def objective(direction, size):
        shift(parameters, start, direction, size)
        plain = torch.optim.SGD(parameters, lr=tau)
        for loss in inner:
            plain.zero_grad()
            loss().backward()
            plain.step()
        return outer().item()

    g = torch.Generator().manual_seed(5)
    random = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    # the direction that a missing Hessian term changes most
    gap = [s - f for s, f in zip(second, first, strict=True)]
    for direction in (second, gap, random):
        direction = [d / flat(direction).norm() for d in direction]
        numeric = (objective(direction, 1e-5) - objective(direction, -1e-5)) / 2e-5
        analytic = (flat(direction) @ flat(second)).item()
        assert abs(numeric - analytic) < 1e-6 * flat(second).norm()
    assert flat(gap).norm() > 1e-3 * flat(second).norm()


def test_first_order_is_second_order_without_the_hessian_term(unet64):
    parameters, tau = list(trainable(unet64, "f").values()), 0.3
    inner, outer = unet_losses(unet64, 2)
    optimizer = sgd(parameters)
    _, second = meta_gradient(parameters, [inner], outer, optimizer, tau, "second")
    _, first = meta_gradient(parameters, [inner], outer, optimizer, tau, "first")

    # H v by differences of plain gradients along v
    start, norm = [p.detach().clone() for p in parameters], flat(first).norm()
    v = [f / norm for f in first]

    def gradient_at(size):
        shift(parameters, start, v, size)
        return flat(torch.autograd.grad(inner(), parameters))

    hessian_term = tau * (gradient_at(1e-4) - gradient_at(-1e-4)) / 2e-4 * norm
    expected, atol = flat(first) - hessian_term, 1e-6 * norm.item()
    torch.testing.assert_close(flat(second), expected, rtol=0, atol=atol)
    assert hessian_term.norm() > 1e-3 * norm


def test_first_order_is_the_gradient_after_plain_adam(unet64):
    """Each of two simulated attacks starts with fresh moments, as a new torch.optim.Adam does."""
    inner, inner2, outer = unet_losses(unet64, 3)
    parameters = list(trainable(unet64, "f").values())
    optimizer = make_optimizer("adam", parameters, lr=0.0)
    inner_step(parameters, inner2(), optimizer)  # at learning rate 0 it changes only the moments
    meta_gradient(parameters, [inner2, inner], outer, optimizer, 3e-3)
    inner_step(parameters, inner2(), optimizer)
    value, gradient = meta_gradient(parameters, [inner, inner2, inner], outer, optimizer, 1e-3)
    assert not optimizer.state

    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    for loss in (inner, inner2, inner):
        adam.zero_grad()
        loss().backward()
        adam.step()
    expected = outer()
    assert torch.equal(value, expected)
    assert torch.equal(flat(gradient), flat(torch.autograd.grad(expected, parameters)))


@pytest.mark.parametrize("name, reference", [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_inner_step_is_a_plain_step_and_returns_the_loss_before_it(name, reference):
    expected, _, losses = quadratics(3)
    optimizer, values = reference([expected], lr=0.1, fused=True), []
    for loss in losses:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item())

    theta, _, losses = quadratics(3)
    optimizer, found = make_optimizer(name, [theta], lr=0.0), []
    optimizer.param_groups[0]["lr"] = 0.1
    for loss in losses:
        value = inner_step([theta], loss(), optimizer)
        assert not value.requires_grad
        assert theta.grad is None
        found.append(value.item())
    assert torch.equal(theta, expected)
    assert found == values


@pytest.mark.parametrize(
    "order, optimizer", [("first", "sgd"), ("first", "adam"), ("second", "sgd")]
)
def test_the_weights_are_untouched(unet64, order, optimizer):
    parameters = list(trainable(unet64, "f").values())
    before, moved = tiny.weights(unet64), []
    *inner, outer = unet_losses(unet64, 4)

    def outer_loss():
        moved.append((tiny.weights(unet64) - before).norm())
        return outer()

    optimizer = make_optimizer(optimizer, parameters, lr=0.0)
    meta_gradient(parameters, inner, outer_loss, optimizer, 0.1, order)
    assert moved[0] > 0.01
    assert torch.equal(tiny.weights(unet64), before)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("call", range(11))
def test_the_weights_are_untouched_when_a_loss_raises(order, call):
    """The failing call is one of the attack, the outer loss, a replay, or a product."""
    theta, _, losses = quadratics(3)
    start, calls = theta.detach().clone(), []

    def failing(loss):
        def evaluate():
            calls.append(1)
            if len(calls) == call + 1:
                raise FloatingPointError("out")
            return loss()

        return evaluate

    *inner, outer = map(failing, losses)
    optimizer = sgd([theta])
    # attack and outer loss; Hessian-vector products; replays of 2, 1 and 0 steps
    total = 4 if order == "first" else 4 + 3 + 3
    if call < total:
        with pytest.raises(FloatingPointError, match="out"):
            meta_gradient([theta], inner, outer, optimizer, 0.1, order)
    else:
        meta_gradient([theta], inner, outer, optimizer, 0.1, order)
        assert len(calls) == total
    assert torch.equal(theta, start)
    assert theta.grad is None
    assert not optimizer.state


def test_memory_of_the_second_order_does_not_depend_on_the_number_of_steps():
    """Memory is the peak number of tensors that autograd keeps alive."""

    class Kept:
        alive = peak = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Kept.alive += 1
            Kept.peak = max(Kept.peak, Kept.alive)

        def __del__(self):
            Kept.alive -= 1

    peaks = []
    for steps in (1, 2, 6):
        theta, _, (*inner, outer) = quadratics(steps)
        Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            meta_gradient([theta], inner, outer, sgd([theta]), 0.01, "second")
        assert Kept.alive == 0
        peaks.append(Kept.peak)
    assert peaks[0] > 0
    assert peaks[1] == peaks[2]


def test_unknown_orders_and_optimizers_are_refused():
    theta, _, (inner, outer) = quadratics(1)
    with pytest.raises(ValueError, match="'third': choose first or second"):
        meta_gradient([theta], [inner], outer, sgd([theta]), 0.1, "third")
    adam = make_optimizer("adam", [theta], lr=0.0)
    with pytest.raises(ValueError, match="second.*SGD.*inner_optimizer sgd"):
        meta_gradient([theta], [inner], outer, adam, 0.1, "second")
    with pytest.raises(ValueError, match="'rmsprop': choose adamw, adam, sgd"):
        make_optimizer("rmsprop", [theta], lr=0.0)
