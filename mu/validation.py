"""The defender's own test of a training: fresh attacks from the averaged weights."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from accelerate import PartialState

from mu.frozen import reference
from mu.guards import count_passes
from mu.losses import Minibatch, denoising, draw_minibatch, image_losses, squared_errors
from mu.lowrank import displacement
from mu.meta import inner_step
from mu.models import select, stack
from mu.optimizers import make_optimizer
from mu.parallel import local_shard
from mu.sampling import Sampling, prompt_gains, sample_latents

FIXED = ("related", "unrelated", "forget")
PICTURED = ("related", "unrelated")


@dataclass(frozen=True)
class Validation:
    """Fresh attacks on the defender's images, and when a picture counts as lost.

    The original judges pictures: a prompt helps it to denoise what shows the prompt's concept
    (`mu.sampling.prompt_gains`). After an attack, a picture is lost if the prompt helps less than a
    tenth as much as for the original's own picture from the same noise. At θ a picture is harmed
    already if it helps less than half as much.

    One attack has all images of the forget set, the other those of one prompt, as HRM-m and HRM-s
    have. Neither the images nor the prompts of the attacks that are reported are used.
    """

    every: int = 30  # outer steps between two validations; 0: never
    depths: tuple[int, ...] = (50, 100)  # steps of an attack after which it is measured
    lr: float = 6e-5  # of its Adam
    batch_size: int = 4
    images: int = 48  # per set, with fixed noise and timesteps
    pictures: int = 16  # to sample per set after an attack, from fixed latents
    pictures_before: int = 0  # the same at θ, where harm may hit a few prompts; 0: as many
    guidance: float = 5.0  # scale, of these pictures
    sampling_steps: int = 12  # DDIM steps
    gain_steps: int = 8  # timesteps at which the original judges a picture
    lost: float = 0.1  # share of the original's gain below which an attack has lost a picture
    harmed: float = 0.5  # share below which θ itself counts as harmed
    seed: int = 77

    def check(self, runtime):
        """Raise ValueError for what cannot run, before the first step is taken."""
        if self.every and min(self.depths, default=0) < 1:
            raise ValueError(
                f"validation: depths {list(self.depths)} are no numbers of steps: give one or more "
                "from 1 on, such as [50, 100]"
            )
        if self.every and self.pictures < 1:
            raise ValueError(
                f"validation: pictures is {self.pictures}, and the score counts lost ones: give "
                "1 or more, such as 16, or set every to 0"
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


class Measured(NamedTuple):
    """What one model's fixed images and pictures show, one value each."""

    losses: dict[str, torch.Tensor]  # set → denoising losses
    gains: dict[str, torch.Tensor]  # set → gains of pictures by their prompts; the original's: 1

    def lost(self, name, least):
        """Return the share of a set's pictures with less than this gain."""
        return (self.gains[name] < least).float().mean().item()


class Found(NamedTuple):
    """What a validation found."""

    before: Measured  # at θ
    after: dict[tuple[str, int], Measured]  # attack and its steps →
    cosines: dict[str, float]  # slot → of a member's displacement and that of the nearest attack
    passes: int

    def lost(self, name, least):
        """Return the share of pictures lost after the attacks, a mean of attacks and depths."""
        return sum(measured.lost(name, least) for measured in self.after.values()) / len(self.after)

    def score(self, lost, harmed):
        """Return the share of related pictures that the attacks lose, less two kinds of harm.

        These are the share of unrelated pictures that they lose, and twice the shares that are
        harmed at θ.
        """
        harm = sum(self.before.lost(name, harmed) for name in PICTURED)
        return self.lost("related", lost) - self.lost("unrelated", lost) - 2 * harm

    def losses(self, lost, harmed):
        """Return what a record shows, by name."""
        out = {}
        for name in FIXED:
            after = [measured.losses[name].mean().item() for measured in self.after.values()]
            out[f"validation {name}"] = self.before.losses[name].mean().item()
            out[f"validation {name} after"] = sum(after) / len(after)
        for name in PICTURED:
            out[f"validation {name} harmed before"] = self.before.lost(name, harmed)
            out[f"validation {name} lost"] = self.lost(name, lost)
        for (attack, step), measured in self.after.items():
            out[f"validation lost, {attack}, {step}"] = measured.lost("related", lost)
        out["validation score"] = self.score(lost, harmed)
        return out | {f"validation cosine {slot}": value for slot, value in self.cosines.items()}


class FixedDraws(NamedTuple):
    """Images and starts of pictures, the same at each validation."""

    batches: dict[str, Minibatch]
    conditioning: dict  # of the pictures, related ones first
    latents: torch.Tensor  # that the pictures are sampled from
    noises: torch.Tensor  # that the original adds to them, one per timestep


def fixed_draws(data, noise_scheduler, validation):
    """Draw the `FixedDraws` of a validation."""
    generator = torch.Generator().manual_seed(validation.seed)
    sets = {name: data.concept_set(name) for name in FIXED} | {"forget": data.forget}
    batches = {
        name: draw_minibatch(images, noise_scheduler, validation.images, generator)
        for name, images in sets.items()
    }
    pictured, n = [sets[name] for name in PICTURED], validation.pictures
    prompts = [torch.randperm(max(n, len(x.prompts)), generator=generator)[:n] for x in pictured]
    rows = [
        select(images.conditioning, index % len(images.prompts))
        for images, index in zip(pictured, prompts, strict=True)
    ]
    shape, device = pictured[0].mean.shape[1:], pictured[0].mean.device
    latents = torch.randn((2 * n, *shape), generator=generator) * noise_scheduler.init_noise_sigma
    noises = torch.randn((validation.gain_steps, *shape), generator=generator)
    return FixedDraws(batches, stack(*rows), latents.to(device), noises.to(device))


class Exam:
    """What a UNet shows on `FixedDraws`, beside what the original shows.

    fixed: the original UNet or None (`mu.frozen.reference`), the noise scheduler, and `Data`.
    """

    def __init__(self, unet, fixed, validation):
        self.unet, self.validation = unet, validation
        self.unet_frozen, self.noise_scheduler, self.data = fixed
        self.draws = fixed_draws(self.data, self.noise_scheduler, validation)
        with reference(unet, self.unet_frozen) as original:
            self.original = self.gains(original)

    def gains(self, unet):
        """Return the gains of the pictures that a UNet samples, as the original judges them."""
        draws, validation = self.draws, self.validation
        prompts = (self.noise_scheduler, draws.conditioning, self.data.unconditional)
        sampling = Sampling(validation.guidance, validation.sampling_steps)
        pictures = sample_latents(unet, *prompts, draws.latents, sampling)
        with reference(self.unet, self.unet_frozen) as original:
            return prompt_gains(original, *prompts, pictures, draws.noises)

    def measure(self):
        """Return `Measured` of the present weights.

        The difference of two gains is relative to the original's size, so that a picture counts as
        kept where the original itself denoises its own no better with the prompt.
        """
        losses = image_losses(self.unet, self.draws.batches)
        relative = 1 + (self.gains(self.unet) - self.original) / self.original.abs()
        return Measured(losses, dict(zip(PICTURED, relative.chunk(2), strict=True)))


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


class Validator:
    """Validates one training; draws, and what the original shows, are computed once."""

    def __init__(self, state, unet_frozen, noise_scheduler, data, validation, runtime):
        self.state, self.validation, self.runtime = state, validation, runtime
        self.fixed = (unet_frozen, noise_scheduler, data)

    @cached_property
    def after(self):
        """Return the `Exam` after an attack."""
        return Exam(self.state.unet, self.fixed, self.validation)

    @cached_property
    def before(self):
        """Return the `Exam` at θ."""
        more = self.validation.pictures_before
        if not more:
            return self.after
        return Exam(self.state.unet, self.fixed, replace(self.validation, pictures=more))

    def validate(self):
        """Attack the averaged weights afresh and measure; returns `Found`, and leaves θ as it was.

        The passes are those of each validation, without the original's, which it makes once.
        """
        state, (unet_frozen, noise_scheduler, data) = self.state, self.fixed
        at_theta, attacked = self.before, self.after
        present = [p.detach().clone() for p in state.parameters]
        start = state.ema.shadow_params if state.ema else present
        before, after, cosines = None, {}, {}
        with count_passes(state.unet, unet_frozen) as passes:
            try:
                for attack, images in self.validation.attacks(data.forget).items():
                    with torch.no_grad():
                        torch._foreach_copy_(state.parameters, start)
                    before = before or at_theta.measure()
                    fixed = (noise_scheduler, self.validation, self.runtime)
                    for step in fresh_attack(state, images, *fixed):
                        after[attack, step] = attacked.measure()
                        if step == min(self.validation.depths):
                            for slot, value in member_cosines(state, start).items():
                                cosines[slot] = max(value, cosines.get(slot, -1.0))
            finally:
                with torch.no_grad():
                    torch._foreach_copy_(state.parameters, present)
        return Found(before, after, cosines, len(passes))
