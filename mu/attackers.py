"""Simulated attackers: data, steps, optimizer, and what the objective measures afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from mu.losses import Minibatch, denoising, squared_errors, weighted_sum
from mu.meta import meta_gradient
from mu.optimizers import make_optimizer
from mu.parallel import Runtime


@dataclass(frozen=True)
class Inner:
    """How the simulated attackers fine-tune. Pairs and lists are drawn anew at each outer step."""

    steps: int | tuple[int, int] = (5, 9)  # M; (low, high): uniform
    lr: float | tuple[float, float] = (2e-4, 8e-4)  # τ; (low, high): log-uniform
    optimizer: str | tuple[str, ...] = ("adam",)  # sgd, adam, adamw, adam8bit; several: one of them
    batch_size: int = 8  # images per step
    order: str = "first"  # first (FOMAML), or second: exact through SGD
    bound: float = 1.0  # do not push a loss at θ_FT above this value


@dataclass(frozen=True)
class Attacker:
    """A simulated fine-tuning of θ to θ_FT, and what the objective measures there.

    The outer objective gets Σ weight · L_name(θ_FT) over `measured`, and −weight · L_name(θ) for
    the related and unrelated sets: a bracket L(θ_FT) − L(θ), exactly 0 at θ_FT = θ.
    """

    trains_on: str  # the set it fine-tunes on: forget (the attack) or unrelated (CLEAN)
    measured: dict[str, float]  # set → weight of its loss at θ_FT; negative: maximised


class Simulation(NamedTuple):
    """All random choices of one simulated fine-tuning."""

    batches: list[Minibatch]  # one per inner step, of the attacker's set
    outer: dict[str, Minibatch]  # set → minibatch of the loss at θ_FT, the one used at θ
    attacker: Attacker
    optimizer: str
    lr: float


def draw_choice(value, generator, log=False):
    """Draw from a (low, high) pair, or one of several names; return a single value as it is.

    Integers are uniform, with `log` numbers are log-uniform.
    """
    if not isinstance(value, (tuple, list)):
        return value
    if isinstance(value[0], str):
        return value[int(torch.randint(len(value), (), generator=generator))]
    low, high = value
    u = torch.rand((), generator=generator).item()
    return low * (high / low) ** u if log else low + int(u * (high - low + 1))


class Simulator:
    """Runs simulated fine-tunings of one UNet; holds their optimizers, built once."""

    def __init__(self, unet, parameters, inner: Inner, runtime: Runtime):
        self.unet, self.parameters, self.inner, self.runtime = unet, parameters, inner, runtime
        names = [inner.optimizer] if isinstance(inner.optimizer, str) else inner.optimizer
        self.optimizers = {name: make_optimizer(name, parameters, lr=0.0) for name in names}

    def draw(self, attacker: Attacker, draw_batch: Callable, retained: dict, generator):
        """Draw a simulation. draw_batch: set name → minibatch. The order of draws is fixed."""
        steps = draw_choice(self.inner.steps, generator)
        batches = [draw_batch(attacker.trains_on) for _ in range(steps)]
        outer = retained | {"forget": draw_batch("forget")}
        optimizer = draw_choice(self.inner.optimizer, generator)
        lr = draw_choice(self.inner.lr, generator, log=True)
        return Simulation(batches, outer, attacker, optimizer, lr)

    def gradient(self, simulation: Simulation):
        """Return the gradient in θ of the weighted losses at θ_FT, and these losses by name."""
        measured, losses = simulation.attacker.measured, {}
        terms = [denoising(simulation.outer[name], name, w) for name, w in measured.items()]

        def outer_loss():
            found = squared_errors(self.unet, terms, self.runtime.accumulation)
            losses.update(zip(measured, found, strict=True))
            bound = self.inner.bound
            bounded = [
                x.clamp(max=bound) if t.weight < 0 else x for t, x in zip(terms, found, strict=True)
            ]
            return weighted_sum(terms, bounded)

        def inner_loss(batch):
            return squared_errors(self.unet, [denoising(batch)], self.runtime.accumulation)[0]

        _, gradient = meta_gradient(
            self.parameters,
            [partial(inner_loss, batch) for batch in simulation.batches],
            outer_loss,
            self.optimizers[simulation.optimizer],
            simulation.lr,
            self.inner.order,
            self.runtime,
        )
        return gradient, {f"{name} after": loss.item() for name, loss in losses.items()}
