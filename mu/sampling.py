"""Sample images with a pipeline."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mu.models import predict, select, stack, target
from mu.parallel import gather_rows, local_shard
from mu.ranges import ANY, check_ranges, count

RANGES = {"sampling_guidance": ANY, "sampling_steps": count(1, 25)}


class Sampling(NamedTuple):
    """How judged images are sampled: DDIM with classifier-free guidance."""

    guidance: float = 5.0  # scale; 1 is none
    steps: int = 25


def images_per_batch(pipe):
    """Return how many images fit into the memory of 64 latents of 16 × 16."""
    return max(1, 64 * 16**2 // pipe.unet.config.sample_size**2)


@torch.no_grad()
def draw_images(pipe, conditioning, unconditional, seeds, guidance=5.0, steps=25, batch_size=64):
    """Return images (n, 3, height, width) in [0, 1], one per row of `conditioning`.

    Runs the pipeline's own sampler. Each image starts from its own seed and so does not depend on
    its batch. guidance: scale w of ε(∅) + w · [ε(c) − ε(∅)]; 1 is none. unconditional: one row.
    Raises ValueError for a number outside its range.
    """
    names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    check_ranges({"sampling_guidance": guidance, "sampling_steps": steps}, RANGES)
    pipe.to(pipe.unet.device)
    images = []
    for index in torch.arange(len(seeds)).split(batch_size):
        embeds = {}
        for name in names.keys() & conditioning.keys():
            embeds[names[name]] = conditioning[name][index]
            embeds[f"negative_{names[name]}"] = unconditional[name].expand_as(embeds[names[name]])
        generators = [torch.Generator().manual_seed(int(seeds[i])) for i in index]
        options = dict(guidance_scale=guidance, num_inference_steps=steps, output_type="latent")
        options["height"] = options["width"] = pipe.unet.config.sample_size * pipe.vae_scale_factor
        latents = pipe(**embeds, generator=generators, **options).images.to(pipe.vae.dtype)
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        images.append(pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu())
    return torch.cat(images)


@dataclass(frozen=True)
class Trajectory:
    """How the points z_t of ESD's and SDD's losses are sampled."""

    guidance: float = 3.0  # scale
    steps: int = 20  # DDIM steps
    reuse: int = 8  # training steps that share one batch of trajectories


def predict_guided(unet, latents, t, both, guidance):
    """Return ε(∅) + w · [ε(c) − ε(∅)], in one pass (v in place of ε for v-models).

    both: conditioning of twice as many rows as latents, the empty prompts first.
    """
    timesteps = t.expand(2 * len(latents)).to(latents.device)
    predicted = predict(unet, torch.cat([latents] * 2), timesteps, both).float()
    without, full = predicted.chunk(2)
    return without + guidance * (full - without)


@torch.no_grad()
def sample_trajectory(
    unet, noise_scheduler, conditioning, unconditional, generator, trajectory, shape
):
    """Sample DDIM trajectories, one per row, each stopped at `trajectory.reuse` random steps.

    A latent carries the noise level of the step that would come next; t is uniform between that
    step's timestep and the one before it. Costs as many guided passes as the latest drawn step.
    Returns latents (reuse · n, …) and timesteps (reuse · n,), all rows' first points first.
    Processes share the rows. Raises ValueError as `mu.parallel.shard` does.
    """
    encoded, reuse = conditioning["encoder_hidden_states"], trajectory.reuse
    n, device = len(encoded), encoded.device
    noise_scheduler.set_timesteps(trajectory.steps)
    grid, t_max = noise_scheduler.timesteps.cpu(), noise_scheduler.config.num_train_timesteps
    stop = torch.randint(trajectory.steps, (reuse, n), generator=generator)
    latents = torch.randn((n, *shape), generator=generator) * noise_scheduler.init_noise_sigma
    offset = torch.randint(t_max // trajectory.steps, (reuse * n,), generator=generator)
    timesteps = (grid[stop.flatten()] + offset).clamp(max=t_max - 1).to(device)

    latents, stop = local_shard(latents.to(device)), local_shard(stop.T.to(device)).T
    n, stopped = len(latents), latents.expand(reuse, *latents.shape).clone()
    both = with_empty(local_shard(conditioning), unconditional)
    for i in range(int(stop.max())):
        guided = predict_guided(unet, latents, grid[i], both, trajectory.guidance)
        latents = noise_scheduler.step(guided, grid[i], latents).prev_sample
        reached = (stop == i + 1)[..., None, None, None]
        stopped = torch.where(reached, latents, stopped)
    stopped = gather_rows(stopped.transpose(0, 1)).transpose(0, 1)
    return stopped.flatten(0, 1), timesteps


def with_empty(conditioning, unconditional):
    """Return a conditioning of twice as many rows: the empty prompt for each, then its own."""
    n = len(conditioning["encoder_hidden_states"])
    empty = {name: value.expand(n, *value.shape[1:]) for name, value in unconditional.items()}
    return stack(empty, conditioning)


@torch.no_grad()
def sample_latents(unet, noise_scheduler, conditioning, unconditional, latents, sampling):
    """Sample by guided DDIM from initial `latents`; returns those of the pictures, (n, …).

    Rows go 8 at a time.
    """
    noise_scheduler.set_timesteps(sampling.steps)
    sampled = []
    for index in torch.arange(len(latents)).split(8):
        z, both = latents[index], with_empty(select(conditioning, index), unconditional)
        for t in noise_scheduler.timesteps:
            guided = predict_guided(unet, z, t, both, sampling.guidance)
            z = noise_scheduler.step(guided, t, z).prev_sample
        sampled.append(z)
    return torch.cat(sampled)


@torch.no_grad()
def prompt_gains(unet, noise_scheduler, conditioning, unconditional, latents, noises):
    """Return (n,): how much each picture's prompt c helps `unet` to denoise it.

    The gain is 1 − L(z; c) / L(z; ∅), a mean over timesteps in the middle of equal strata, one for
    each row of `noises`. As in a diffusion classifier (arXiv 2303.16203), it is positive where the
    picture shows what c asks for, and about 0 or negative where it does not. Rows go 8 at a time.
    """
    t_max, gains = noise_scheduler.config.num_train_timesteps, []
    for index in torch.arange(len(latents)).split(8):
        z, both, gain = latents[index], with_empty(select(conditioning, index), unconditional), 0.0
        for k, noise in enumerate(noises):
            t = torch.tensor(int(t_max * (k + 0.5) / len(noises)), device=z.device)
            drawn = (z, noise.expand_as(z), t.expand(len(z)))
            noisy = noise_scheduler.add_noise(*drawn)
            wanted = target(noise_scheduler, *drawn)
            predicted = predict(unet, torch.cat([noisy] * 2), t.expand(2 * len(z)), both)
            losses = (predicted.float() - torch.cat([wanted] * 2)).pow(2).flatten(1).mean(1).cpu()
            without, full = losses.chunk(2)
            gain = gain + (1 - full / without) / len(noises)
        gains.append(gain)
    return torch.cat(gains)
