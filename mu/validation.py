"""The defender's own test of a training: fresh attacks from the averaged weights."""

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
    """Fresh attacks on the defender's images, and when they count as having broken an image.

    One attack has all images of the forget set, the other those of one prompt, as HRM-m and HRM-s
    have. Neither the images nor the prompts of the attacks that are reported are used.
    """

    every: int = 30  # outer steps between two validations; 0: never
    depths: tuple[int, ...] = (50, 100)  # steps of an attack after which losses are measured
    lr: float = 6e-5  # of its Adam
    batch_size: int = 4
    images: int = 48  # per set, with fixed noise and timesteps
    broken: float = 0.3  # growth of its loss from which an image counts as broken
    tolerance: float = 0.5  # growth of a loss at θ, relative to the original's, that is allowed
    seed: int = 77

    def check(self, runtime):
        """Raise ValueError for what cannot run, before the first step is taken."""
        if self.every and min(self.depths, default=0) < 1:
            raise ValueError(
                f"validation: depths {list(self.depths)} are no numbers of steps: give one or more "
                "from 1 on, such as [50, 100]"
            )
        shards = PartialState().num_processes * runtime.accumulation
        if self.every and self.batch_size % shards:
            raise ValueError(
                f"validation: batch_size {self.batch_size} does not divide into {shards} equal "
                f"shards: choose a multiple of {shards}"
            )

    def attacks(self, forget):
        """Return attack → images that it fine-tunes on; one attack if all have the same prompt."""
        only = forget.prompt[self.seed % len(forget.prompt)]
        part = torch.nonzero(forget.prompt == only).flatten()
        if len(part) == len(forget.prompt):
            return {"all images": forget}
        return {"all images": forget, "one prompt": forget.subset(part)}


class Found(NamedTuple):
    """What a validation found, on fixed images, noise and timesteps."""

    before: dict[str, torch.Tensor]  # set → loss of each image at θ
    after: dict[tuple[str, int], dict]  # attack and its steps → set → loss of each image
    cosines: dict[str, float]  # slot → of a member's displacement and that of the nearest attack
    passes: int

    def share(self, where, name, growth):
        """Return the share of images of a set whose loss an attack has raised by `growth`."""
        return (self.after[where][name] > self.before[name] + growth).float().mean().item()

    def broken(self, name, growth):
        """Return the mean `share` of all attacks and depths."""
        shares = [self.share(where, name, growth) for where in self.after]
        return sum(shares) / len(shares)

    def losses(self, growth):
        """Return what a record shows, by name."""
        out = {}
        for name in FIXED:
            after = [found[name].mean().item() for found in self.after.values()]
            out[f"validation {name}"] = self.before[name].mean().item()
            out[f"validation {name} after"] = sum(after) / len(after)
        out["validation broken"] = self.broken("related", growth)
        out["validation unrelated broken"] = self.broken("unrelated", growth)
        for attack, step in self.after:
            share = self.share((attack, step), "related", growth)
            out[f"validation broken, {attack}, {step}"] = share
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


def fresh_attack(state, images, noise_scheduler, validation, runtime):
    """Fine-tune the weights that the defender trains; yields the steps done at each depth.

    The draws are the same each time.
    """
    generator = torch.Generator().manual_seed(validation.seed + 1)
    optimizer = make_optimizer("adam", state.parameters, validation.lr)
    for step in range(1, max(validation.depths) + 1):
        batch = draw_minibatch(images, noise_scheduler, validation.batch_size, generator)
        (loss,) = squared_errors(state.unet, [denoising(local_shard(batch))], runtime.accumulation)
        inner_step(state.parameters, loss, optimizer, runtime.loss_scale)
        if step in validation.depths:
            yield step


def member_cosines(state, start):
    """Return slot → cosine of a member's displacement and that of the weights from `start`."""
    moved = [p.detach() - s for p, s in zip(state.parameters, start, strict=True)]
    members = {slot: m for slot, m in state.pool.items() if m.coordinates}
    return {slot: cosine(moved, displacement(m, state.named)) for slot, m in members.items()}


def validate(state, data, noise_scheduler, validation, runtime):
    """Attack the averaged weights afresh and measure; returns `Found`, and leaves θ as it was."""
    present = [p.detach().clone() for p in state.parameters]
    start = state.ema.shadow_params if state.ema else present
    batches = fixed_batches(data, noise_scheduler, validation)
    before, after, cosines = None, {}, {}
    attacks = validation.attacks(data.forget)
    try:
        for attack, images in attacks.items():
            with torch.no_grad():
                torch._foreach_copy_(state.parameters, start)
            before = before or image_losses(state.unet, batches)
            for step in fresh_attack(state, images, noise_scheduler, validation, runtime):
                after[attack, step] = image_losses(state.unet, batches)
                if step == min(validation.depths):
                    for slot, value in member_cosines(state, start).items():
                        cosines[slot] = max(value, cosines.get(slot, -1.0))
    finally:
        with torch.no_grad():
            torch._foreach_copy_(state.parameters, present)
    passes = len(attacks) * max(validation.depths) + 1 + len(after)
    return Found(before, after, cosines, passes)
