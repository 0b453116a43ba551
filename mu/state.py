"""The resumable state of a loop: weights, optimizer, average, random streams, step."""

import contextlib
from typing import NamedTuple

import torch
from diffusers.training_utils import EMAModel

from mu.optimizers import OPTIMIZERS, descend, make_optimizer
from mu.pool import Pool
from mu.trainable import trainable

STREAMS = (
    "unlearn",
    "retain",
    "meta",
    "finetune",
    "angle",
    "attackers",
    "sampled",
)  # order fixes the seeds: append only
TRAJECTORY = ("latents", "timesteps", "prompt")


class Best(NamedTuple):
    """The best validated weights of a training."""

    score: float
    step: int
    weights: list[torch.Tensor]


class State:
    """Everything a loop needs to resume: weights, optimizer, average, random streams, step.

    unet: is trained in place. subset, rank: see `mu.trainable.trainable`. seed: of all random
    numbers, new adapters included. ema: decay of a running average of the weights, which is then
    the result (SDD's teacher); 0: none. named: name → tensor to train instead of weights of the
    UNet, such as the embedding of a word (textual inversion).
    """

    def __init__(
        self, unet, subset="f", lr=1e-5, optimizer="adamw", *, seed=0, rank=16, ema=0.0, named=None
    ):
        self.unet, self.step, self.trajectories, self.pool = unet, 0, {}, Pool()
        self.phase, self.phase_start, self.best = 0, 0, None
        if optimizer not in OPTIMIZERS:  # before the UNet gets adapters
            make_optimizer(optimizer, [], lr)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.named = named or trainable(unet, subset, rank)
        self.parameters = list(self.named.values())
        self.optimizer = make_optimizer(optimizer, self.parameters, lr)
        self.ema = EMAModel(self.parameters, decay=ema, min_decay=ema) if ema else None
        if ema:
            self.ema.optimization_step = 1  # no warm-up: the decay is constant
        # one stream per purpose: switching a term off does not change the others' draws
        seeds = {name: seed * 1000 + i for i, name in enumerate(STREAMS)}
        self.generators = {name: torch.Generator().manual_seed(n) for name, n in seeds.items()}

    def apply(self, gradient):
        """Take one optimizer step along a gradient, update the average, count the step."""
        descend(self.parameters, gradient, self.optimizer)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.step += 1

    def tensors(self):
        """Return a flat dict of tensors that `load` restores; it goes to safetensors as it is."""
        out = {"step": torch.tensor(self.step)}
        out |= {f"weights/{name}": p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                value = torch.as_tensor(value)  # bitsandbytes shares its tables qmap
                out[f"optimizer/{name}/{key}"] = value.clone() if key[:4] == "qmap" else value
        if self.ema is not None:
            average = zip(self.named, self.ema.shadow_params, strict=True)
            out |= {f"ema/{name}": p for name, p in average}
        if self.phase_start:
            out["phase"] = torch.tensor([self.phase, self.phase_start])
        if self.best:
            out["best/facts"] = torch.tensor([self.best.score, self.best.step]).double()
            pairs = zip(self.named, self.best.weights, strict=True)
            out |= {f"best/weights/{name}": p for name, p in pairs}
        out |= {f"pool/{name}": value for name, value in self.pool.tensors().items()}
        out |= {f"generator/{name}": g.get_state() for name, g in self.generators.items()}
        for use, points in self.trajectories.items():
            pairs = zip(TRAJECTORY, points, strict=True)
            out |= {f"trajectory/{use}/{name}": value for name, value in pairs}
        return out

    @torch.no_grad()
    def load(self, tensors):
        """Restore a saved state. Raises ValueError if it trains other weights."""
        names = {n.removeprefix("weights/") for n in tensors if n.startswith("weights/")}
        if differing := sorted(names ^ set(self.named)):
            raise ValueError(
                f"this checkpoint trains {len(names)} tensors, this run {len(self.named)}; "
                f"first difference: {differing[0]}"
            )
        self.step = int(tensors["step"])
        for name, p in self.named.items():
            p.copy_(tensors[f"weights/{name}"])
            prefix = f"optimizer/{name}/"
            found = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if found:
                self.optimizer.state[p] = {k: _moment(v, p.device) for k, v in found.items()}
        if self.ema is not None:
            for name, average in zip(self.named, self.ema.shadow_params, strict=True):
                average.copy_(tensors[f"ema/{name}"])
        if "phase" in tensors:
            self.phase, self.phase_start = tensors["phase"].tolist()
        if "best/facts" in tensors:
            score, step = tensors["best/facts"].tolist()
            device = self.parameters[0].device
            found = [tensors[f"best/weights/{name}"].to(device, copy=True) for name in self.named]
            self.best = Best(score, int(step), found)
        kept = {n.removeprefix("pool/"): v for n, v in tensors.items() if n.startswith("pool/")}
        self.pool.load(kept)
        for name, g in self.generators.items():
            g.set_state(tensors[f"generator/{name}"].clone())
        device = self.parameters[0].device
        for use in {n.split("/")[1] for n in tensors if n.startswith("trajectory/")}:
            found = (tensors[f"trajectory/{use}/{name}"] for name in TRAJECTORY)
            self.trajectories[use] = tuple(value.to(device, copy=True) for value in found)

    @contextlib.contextmanager
    def averaged(self):
        """Give the UNet the running average as its weights, if there is one, for the block."""
        if self.ema is None:
            yield self.unet
            return
        present = [p.detach().clone() for p in self.parameters]
        self.ema.copy_to(self.parameters)
        try:
            yield self.unet
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, present)

    @torch.no_grad()
    def restart_from_best(self):
        """Go on from the best validated average, if any, with fresh moments and attackers."""
        if self.best is None:
            return
        torch._foreach_copy_(self.parameters, self.best.weights)
        if self.ema is not None:
            torch._foreach_copy_(self.ema.shadow_params, self.best.weights)
        self.optimizer.state.clear()
        self.pool = Pool()

    def release(self):
        """Give the UNet the result as its weights; returns it.

        It is the best validated average, else the running average, else the weights as they are.
        """
        if self.best is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.best.weights)
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)
        return self.unet


def _moment(value, device):
    """Return a saved number or tensor; torch counts steps in floats, bitsandbytes in ints."""
    value = value.to(device, copy=True)
    return value.item() if value.dtype == torch.int64 and not value.ndim else value
