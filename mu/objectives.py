"""Minibatches and the losses at one set of weights: denoising, ESD."""

from dataclasses import dataclass

import torch

from mu.models import predict_noise, rows, stack


@dataclass(frozen=True)
class Minibatch:
    """Everything random about a denoising loss, drawn once: used at two sets of weights it gives common random numbers."""
    noisy_latents: torch.Tensor  # (n, channels, height, width), z_t, latents × scaling_factor
    noise: torch.Tensor  # the same shape, ε
    timesteps: torch.Tensor  # (n,), integers in 0 … num_train_timesteps − 1
    conditioning: dict  # n rows


def draw_minibatch(concept_set, noise_scheduler, batch_size, generator):
    """Random images of a concept set with fresh noise; t uniform over the training timesteps, one from each of `batch_size` equal
    strata: the same expectation as independent draws, with far less variance, since the loss depends on t most of all."""
    n = concept_set.mean.shape[0]
    index = torch.randint(n, (batch_size,), generator=generator)
    latents = concept_set.mean[index] + concept_set.std[index] * torch.randn(concept_set.mean[index].shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    t_max = noise_scheduler.config.num_train_timesteps
    timesteps = (strata * (t_max / batch_size)).long().clamp(max=t_max - 1)
    return Minibatch(noise_scheduler.add_noise(latents, noise, timesteps), noise, timesteps,
                     rows(concept_set.conditioning, concept_set.prompt[index]))


def squared_errors(unet, *parts):
    """Mean squared error of each (noisy latents, timesteps, conditioning, target, …), all in ONE pass of the UNet. List of scalars,
    one a target: a part may carry several."""
    latents, timesteps, conditionings = zip(*(part[:3] for part in parts))
    predicted = predict_noise(unet, torch.cat(latents), torch.cat(timesteps), stack(*conditionings)).split([len(x) for x in latents])
    return [(p.float() - target.float()).pow(2).mean() for p, part in zip(predicted, parts) for target in part[3:]]


def denoising(batch):
    """The part of L_DM = E ‖ε − ε_θ(z_t, t, c)‖² (mean over elements) for `squared_errors`."""
    return batch.noisy_latents, batch.timesteps, batch.conditioning, batch.noise


@torch.no_grad()
def predictions(unet_frozen, *parts):
    """What the frozen UNet predicts for the inputs of each of `parts`, in one pass: targets of ESD and of retention. Tuple of tensors."""
    if not parts:
        return ()
    latents, timesteps, conditionings = zip(*(part[:3] for part in parts))
    return predict_noise(unet_frozen, torch.cat(latents), torch.cat(timesteps), stack(*conditionings)).split([len(x) for x in latents])


def gradients(loss, parameters, **kwargs):
    """torch.autograd.grad, under the profiler's name for UNet passes (as `predict_noise`)."""
    with torch.profiler.record_function("unet pass"):
        return list(torch.autograd.grad(loss, parameters, **kwargs))


@torch.no_grad()
def sample_trajectory(unet, noise_scheduler, conditioning, unconditional, generator, guidance=3.0, steps=50, shape=None, points=1):
    """DDIM trajectories of the student, one a row, each stopped at `points` random steps (ESD's z_t, with t drawn inside that step's bin).

    Returns noisy latents (points · n, …) and timesteps (points · n,), all rows' first points first: a latent carries the noise level
    of the step that would come next, and t is uniform over [that step's timestep, the one before it). Costs as many guided passes
    of n rows as the latest of the drawn steps."""
    n = conditioning["encoder_hidden_states"].shape[0]
    noise_scheduler.set_timesteps(steps)
    grid = noise_scheduler.timesteps
    stride = noise_scheduler.config.num_train_timesteps // steps
    stop = torch.randint(steps, (points, n), generator=generator)
    latents = torch.randn((n, *shape), generator=generator) * noise_scheduler.init_noise_sigma
    stopped = latents.expand(points, *latents.shape).clone()
    both = stack({k: v.expand(n, *v.shape[1:]) for k, v in unconditional.items()}, conditioning)
    for i in range(int(stop.max())):
        empty, full = predict_noise(unet, torch.cat([latents] * 2), grid[i].expand(2 * n), both).chunk(2)
        latents = noise_scheduler.step(empty + guidance * (full - empty), grid[i], latents).prev_sample
        stopped = torch.where((stop == i + 1)[..., None, None, None], latents, stopped)
    timesteps = grid[stop.flatten()] + torch.randint(stride, (points * n,), generator=generator)
    return stopped.flatten(0, 1), timesteps.clamp(max=noise_scheduler.config.num_train_timesteps - 1)


def esd(empty, full, eta=1.0):
    """ESD's target for ε_θ(z_t, c): ε_0(z_t, ∅) − η [ε_0(z_t, c) − ε_0(z_t, ∅)], from the frozen UNet's two predictions (Gandikota et al. 2023)."""
    return empty - eta * (full - empty)
