"""Simulated attackers that persist: δ, optimizer state, and when they start anew at θ."""

import json
from dataclasses import asdict, dataclass, field

import torch


@dataclass
class Plan:
    """What an attacker draws when it starts at θ."""

    horizon: int  # steps after which it starts anew
    images: list = field(default_factory=list)  # indices of those it trains on; empty: all
    rank: int = 0  # of its LoRA; 0: it trains the weights themselves
    seed: int = 0  # of its LoRA's first factors
    optimizer: str = ""
    lr: float = 0.0


@dataclass
class Member:
    """A simulated attacker between two outer steps: its weights are θ + δ, with δ = 0 at first.

    coordinates: δ, one tensor per trained weight, or the factors of a LoRA. moments: the
    optimizer's state of each of them. Both are empty before the first and after the last step.
    """

    plan: Plan
    steps: int = 0  # of fine-tuning, since it started at θ
    coordinates: list = field(default_factory=list)
    moments: list = field(default_factory=list)

    @property
    def finished(self):
        """Return whether the next visit starts anew."""
        return self.steps >= self.plan.horizon

    def finish(self):
        """Drop δ, so that the next visit starts anew."""
        self.steps = self.plan.horizon
        self.coordinates, self.moments = [], []


class Pool(dict):
    """Members by slot, such as "forget 0"; part of the state of a training."""

    def tensors(self):
        """Return a flat dict of tensors that `load` restores."""
        out = {}
        for slot, member in self.items():
            facts = json.dumps({"steps": member.steps, "plan": asdict(member.plan)})
            out[f"{slot}/facts"] = torch.tensor(list(facts.encode()), dtype=torch.uint8)
            for i, value in enumerate(member.coordinates):
                out[f"{slot}/coordinates/{i:04}"] = value.detach()
            for i, moments in enumerate(member.moments):
                for key, value in moments.items():
                    out[f"{slot}/moments/{i:04}/{key}"] = torch.as_tensor(value)
        return out

    def load(self, tensors):
        """Restore saved members."""
        self.clear()
        for name in sorted(tensors):  # facts come after coordinates and before moments
            slot, kind, *rest = name.split("/")
            member = self.setdefault(slot, Member(Plan(0)))
            if kind == "facts":
                facts = json.loads(bytes(tensors[name].tolist()))
                member.plan, member.steps = Plan(**facts["plan"]), facts["steps"]
            elif kind == "coordinates":
                member.coordinates.append(tensors[name].clone())
            else:
                while len(member.moments) <= int(rest[0]):
                    member.moments.append({})
                member.moments[int(rest[0])][rest[1]] = tensors[name].clone()


@dataclass(frozen=True)
class Storage:
    """Where and how exactly the pool is kept between two visits of a member."""

    device: str | None = None  # None: the weights' own
    dtype: torch.dtype | None = None  # of δ and of the moments; None: the weights' own

    def put(self, value):
        """Return a tensor as it is kept; counters of steps keep their dtype."""
        if not torch.is_tensor(value):
            return value
        halve = self.dtype and value.is_floating_point() and value.ndim
        return value.detach().to(self.device, self.dtype if halve else value.dtype)


def load_moments(optimizer, parameters, moments):
    """Give an optimizer the states that `keep_moments` returned."""
    for p, state in zip(parameters, moments, strict=False):
        if state:
            optimizer.state[p] = {key: _restored(value, p) for key, value in state.items()}


def keep_moments(optimizer, parameters, storage):
    """Return an optimizer's states of tensors, as they are kept."""
    states = [optimizer.state.get(p, {}) for p in parameters]
    return [{key: storage.put(value) for key, value in state.items()} for state in states]


def _restored(value, p):
    if not torch.is_tensor(value) or not value.ndim:
        return value
    return value.to(p.device, p.dtype if value.is_floating_point() else value.dtype)


class FullWeights:
    """The fine-tuning of a member that trains the same weights as the defender."""

    def __init__(self, member, parameters, optimizer, storage):
        self.member, self.parameters = member, parameters
        self.optimizer, self.storage = optimizer, storage

    @torch.no_grad()
    def enter(self, start):
        """Move the weights from θ to θ + δ; give the optimizer its state."""
        for p, delta in zip(self.parameters, self.member.coordinates, strict=False):
            p.add_(delta.to(p.device, p.dtype))
        load_moments(self.optimizer, self.parameters, self.member.moments)

    @torch.no_grad()
    def leave(self, start):
        """Keep δ, the difference of the weights to θ, and the optimizer's state."""
        pairs = zip(self.parameters, start, strict=True)
        self.member.coordinates = [self.storage.put(p - s.to(p.device)) for p, s in pairs]
        self.member.moments = keep_moments(self.optimizer, self.parameters, self.storage)
