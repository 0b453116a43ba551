"""The defender's own test of a training: a fresh attack from the averaged weights."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import PartialState

from mu.losses import denoising, draw_minibatch, image_losses, squared_errors
from mu.lowrank import displacement
from mu.meta import inner_step
from mu.optimizers import make_optimizer
from mu.parallel import local_shard

FIXED = ("related", "unrelated", "forget")


@dataclass(frozen=True)
class Validation:
    """A fresh attack on the defender's images, and when it counts as having broken an image.

    Neither the images nor the prompts of the attack that is reported are used.
    """

    every: int = 30  # outer steps between two validations; 0: never
    steps: int = 50  # of the attack
    lr: float = 6e-5  # of its Adam
    batch_size: int = 4
    images: int = 48  # per set, with fixed noise and timesteps
    broken: float = 3.0  # growth of its loss, as a factor, from which an image counts as broken
    tolerance: float = 0.2  # growth of a loss at θ, relative to the original's, that is allowed
    seed: int = 77

    def check(self, runtime):
        """Raise ValueError for a batch that does not divide, before the first step is taken."""
        shards = PartialState().num_processes * runtime.accumulation
        if self.every and self.batch_size % shards:
            raise ValueError(
                f"validation: batch_size {self.batch_size} does not divide into {shards} equal "
                f"shards: choose a multiple of {shards}"
            )


class Found(NamedTuple):
    """What a validation found, on fixed images, noise and timesteps."""

    before: dict[str, torch.Tensor]  # set → loss of each image at θ
    after: dict[str, torch.Tensor]  # set → the same after the attack
    cosines: dict[str, float]  # slot → of the displacements of the attack and of the pool's member
    passes: int

    def broken(self, name, factor):
        """Return the share of images of a set whose loss the attack multiplies by `factor`."""
        return (self.after[name] > factor * self.before[name]).float().mean().item()

    def losses(self, factor):
        """Return what a record shows, by name."""
        out = {}
        for name in FIXED:
            out[f"validation {name}"] = self.before[name].mean().item()
            out[f"validation {name} after"] = self.after[name].mean().item()
        out["validation broken"] = self.broken("related", factor)
        return out | {f"validation cosine {slot}": value for slot, value in self.cosines.items()}


def fixed_batches(data, noise_scheduler, validation):
    """Return the minibatches on which losses are measured, the same at each validation."""
    generator = torch.Generator().manual_seed(validation.seed)
    sets = {name: data.concept_set(name) for name in FIXED} | {"forget": data.forget}
    return {
        name: draw_minibatch(images, noise_scheduler, validation.images, generator)
        for name, images in sets.items()
    }


def cosine(one, other):
    """Return the cosine of two lists of tensors; 0 where one of them is 0."""
    pairs = zip(one, other, strict=True)
    product = sum(torch.sum(a * b.to(a.device, a.dtype)) for a, b in pairs).item()
    norms = [torch.nn.utils.get_total_norm(x).item() for x in (one, other)]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def validate(state, data, noise_scheduler, validation, runtime):
    """Attack the averaged weights afresh and measure; returns `Found`, and leaves θ as it was.

    The attack trains the weights that the defender trains, on the forget set. Its draws are the
    same each time.
    """
    parameters, unet = state.parameters, state.unet
    present = [p.detach().clone() for p in parameters]
    start = state.ema.shadow_params if state.ema else present
    batches = fixed_batches(data, noise_scheduler, validation)
    generator = torch.Generator().manual_seed(validation.seed + 1)
    optimizer = make_optimizer("adam", parameters, validation.lr)
    try:
        if state.ema is not None:
            state.ema.copy_to(parameters)
        before = image_losses(unet, batches)
        for _ in range(validation.steps):
            batch = draw_minibatch(data.forget, noise_scheduler, validation.batch_size, generator)
            term = denoising(local_shard(batch))
            (loss,) = squared_errors(unet, [term], runtime.accumulation)
            inner_step(parameters, loss, optimizer, runtime.loss_scale)
        after = image_losses(unet, batches)
        moved = [p.detach() - s for p, s in zip(parameters, start, strict=True)]
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, present)
    members = {slot: m for slot, m in state.pool.items() if m.coordinates}
    cosines = {slot: cosine(moved, displacement(m, state.named)) for slot, m in members.items()}
    return Found(before, after, cosines, validation.steps + 2)
