"""Simulated attackers: data, steps, optimizer, and what the objective measures afterwards."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from mu.losses import Minibatch, denoising, squared_errors, weighted_sum
from mu.lowrank import LowRank
from mu.meta import meta_gradients
from mu.optimizers import make_optimizer
from mu.parallel import Runtime
from mu.pool import FullWeights, Member, Plan, Storage


@dataclass(frozen=True)
class Inner:
    """How the simulated attackers fine-tune. Pairs and lists are drawn anew at each outer step."""

    steps: int | tuple[int, int] = (5, 9)  # M; (low, high): uniform
    lr: float | tuple[float, float] = (2e-4, 8e-4)  # τ; (low, high): log-uniform
    optimizer: str | tuple[str, ...] = ("adam",)  # sgd, adam, adamw, adam8bit; several: one of them
    batch_size: int = 8  # images per step
    order: str = "first"  # first (FOMAML), or second: exact through SGD
    bound: float = 1.0  # do not push a loss at θ_FT, a mean over images, above this value
    image_bound: float = math.inf  # in place of it: nor the loss of an image above this value
    horizon: int | tuple[int, int] = 0  # H, log-uniform: restart at θ after H steps; 0: after M
    pool: int = 2  # attackers on the forget set that take turns
    one_prompt: float = 0.0  # share of these that see a single prompt
    restart_below: float = -1.0  # cosine with a fresh attack below which an attacker restarts
    restart_above: float = math.inf  # related loss at θ_FT above which an attacker restarts
    head_start: int | tuple[int, int] = 0  # steps at once when it starts, before these H; uniform
    rank: tuple[int, ...] = (0,)  # one of them, of an own LoRA; 0: it trains the full weights
    lora_lr: float | tuple[float, float] = (3e-4, 3e-3)  # as lr, of those with a LoRA


@dataclass(frozen=True)
class Attacker:
    """A simulated fine-tuning of θ to θ_FT, and what the objective measures there.

    The outer objective gets Σ weight · L_name(θ_FT) over `measured`, and −weight · L_name(θ) for
    the sets of `brackets`: a bracket L(θ_FT) − L(θ) is exactly 0 at θ_FT = θ.
    """

    trains_on: str  # the set it fine-tunes on: forget (the attack) or unrelated (CLEAN)
    measured: dict[str, float]  # set → weight of its loss at θ_FT; negative: maximised
    number: int = 0  # among the attackers on this set
    brackets: tuple[str, ...] = ()  # sets whose loss at θ is subtracted

    @property
    def bracketed(self):
        """Return set → weight of its bracket."""
        return {name: self.measured[name] for name in self.brackets}

    @property
    def slot(self):
        """Return its place in the pool."""
        return f"{self.trains_on} {self.number}"


class Simulation(NamedTuple):
    """All random choices of one outer step's simulated fine-tuning."""

    batches: list[Minibatch]  # one per inner step, of the attacker's set
    outer: dict[str, Minibatch]  # set → minibatch of the loss at θ_FT, the one used at θ
    attacker: Attacker
    member: Member


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
    """Runs simulated fine-tunings of one UNet; holds their optimizers, built once.

    state: its pool keeps the attackers that persist, and its stream "attackers" draws what they
    plan when they start anew.
    """

    def __init__(self, state, inner: Inner, runtime: Runtime):
        self.unet, self.named, self.parameters = state.unet, state.named, state.parameters
        self.pool, self.generator = state.pool, state.generators["attackers"]
        self.inner, self.runtime = inner, runtime
        self.storage = Storage(runtime.snapshot, torch.bfloat16 if runtime.half_pool else None)
        names = [inner.optimizer] if isinstance(inner.optimizer, str) else inner.optimizer
        self.optimizers = {name: make_optimizer(name, self.parameters, lr=0.0) for name in names}

    def plan(self, attacker, steps, prompt):
        """Return the `Plan` of an attacker that starts at θ, without optimizer and learning rate.

        The first horizon of a slot is cut to a random part, so that not all restart together.
        """
        inner, g = self.inner, self.generator
        if not inner.horizon:
            return Plan(steps)
        horizon = int(draw_choice(inner.horizon, g, log=True))
        if attacker.slot not in self.pool:
            horizon = max(steps, int(horizon * torch.rand((), generator=g).item()))
        plan = Plan(horizon)
        if attacker.trains_on == "forget":
            plan.images = self.draw_images(prompt)
            plan.rank = inner.rank[int(torch.randint(len(inner.rank), (), generator=g))]
            plan.seed = int(torch.randint(2**31, (), generator=g)) if plan.rank else 0
        return plan

    def draw_images(self, prompt):
        """Return the images that an attacker has: of one prompt, or [] for all."""
        share, g = self.inner.one_prompt, self.generator
        if not share or torch.rand((), generator=g).item() >= share:
            return []
        only = prompt[int(torch.randint(len(prompt), (), generator=g))]
        return torch.nonzero(prompt == only).flatten().tolist()

    def draw(self, attacker: Attacker, draw_batch: Callable, retained: dict, prompt, generator):
        """Draw a simulation. The order of draws is fixed.

        draw_batch: set name, indices of its images or () for all → minibatch. prompt: (images,),
        index of each forget image's prompt.
        """
        steps = draw_choice(self.inner.steps, generator)
        member = self.pool.get(attacker.slot)
        if starts := member is None or member.finished:
            member = Member(self.plan(attacker, steps, prompt))
        if self.inner.horizon:
            self.pool[attacker.slot] = member
        if starts and self.inner.horizon and self.inner.head_start:
            steps = max(steps, draw_choice(self.inner.head_start, self.generator))
            member.plan.horizon += steps
        steps = min(steps, member.plan.horizon - member.steps)
        batches = [draw_batch(attacker.trains_on, member.plan.images) for _ in range(steps)]
        outer = retained | {"forget": draw_batch("forget", ())}
        if starts:
            member.plan.optimizer = draw_choice(self.inner.optimizer, generator)
            lr = self.inner.lora_lr if member.plan.rank else self.inner.lr
            member.plan.lr = draw_choice(lr, generator, log=True)
        return Simulation(batches, outer, attacker, member)

    def attack(self, member):
        """Return the fine-tuning of a member, or None for one that starts and ends at θ."""
        if member.plan.rank:
            return LowRank(member, self.named, self.storage)
        if not self.inner.horizon:
            return None
        optimizer = self.optimizers[member.plan.optimizer]
        return FullWeights(member, self.parameters, optimizer, self.storage)

    def destroyed(self, simulation, losses):
        """Return whether an attack on the concept has destroyed itself: it teaches no more."""
        on_concept = simulation.attacker.trains_on == "forget" and "related" in losses
        return on_concept and losses["related"].item() > self.inner.restart_above

    def gradients(self, simulation: Simulation, terms):
        """Return gradients in θ of the terms at θ_FT, and the terms' losses by name.

        There is one gradient of the terms that are maximised (or only recorded, at weight 0), and
        one of those that are minimised; either is None without such terms. Moves the simulation's
        member on by its inner steps. A member that has finished, has destroyed itself, or has a
        loss that is not finite, starts anew at its next visit.
        """
        losses, member = {}, simulation.member
        groups = [t for t in terms if t.weight <= 0], [t for t in terms if t.weight > 0]

        def outer_loss(group):
            found = squared_errors(self.unet, group, self.runtime.accumulation)
            losses.update(zip([term.name for term in group], found, strict=True))
            return weighted_sum(group, found)

        def inner_loss(batch):
            return squared_errors(self.unet, [denoising(batch)], self.runtime.accumulation)[0]

        attack = self.attack(member)
        found = meta_gradients(
            self.parameters,
            [partial(inner_loss, batch) for batch in simulation.batches],
            [partial(outer_loss, group) for group in groups if group],
            getattr(attack, "optimizer", None) or self.optimizers[member.plan.optimizer],
            member.plan.lr,
            self.inner.order,
            self.runtime,
            attack,
        )
        member.steps += len(simulation.batches)
        finite = all(math.isfinite(loss.item()) for loss in losses.values())
        if member.finished or self.destroyed(simulation, losses) or not finite:
            member.finish()
        remaining = iter(gradient for _, gradient in found)
        of_groups = [next(remaining) if group else None for group in groups]
        return of_groups, {f"{name} after": loss.item() for name, loss in losses.items()}
