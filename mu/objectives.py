"""Minibatches and the losses at one set of weights: denoising, ESD; shared among processes, and taken in micro-batches."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch.utils.checkpoint import checkpoint

from mu.models import predict_noise, select, stack


@dataclass(frozen=True)
class Minibatch:
    """Everything random about a denoising loss, drawn once: used at two sets of weights it gives common random numbers."""

    noisy_latents: torch.Tensor  # (n, channels, height, width), z_t, latents × scaling_factor
    noise: torch.Tensor  # the same shape, ε
    timesteps: torch.Tensor  # (n,), integers in 0 … num_train_timesteps − 1
    conditioning: dict  # n rows


def draw_minibatch(concept_set, noise_scheduler, batch_size, generator, timestep=None):
    """Random images of a concept set with fresh noise; t uniform over the training timesteps, one from each of `batch_size` equal
    strata: the same expectation as independent draws, with far less variance, since the loss depends on t most of all. timestep: this one for all, instead."""
    n, device = concept_set.mean.shape[0], concept_set.mean.device
    index = torch.randint(
        n, (batch_size,), generator=generator
    )  # all of it on the CPU: the same numbers whatever the device
    shape = concept_set.mean[index].shape
    latents = concept_set.mean[index] + concept_set.std[index] * torch.randn(
        shape, generator=generator
    ).to(device)
    noise = torch.randn(shape, generator=generator).to(device)
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    t_max = noise_scheduler.config.num_train_timesteps
    timesteps = (strata * (t_max / batch_size)).long().clamp(max=t_max - 1).to(device)
    timesteps = timesteps if timestep is None else torch.full_like(timesteps, timestep)
    return Minibatch(
        noise_scheduler.add_noise(latents, noise, timesteps),
        noise,
        timesteps,
        select(concept_set.conditioning, concept_set.prompt[index]),
    )


def share(part, index, count):
    """The `index`-th of `count` shares of a part's rows, every `count`-th of them: small and large timesteps in each. The part may be any tuple.

    Raises ValueError where the rows cannot be shared evenly: means of means would not be the mean."""
    n = len(part[0])
    if n % count:
        raise ValueError(
            f"{n} rows cannot be shared among {count} processes or micro-batches: choose batch sizes that are multiples of processes × accumulation"
        )
    take = slice(index, None, count)
    return (
        tuple(select(x, take) if isinstance(x, dict) else x[take] for x in part)
        if count > 1
        else part
    )


def own(part):
    """This process's share of a part."""
    return share(part, PartialState().process_index, PartialState().num_processes)


def _all(unet, parts):
    """Predictions for the rows of several parts in one pass, part by part."""
    latents, timesteps, conditionings = zip(*(part[:3] for part in parts), strict=False)
    return predict_noise(
        unet, torch.cat(latents), torch.cat(timesteps), stack(*conditionings)
    ).split([len(x) for x in latents])


def squared_errors(unet, *parts, accumulation=1):
    """Mean squared error of each (noisy latents, timesteps, conditioning, target, …), all in ONE pass of the UNet. List of scalars,
    one a target: a part may carry several.

    accumulation: in so many micro-batches instead, one after the other, none of which keeps anything for its backward pass but its
    inputs: the same losses with the memory of one, at the price of another forward pass. With several processes each part holds this process's
    share; values are means over all of them, gradients this process's, to be averaged by `gradients`. Raises as `share` does."""

    def errors(*shared):
        return torch.stack(
            [
                (p.float() - target.float()).pow(2).mean()
                for p, part in zip(_all(unet, shared), shared, strict=False)
                for target in part[3:]
            ]
        )

    if accumulation == 1:
        losses = errors(*parts)
    else:
        once = (
            errors
            if not torch.is_grad_enabled()
            else lambda *shared: checkpoint(errors, *shared, use_reentrant=False)
        )
        losses = (
            sum(
                once(*(share(part, i, accumulation) for part in parts)) for i in range(accumulation)
            )
            / accumulation
        )
    if PartialState().num_processes > 1:
        losses = losses + (reduce(losses.detach(), "mean") - losses.detach())
    return list(losses)


def denoising(batch):
    """The part of L_DM = E ‖ε − ε_θ(z_t, t, c)‖² (mean over elements) for `squared_errors`."""
    return batch.noisy_latents, batch.timesteps, batch.conditioning, batch.noise


@torch.no_grad()
def predictions(unet, *parts, accumulation=1):
    """What a UNet predicts for the inputs of each of `parts`, in one pass (or `accumulation` of them), without gradient: targets of ESD, SDD and
    of retention. Tuple of tensors. Raises as `share` does."""
    if not parts:
        return ()
    if accumulation == 1:
        return _all(unet, parts)
    shares = [
        _all(unet, [share(part[:3], i, accumulation) for part in parts])
        for i in range(accumulation)
    ]
    return tuple(
        torch.stack(pieces, 1).flatten(0, 1) for pieces in zip(*shares, strict=False)
    )  # every `accumulation`-th row is of the same share


def loss_scale(precision):
    """What losses are multiplied by before their gradient is taken (`gradients`): float16 loses numbers below 6e-8, the others do not."""
    return 1024.0 if precision == "fp16" else 1.0


def gradients(loss, parameters, scale=1.0, **kwargs):
    """∇ loss, the mean over all processes; a list of tensors. Under the profiler's name for UNet passes (as `predict_noise`).

    scale: the loss is multiplied by it first and the gradient divided by it after, so that float16 does not lose small numbers."""
    with torch.profiler.record_function("unet pass"):
        found = torch.autograd.grad(loss if scale == 1 else loss * scale, parameters, **kwargs)
    if kwargs.get("create_graph"):  # to be differentiated again, on this process's rows
        return list(found)
    if scale != 1:
        torch._foreach_div_([g for g in found if g is not None], scale)
    return (
        [g if g is None else reduce(g, "mean") for g in found]
        if PartialState().num_processes > 1
        else list(found)
    )


@torch.no_grad()
def sample_trajectory(
    unet,
    noise_scheduler,
    conditioning,
    unconditional,
    generator,
    guidance=3.0,
    steps=50,
    shape=None,
    points=1,
):
    """DDIM trajectories of the student (SDD: of its teacher), one a row, each stopped at `points` random steps (ESD's z_t, t drawn inside that step's bin).

    Returns noisy latents (points · n, …) and timesteps (points · n,), all rows' first points first: a latent carries the noise level
    of the step that would come next, and t is uniform over [that step's timestep, the one before it). Costs as many guided passes
    of n rows as the latest of the drawn steps; several processes share the rows. Raises as `share` does."""
    n, device = (
        conditioning["encoder_hidden_states"].shape[0],
        conditioning["encoder_hidden_states"].device,
    )
    noise_scheduler.set_timesteps(steps)
    grid = noise_scheduler.timesteps.cpu()
    stride = noise_scheduler.config.num_train_timesteps // steps
    stop = torch.randint(steps, (points, n), generator=generator)
    latents = torch.randn((n, *shape), generator=generator) * noise_scheduler.init_noise_sigma
    timesteps = grid[stop.flatten()] + torch.randint(stride, (points * n,), generator=generator)
    latents, conditioning, stop = own((latents.to(device), conditioning, stop.T.to(device)))
    stop = stop.T
    stopped = latents.expand(points, *latents.shape).clone()
    both = stack(
        {k: v.expand(len(latents), *v.shape[1:]) for k, v in unconditional.items()}, conditioning
    )
    for i in range(int(stop.max())):
        empty, full = (
            predict_noise(
                unet, torch.cat([latents] * 2), grid[i].expand(2 * len(latents)).to(device), both
            )
            .float()
            .chunk(2)
        )
        latents = noise_scheduler.step(
            empty + guidance * (full - empty), grid[i], latents
        ).prev_sample
        stopped = torch.where((stop == i + 1)[..., None, None, None], latents, stopped)
    if PartialState().num_processes > 1:  # every process holds all rows, as every checkpoint does
        every = gather(
            stopped.transpose(0, 1).contiguous()
        )  # process by process: rows 0, k, 2k, …, then 1, k + 1, …
        stopped = (
            every.unflatten(0, (PartialState().num_processes, -1))
            .transpose(0, 1)
            .flatten(0, 1)
            .transpose(0, 1)
        )
    return stopped.flatten(0, 1), timesteps.clamp(
        max=noise_scheduler.config.num_train_timesteps - 1
    ).to(device)


def esd(empty, full, eta=1.0):
    """ESD's target for ε_θ(z_t, c): ε_0(z_t, ∅) − η [ε_0(z_t, c) − ε_0(z_t, ∅)], from the frozen UNet's two predictions (Gandikota et al. 2023)."""
    return empty - eta * (full - empty)
