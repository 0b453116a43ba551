"""The meta gradient against closed forms, finite differences and plain torch."""

import pytest
import tiny
import torch

from mu.controls import Controls, angle, expansion
from mu.meta import inner_step, meta_gradient
from mu.models import predict_noise
from mu.optimizers import make_optimizer
from mu.trainable import trainable


def quadratics(steps, n=6, seed=0):
    """`steps` inner losses ½(θ−a)ᵀA(θ−a), each with its own A and a (the A do not commute), and an outer one."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps + 1):
        root = torch.randn(n, n, generator=g, dtype=torch.float64)
        found.append(
            (root @ root.T / n + torch.eye(n), torch.randn(n, generator=g, dtype=torch.float64))
        )
    theta = torch.randn(n, generator=g, dtype=torch.float64).requires_grad_()

    def value(A, a):
        return 0.5 * (theta - a) @ A @ (theta - a)

    return theta, found, [lambda Aa=Aa: value(*Aa) for Aa in found]


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("order", ["first", "second"])
def test_quadratic_has_the_closed_form(steps, order):
    theta, matrices, losses = quadratics(steps)
    tau, start = 0.05, theta.detach().clone()
    value, (gradient,) = meta_gradient(
        [theta], losses[:-1], losses[-1], make_optimizer("sgd", [theta], lr=0.0), tau, order
    )

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
    if order == "second" and steps:  # the same numbers would not do for the first order
        assert (expected - at_fine_tuned).norm() > 0.01 * expected.norm()


def test_the_expansion_and_the_angle_have_their_closed_forms():
    """For quadratics: the gradient is A(θ − a); that of ‖A(θ − a)‖² is 2A²(θ − a), and of ⟨A(θ − a), B(θ − b)⟩ it is A B(θ − b) + B A(θ − a)."""
    theta, ((A, a), (B, b)), (forget, related) = quadratics(1)
    one, other = A @ (theta.detach() - a), B @ (theta.detach() - b)
    value, (gradient,) = expansion([theta], forget, related, Controls(0.7, -0.3))
    assert value == pytest.approx((0.7 * one @ one - 0.3 * one @ other).item(), rel=1e-12)
    torch.testing.assert_close(
        gradient, 1.4 * A @ one - 0.3 * (A @ other + B @ one), rtol=1e-12, atol=1e-12
    )
    product, cosine = angle([theta], [forget, related])
    assert product == pytest.approx((one @ other).item(), rel=1e-5) and cosine == pytest.approx(
        torch.nn.functional.cosine_similarity(one, other, 0).item(), rel=1e-5
    )
    assert angle([theta], [forget, forget])[1] == pytest.approx(1, rel=1e-6) and angle(
        [theta], [forget, lambda: -forget()]
    )[1] == pytest.approx(-1, rel=1e-6)


def unet_losses(unet, n, seed=0):
    """n float64 denoising losses on fixed noise, as functions without arguments."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = []
    for _ in range(n):
        z, noise, t, c = (
            randn(2, 4, 8, 8),
            randn(2, 4, 8, 8),
            torch.randint(1000, (2,), generator=g),
            {"encoder_hidden_states": randn(2, 5, 16)},
        )
        made.append(
            lambda z=z, noise=noise, t=t, c=c: (predict_noise(unet, z, t, c) - noise).pow(2).mean()
        )
    return made


@pytest.fixture
def unet64():
    return tiny.make_unet().double()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("subset", ["f", "x"])
def test_second_order_equals_finite_differences_on_a_unet(unet64, subset):
    parameters, tau = list(trainable(unet64, subset).values()), 0.3
    *inner, outer = unet_losses(unet64, 4)
    optimizer = make_optimizer("sgd", parameters, lr=0.0)
    _, second = meta_gradient(parameters, inner, outer, optimizer, tau, "second")
    _, first = meta_gradient(parameters, inner, outer, optimizer, tau, "first")

    start = [p.detach().clone() for p in parameters]

    def objective(direction, size):
        with torch.no_grad():
            for p, s, d in zip(parameters, start, direction, strict=False):
                p.copy_(s + size * d)
        sgd = torch.optim.SGD(parameters, lr=tau)
        for loss in inner:
            sgd.zero_grad()
            loss().backward()
            sgd.step()
        return outer().item()

    g = torch.Generator().manual_seed(5)
    random = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    gap = [
        s - f for s, f in zip(second, first, strict=False)
    ]  # the direction in which a missing Hessian term shows most
    for direction in (second, gap, random):
        direction = [d / flat(direction).norm() for d in direction]
        numeric = (objective(direction, 1e-5) - objective(direction, -1e-5)) / 2e-5
        analytic = (flat(direction) @ flat(second)).item()
        assert abs(numeric - analytic) < 1e-6 * flat(second).norm()
    assert flat(gap).norm() > 1e-3 * flat(second).norm()


def test_first_order_is_second_order_without_the_hessian_term(unet64):
    parameters, tau = list(trainable(unet64, "f").values()), 0.3
    inner, outer = unet_losses(unet64, 2)
    optimizer = make_optimizer("sgd", parameters, lr=0.0)
    _, second = meta_gradient(parameters, [inner], outer, optimizer, tau, "second")
    _, first = meta_gradient(parameters, [inner], outer, optimizer, tau, "first")

    # H v by differences of plain gradients along v
    start, v = [p.detach().clone() for p in parameters], [f / flat(first).norm() for f in first]

    def gradient_at(size):
        with torch.no_grad():
            for p, s, d in zip(parameters, start, v, strict=False):
                p.copy_(s + size * d)
        return flat(torch.autograd.grad(inner(), parameters))

    hessian_term = (gradient_at(1e-4) - gradient_at(-1e-4)) / 2e-4 * flat(first).norm()
    torch.testing.assert_close(
        flat(second),
        flat(first) - tau * hessian_term,
        rtol=0,
        atol=1e-6 * flat(first).norm().item(),
    )
    assert (tau * hessian_term).norm() > 1e-3 * flat(first).norm()


def test_first_order_is_the_gradient_after_plain_adam(unet64):
    """Two simulated attacks in a row: each starts with fresh moments, as a new torch.optim.Adam does."""
    inner, inner2, outer = unet_losses(unet64, 3)
    parameters = list(trainable(unet64, "f").values())
    optimizer = make_optimizer("adam", parameters, lr=0.0)
    inner_step(
        parameters, inner2(), optimizer
    )  # at learning rate 0: leaves moments behind, and nothing else
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
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradient, torch.autograd.grad(expected, parameters), strict=False)
    )


@pytest.mark.parametrize("name, reference", [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_inner_step_is_a_plain_step_and_returns_the_loss_before_it(name, reference):
    results = []
    for plain in (True, False):
        theta, _, losses = quadratics(3)
        optimizer = (
            reference([theta], lr=0.1, fused=True)
            if plain
            else make_optimizer(name, [theta], lr=0.0)
        )
        optimizer.param_groups[0]["lr"] = 0.1
        seen = []
        for loss in losses:
            if plain:
                optimizer.zero_grad()
                value = loss()
                value.backward()
                optimizer.step()
                seen.append(value.item())
            else:
                value = inner_step([theta], loss(), optimizer)
                assert not value.requires_grad and theta.grad is None
                seen.append(value.item())
        results.append((theta.detach().clone(), seen))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize(
    "order, optimizer", [("first", "sgd"), ("first", "adam"), ("second", "sgd")]
)
def test_the_weights_are_untouched(unet64, order, optimizer):
    parameters, before, moved = list(trainable(unet64, "f").values()), tiny.weights(unet64), []
    *inner, outer = unet_losses(unet64, 4)
    meta_gradient(
        parameters,
        inner,
        lambda: moved.append((tiny.weights(unet64) - before).norm()) or outer(),
        make_optimizer(optimizer, parameters, lr=0.0),
        0.1,
        order,
    )
    assert moved[0] > 0.01 and torch.equal(tiny.weights(unet64), before)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("call", range(11))
def test_the_weights_are_untouched_when_a_loss_raises(order, call):
    """Whichever of the calls fails: the attack, the outer loss, a replay, a Hessian-vector product."""
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
    optimizer = make_optimizer("sgd", [theta], lr=0.0)
    total = (
        4 if order == "first" else 4 + 3 + 3
    )  # attack and outer loss; products; replays of 2, 1 and 0 steps
    if call < total:
        with pytest.raises(FloatingPointError, match="out"):
            meta_gradient([theta], inner, outer, optimizer, 0.1, order)
    else:
        meta_gradient([theta], inner, outer, optimizer, 0.1, order)
        assert len(calls) == total
    assert torch.equal(theta, start) and theta.grad is None and not optimizer.state


def test_memory_of_the_exact_order_does_not_depend_on_the_number_of_steps():
    """Counted in tensors that autograd keeps alive at the same time."""

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
        theta, _, losses = quadratics(steps)
        Kept.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            meta_gradient(
                [theta],
                losses[:-1],
                losses[-1],
                make_optimizer("sgd", [theta], lr=0.0),
                0.01,
                "second",
            )
        assert Kept.alive == 0
        peaks.append(Kept.peak)
    assert peaks[0] > 0 and peaks[1] == peaks[2]


def test_what_is_refused():
    theta, _, losses = quadratics(1)
    with pytest.raises(ValueError, match="'third': choose first or second"):
        meta_gradient(
            [theta], losses[:1], losses[1], make_optimizer("sgd", [theta], lr=0.0), 0.1, "third"
        )
    with pytest.raises(ValueError, match="second.*SGD.*inner_optimizer sgd"):
        meta_gradient(
            [theta], losses[:1], losses[1], make_optimizer("adam", [theta], lr=0.0), 0.1, "second"
        )
    with pytest.raises(ValueError, match="'rmsprop': choose adamw, adam, sgd"):
        make_optimizer("rmsprop", [theta], lr=0.0)
