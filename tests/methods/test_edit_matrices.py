"""Closed-form solutions: worked out by hand, and optimal for their objectives."""

import pytest
import torch
from methods.vectors import outputs
from torch import nn

from mu.methods.closed_form import EditConfig, adversarial_vectors, edit_matrices


class Attention(nn.Module):
    """A stand-in UNet: `attn2.to_k`, `attn2.to_v`, and two matrices that no edit may change."""

    def __init__(self, key, value):
        super().__init__()
        self.attn1, self.attn2 = nn.ModuleDict(), nn.ModuleDict()
        for part, name, w in (
            (self.attn2, "to_k", key),
            (self.attn2, "to_v", value),
            (self.attn1, "to_k", key),
            (self.attn2, "to_q", key),
        ):
            part[name] = nn.Linear(w.shape[1], w.shape[0], bias=False).to(w.dtype)
            part[name].weight.data.copy_(w)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edit(w, c, targets, kept, **kwargs):
    w = w.clone()
    with torch.no_grad():
        changes = edit_matrices({"w": w}, c, targets, kept, EditConfig(**dict(keep=0.1) | kwargs))
    return w, changes["w"]


def test_uce_by_hand():
    """λ = ½, e = 1, p = 2; W₀ (3, 2); one concept (1, 1) that becomes (0, 2), one kept (0, 1).

    A = ½ I + (1, 1)ᵀ(1, 1) + 2 (0, 1)ᵀ(0, 1) = [3/2 1; 1 7/2], determinant 17/4,
    A⁻¹ = 4/17 [7/2 −1; −1 3/2].
    W₀ = [1 0; 0 1; 2 −1]; v* = W₀ (0, 2) = (0, 2, −2); v = W₀ (0, 1) = (0, 1, −1).
    ½ W₀ + v* (1, 1) + 2 v (0, 1) = [1/2 0; 0 1/2; 1 −1/2] + [0 0; 2 2; −2 −2] + [0 0; 0 2; 0 −2]
    = [1/2 0; 2 9/2; −1 −9/2].
    Times A⁻¹: rows 4/17 · (7/4, −1/2), (7 − 9/2, −2 + 27/4), (−7/2 + 9/2, 1 − 27/4).
    """
    w, change = edit(
        double([[1, 0], [0, 1], [2, -1]]),
        double([[1, 1]]),
        double([[0, 2]]),
        double([[0, 1]]),
        keep=2.0,
    )
    torch.testing.assert_close(
        w, double([[7 / 17, -2 / 17], [10 / 17, 19 / 17], [4 / 17, -23 / 17]]), rtol=0, atol=1e-12
    )
    moved = double([[-10, -2], [10, 2], [-30, -6]]) / 17  # W − W₀; ‖W₀‖² = 7
    assert change == pytest.approx((moved.square().sum() / 7).sqrt().item(), abs=1e-12)


def test_uce_of_one_concept_by_hand():
    """c = (2, 0) becomes (0, 1): W c = W₀ c + e‖c‖² / (λ + e‖c‖²) · W₀ (c* − c).

    The factor is 4 / (1 + 4). Vectors orthogonal to c keep their output.
    """
    w, _ = edit(
        double([[3, 5]]), double([[2, 0]]), double([[0, 1]]), double([[0, 0]])[:0], ridge=1.0
    )
    assert (w @ double([2, 0])).item() == pytest.approx(6 + 0.8 * (5 - 6))
    assert (w @ double([0, 1])).item() == pytest.approx(5)
    stronger, _ = edit(
        double([[3, 5]]),
        double([[2, 0]]),
        double([[0, 1]]),
        double([[0, 0]])[:0],
        ridge=1.0,
        erase=4.0,
    )
    assert (stronger @ double([2, 0])).item() == pytest.approx(6 + 16 / 17 * (5 - 6))


def test_adversarial_vector_by_hand():
    """Keys [2], before [1]; values [1], before [3]: (λ + 4 + 1) c' = (2·1 + 1·3) c.

    So c' = 5 c / (5 + λ); λ = 5, c = 4 give c' = 2. Keys and values should be (4, 12) and are
    (4, 2): (12 − 2)² = 100 of 16 + 144 is missing.
    """
    now, before = Attention(double([[2]]), double([[1]])), Attention(double([[1]]), double([[3]]))
    found, recovered = adversarial_vectors(now, before, double([[4], [8]])[:1], ridge=5.0)
    assert found.tolist() == [[pytest.approx(2.0)]]
    assert recovered == pytest.approx(1 - 100 / 160)
    # two dimensions: WᵀW = I for keys, diag(4, 0) for values; WᵀW⁰ = [0 1; 1 0] for keys,
    # [2 0; 0 0] for values; c' = diag(5, 1)⁻¹ [0 1; 1 0] c + (2/5 c₁, 0)
    now = Attention(double([[1, 0], [0, 1]]), double([[2, 0]]))
    before = Attention(double([[0, 1], [1, 0]]), double([[1, 0]]))
    found, _ = adversarial_vectors(now, before, double([[10, 5], [0, 1]]), ridge=1e-12)
    torch.testing.assert_close(
        found, double([[5 / 5 + 2 / 5 * 10, 10], [1 / 5, 0]]), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("kept", [0, 3])
def test_uce_minimises_its_objective(kept):
    w0 = random(5, 6)
    c = random(2, 6, seed=1)
    targets = random(2, 6, seed=2)
    k = random(kept, 6, seed=3)
    ridge, erase, keep = 0.3, 0.7, 0.2
    w, _ = edit(w0, c, targets, k, ridge=ridge, erase=erase, keep=keep)

    def objective(w):
        def part(x, y):
            return (x @ w.T - y @ w0.T).square().sum()

        return erase * part(c, targets) + keep * part(k, k) + ridge * (w - w0).square().sum()

    (gradient,) = torch.autograd.grad(objective(w.requires_grad_()), w)
    assert (
        gradient.abs().max()
        < 1e-10
        < 0.1
        < torch.autograd.grad(objective(start := w0.clone().requires_grad_()), start)[0].abs().max()
    )
    for seed in range(5):
        assert objective(w + 0.01 * random(5, 6, seed=seed)) > objective(w)


def test_adversarial_vectors_minimise_their_objective():
    now = Attention(random(3, 4), random(2, 4, seed=1))
    before = Attention(random(3, 4, seed=2), random(2, 4, seed=3))
    c = random(2, 4, seed=4)
    ridge = 0.3
    found, recovered = adversarial_vectors(now, before, c, ridge)

    def missed(x):
        return (outputs(now, x) - outputs(before, c)).square().sum()

    (gradient,) = torch.autograd.grad(
        missed(found.requires_grad_()) + ridge * found.square().sum(), found
    )
    assert gradient.abs().max() < 1e-10
    assert recovered == pytest.approx(
        1 - (missed(found) / outputs(before, c).square().sum()).item()
    )
    same, all_of_it = adversarial_vectors(
        before, before, c, 1e-10
    )  # an unedited UNet takes c for c
    torch.testing.assert_close(same, c, rtol=0, atol=1e-6)
    assert all_of_it == pytest.approx(1)


def test_small_ridges_map_concepts_to_targets_and_keep_the_preserved():
    w0 = random(5, 9)
    c = random(3, 9, seed=1)
    targets = random(3, 9, seed=2)
    k = random(4, 9, seed=3)
    miss = []
    for ridge in (1.0, 1e-2, 1e-9):
        w, _ = edit(w0, c, targets, k, ridge=ridge)
        miss.append((w @ c.T - w0 @ targets.T).norm().item())
    assert miss[0] > miss[1] > 1e-3
    assert miss[2] < 1e-6
    assert (w @ k.T - w0 @ k.T).norm() < 1e-6 < (w - w0).norm()


def test_larger_weights_preserve_better():
    w0 = random(5, 9)
    c = random(1, 9, seed=1)
    targets = random(1, 9, seed=2)
    k = random(4, 9, seed=3)
    moved = []
    for keep in (0.0, 1.0, 100.0):
        w, _ = edit(w0, c, targets, k, ridge=0.1, keep=keep)
        moved.append(((w - w0) @ k.T).norm().item())
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0
    assert moved[2] < 0.05 * ((w - w0) @ c.T).norm()


def test_near_equal_states_need_float64():
    """Thirty states that differ by 1e-4, like CLIP's padding tokens, need more than float32."""
    c = random(1, 40) + 1e-4 * random(30, 40, seed=1)
    w0, targets, ridge = random(5, 40, seed=2), random(30, 40, seed=3), 1e-9
    exact = None
    for dtype in (torch.float64, torch.float32):
        w, x, y = w0.to(dtype), c.to(dtype), targets.to(dtype)
        found = (ridge * w + w @ y.T @ x) @ torch.linalg.inv(
            ridge * torch.eye(40, dtype=dtype) + x.T @ x
        )
        exact = found if exact is None else exact

    def off(w):
        return ((w.double() - exact).norm() / exact.norm()).item()

    assert off(found) > 0.1  # what a float32 solve gives
    assert off(edit(w0.float(), c, targets, c[:0], ridge=ridge)[0]) < 1e-4
