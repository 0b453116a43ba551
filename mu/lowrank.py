"""A simulated attacker with a LoRA of its own, without adapters in the UNet."""

import torch

from mu.optimizers import make_optimizer
from mu.pool import keep_moments, load_moments

ADAPTED = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


class LowRank:
    """The fine-tuning of a member that trains δ = B A on the attention's matrices.

    It is its own optimizer: a step turns the gradient G of a matrix into those of its factors,
    Bᵀ G and G Aᵀ, steps the factors, and sets the matrix to θ + B A. A is (rank, columns), drawn
    from N(0, 1/rank²); B is (rows, rank), 0 at first (Hu et al. 2021, as `peft` does).
    """

    def __init__(self, member, named, storage):
        self.member, self.storage = member, storage
        self.parameters = list(named.values())
        self.index = [i for i, name in enumerate(named) if name.endswith(ADAPTED)]
        if not self.index:
            raise ValueError(
                "a LoRA attacker adapts to_q, to_k, to_v and to_out.0, and the training changes "
                "none of them: set inner_rank 0, or subset f, u or x"
            )
        self.matrices = [self.parameters[i] for i in self.index]
        kept = [f.to(self.matrices[0].device, torch.float32) for f in member.coordinates]
        self.factors = [f.requires_grad_(True) for f in kept or self._first_factors()]
        self.inner = make_optimizer(member.plan.optimizer, self.factors, member.plan.lr)
        load_moments(self.inner, self.factors, member.moments)
        self.optimizer, self.start = self, None
        self.state, self.param_groups = {}, self.inner.param_groups

    def _first_factors(self):
        rank, factors = self.member.plan.rank, []
        generator = torch.Generator().manual_seed(self.member.plan.seed)
        for p in self.matrices:
            rows, columns = p.flatten(1).shape
            first = torch.randn(rank, columns, generator=generator) / rank
            factors += [first.to(p.device), torch.zeros(rows, rank, device=p.device)]
        return factors

    def _pairs(self):
        return zip(self.factors[::2], self.factors[1::2], strict=True)

    def displacements(self):
        """Return B A of each adapted matrix."""
        shapes = [p.shape for p in self.matrices]
        return [(b @ a).view(shape) for shape, (a, b) in zip(shapes, self._pairs(), strict=True)]

    @torch.no_grad()
    def _apply(self):
        start = [self.start[i] for i in self.index]
        for p, s, delta in zip(self.matrices, start, self.displacements(), strict=True):
            p.copy_(s.to(p.device) + delta)

    def enter(self, start):
        """Move the weights from θ to θ + B A."""
        self.start = start
        self._apply()

    def leave(self, start):
        """Keep the factors and the optimizer's state."""
        self.member.coordinates = [self.storage.put(f) for f in self.factors]
        self.member.moments = keep_moments(self.inner, self.factors, self.storage)

    @torch.no_grad()
    def step(self):
        """Take one step of the factors along the gradient of the weights."""
        for p, (a, b) in zip(self.matrices, self._pairs(), strict=True):
            gradient = p.grad.flatten(1).float()
            a.grad, b.grad = b.T @ gradient, gradient @ a.T
        self.inner.step()
        self._apply()

    def zero_grad(self, set_to_none=True):
        """Drop the gradients of factors and weights."""
        self.inner.zero_grad(set_to_none)
        for p in self.parameters:
            p.grad = None


def displacement(member, named):
    """Return a member's δ as one tensor per trained weight."""
    if not member.plan.rank:
        return member.coordinates
    full = [torch.zeros_like(p, requires_grad=False) for p in named.values()]
    attack = LowRank(member, named, None)
    with torch.no_grad():
        for i, delta in zip(attack.index, attack.displacements(), strict=True):
            full[i] = delta
    return full
