"""Minibatches, terms of an objective, and their losses at one set of weights."""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from mu.models import predict, select, stack, target
from mu.parallel import interleave, process_mean, shard, straight_through_mean


class Inputs(NamedTuple):
    """Rows of a UNet pass."""

    latents: torch.Tensor  # (n, channels, height, width), z_t, latents × scaling_factor
    timesteps: torch.Tensor  # (n,), integers in 0 … num_train_timesteps − 1
    conditioning: dict  # n rows per tensor


class Minibatch(NamedTuple):
    """Inputs and target of a denoising loss; used at two sets of weights: common random numbers."""

    inputs: Inputs
    target: torch.Tensor  # ε or v, the shape of `inputs.latents`; see `mu.models.target`


class Term(NamedTuple):
    """One addend of an objective: weight · mean ‖ε_θ(inputs) − target‖², a mean over elements."""

    name: str
    weight: float
    inputs: Inputs  # terms that share one `Inputs` object share its rows of the pass
    target: torch.Tensor
    bound: float = float("inf")  # a loss above it adds no gradient
    image_bound: float = float("inf")  # nor an image's loss above this one; see `mean_square`


def draw_minibatch(concept_set, noise_scheduler, batch_size, generator, timestep=None):
    """Draw images of a concept set with fresh noise and timesteps.

    Timesteps are uniform over the training timesteps, one from each of `batch_size` equal strata:
    the expectation of independent draws with far less variance. timestep: use this one for all
    rows instead. All numbers are drawn on the CPU, so they do not depend on the device.
    """
    n, device = len(concept_set.mean), concept_set.mean.device
    index = torch.randint(n, (batch_size,), generator=generator)
    mean, std = concept_set.mean[index], concept_set.std[index]
    latents = mean + std * torch.randn(mean.shape, generator=generator).to(device)
    noise = torch.randn(mean.shape, generator=generator).to(device)
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    t_max = noise_scheduler.config.num_train_timesteps
    timesteps = (strata * (t_max / batch_size)).long().clamp(max=t_max - 1).to(device)
    if timestep is not None:
        timesteps = torch.full_like(timesteps, timestep)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    conditioning = select(concept_set.conditioning, concept_set.prompt[index])
    wanted = target(noise_scheduler, latents, noise, timesteps)
    return Minibatch(Inputs(noisy, timesteps, conditioning), wanted)


def denoising(batch, name="denoising", weight=1.0, **bounds):
    """Return the term L_DM = E ‖ε − ε_θ(z_t, t, c)‖² of a minibatch (v in place of ε: v-models)."""
    return Term(name, weight, batch.inputs, batch.target, **bounds)


def predict_blocks(unet, blocks):
    """Predict for several `Inputs` in one pass; returns one tensor for each."""
    latents, timesteps, conditionings = zip(*blocks, strict=True)
    conditioning = stack(*conditionings)
    predicted = predict(unet, torch.cat(latents), torch.cat(timesteps), conditioning)
    return predicted.split([len(rows) for rows in latents])


def squared_errors(unet, terms, accumulation=1):
    """Compute the mean squared error of each term, all in ONE pass of the UNet.

    accumulation: use that many micro-batches, which keep only their inputs for the backward pass:
    the same losses with the memory of one, for another forward pass. With several processes
    each term holds this process's shard; values are means over all processes, gradients are this
    process's own (`gradients` averages them). Returns a list of scalars, without the weights.
    Raises ValueError as `shard` does.
    """

    def errors(index):
        blocks = {id(t.inputs): shard(t.inputs, index, accumulation) for t in terms}
        found = dict(zip(blocks, predict_blocks(unet, blocks.values()), strict=True))
        targets = [shard(t.target, index, accumulation).float() for t in terms]
        pairs = [(t, found[id(t.inputs)].float() - y) for t, y in zip(terms, targets, strict=True)]
        return torch.stack([mean_square(error, t.image_bound) for t, error in pairs])

    if accumulation == 1:
        return list(straight_through_mean(errors(0)))
    if torch.is_grad_enabled():
        parts = [checkpoint(errors, i, use_reentrant=False) for i in range(accumulation)]
    else:
        parts = [errors(i) for i in range(accumulation)]
    return list(straight_through_mean(sum(parts) / accumulation))


def mean_square(error, image_bound=float("inf")):
    """Return the mean square, with gradients that draw each row's own mean to `image_bound`.

    A row above the bound has no gradient, and one above twice the bound has the opposite one:
    maximised, it falls. Without it, images that have run away stay away, and others with them.
    """
    if image_bound == float("inf"):
        return error.pow(2).mean()
    rows = error.pow(2).flatten(1).mean(1)
    pulled_back = 2 * rows.detach() - rows
    bounded = torch.where(rows > image_bound, rows.detach(), rows)
    return torch.where(rows > 2 * image_bound, pulled_back, bounded).mean()


@torch.no_grad()
def predictions(unet, blocks, accumulation=1):
    """Predict for several `Inputs` in one pass, without gradient: targets of terms.

    Returns one tensor for each block. Raises ValueError as `shard` does.
    """
    if not blocks:
        return ()
    if accumulation == 1:
        return predict_blocks(unet, blocks)
    micro = [[shard(block, i, accumulation) for block in blocks] for i in range(accumulation)]
    shards = [predict_blocks(unet, part) for part in micro]
    return tuple(interleave(pieces) for pieces in zip(*shards, strict=True))


def image_losses(unet, batches):
    """Return name → denoising loss of each row of a minibatch, in passes of at most 16 rows."""
    found = {}
    for name, (inputs, wanted) in batches.items():
        index = torch.arange(len(wanted)).split(16)
        parts = [
            Inputs(inputs.latents[i], inputs.timesteps[i], select(inputs.conditioning, i))
            for i in index
        ]
        predicted = torch.cat([predictions(unet, [part])[0] for part in parts])
        found[name] = (predicted.float() - wanted.float()).pow(2).flatten(1).mean(1).cpu()
    return found


def weighted_sum(terms, losses):
    """Return Σ weight · min(loss, bound) over terms and their losses."""
    pairs = zip(terms, losses, strict=True)
    return sum(term.weight * loss.clamp(max=term.bound) for term, loss in pairs)


def gradients(loss, parameters, scale=1.0, **kwargs):
    """Return ∇ loss as a list of tensors, the mean over all processes.

    scale: multiply the loss and divide its gradient, so that float16 keeps small numbers. With
    `create_graph` the gradient is this process's own, to be differentiated again.
    """
    with torch.profiler.record_function("unet pass"):  # as `predict`, for the profiler
        found = torch.autograd.grad(loss if scale == 1 else loss * scale, parameters, **kwargs)
    if kwargs.get("create_graph"):
        return list(found)
    if scale != 1:
        torch._foreach_div_([g for g in found if g is not None], scale)
    return [g if g is None else process_mean(g) for g in found]
