"""The two loops, as generators: each yields one frozen record after each optimizer step.

Progress bars, logging, plots and stopping belong to the caller.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.attention_processor import AttnProcessor

from mu.attackers import Simulator
from mu.controls import angle, expansion
from mu.draws import Data, draw_pair, draw_step
from mu.losses import (
    denoising,
    draw_minibatch,
    gradients,
    squared_errors,
    weighted_sum,
)
from mu.meta import inner_step
from mu.objective import Objective, frozen_predictions, terms_at_theta
from mu.parallel import Runtime, local_shard
from mu.state import State


@dataclass(frozen=True)
class Record:
    """What one optimizer step did."""

    step: int  # number of steps done, this one included
    losses: dict[str, float]  # before the update
    passes: int  # forward passes: of the UNet, of the frozen UNet, and of trajectories
    seconds: float


def unlearn(
    state: State,
    unet_frozen: torch.nn.Module | None,
    noise_scheduler,
    data: Data,
    objective: Objective,
    *,
    steps: int,
    runtime: Runtime = Runtime(),
):
    """Unlearn and meta-unlearn, in one loop: minimise `objective` until step number `steps`.

    unet_frozen: ε_0; None with subset "lora" only, whose adapters are then switched off for it.
    After a closed-form edit (UCE, RECE) the meta terms train alone, with weight unlearn = 0, and
    unet_frozen is the edited UNet. noise_scheduler: DDIM, with the model's betas.
    Passes of a step, first order: 1 at θ, M + 1 of the simulated attack, 1 of the frozen UNet,
    those of the trajectories, and 1 of SDD's target; second order: M(M + 1)/2 more.
    Raises ValueError for an objective that cannot be minimised (`Objective.check`) and for batches
    that processes or micro-batches cannot share; FloatingPointError for a loss that is not
    finite, in which case `state` holds the last good step.
    """
    objective.check(state, runtime)
    simulator = Simulator(state.unet, state.parameters, objective.inner, runtime)
    if objective.inner.order == "second" or objective.controls.active:
        state.unet.set_attn_processor(AttnProcessor())  # can be differentiated twice everywhere
    with count_passes(state.unet, unet_frozen) as passes:
        while state.step < steps:
            began = time.perf_counter()
            passes.clear()
            recorded = gradient_angle(state, data, objective, noise_scheduler, runtime)
            draws = draw_step(state, data, objective, simulator, noise_scheduler)
            frozen = frozen_predictions(state.unet, unet_frozen, draws, objective, runtime)
            terms = terms_at_theta(state.unet, draws, frozen, objective, runtime)
            gradient, losses = gradient_at_theta(state, terms, runtime)
            if draws.simulation:
                simulated, after = simulator.gradient(draws.simulation)
                torch._foreach_add_(gradient, simulated)
                losses |= after
                del simulated
            losses |= add_controls(gradient, state, data, objective, noise_scheduler, runtime)
            clip_gradient(gradient, losses, objective.clip, state.step, runtime.loss_scale)
            state.apply(gradient)
            del gradient
            yield Record(state.step, losses | recorded, len(passes), time.perf_counter() - began)


def finetune(
    state: State,
    noise_scheduler,
    concept_set,
    *,
    steps: int,
    batch_size: int = 8,
    mixed_set=None,
    mixed_weight: float = 1.0,
    runtime: Runtime = Runtime(),
):
    """Fine-tune by the denoising loss: the attack on the concept, CLEAN on other images.

    Minimises L(θ; concept_set) + mixed_weight · L(θ; mixed_set). concept_set: a set, or a function
    of the steps done, for phases or conditionings that training changes. mixed_set: None, images
    of its class that the model drew (DreamBooth's prior preservation), or benign images. Its batch
    is as large as the other's. Optimizer, learning rate and subset are those of `state`.
    Raises FloatingPointError as `unlearn` does.
    """
    scale, accumulation = runtime.loss_scale, runtime.accumulation
    check = partial(check_norm, state=state, scale=scale) if scale != 1 else None
    while state.step < steps:
        began = time.perf_counter()
        sets = {"finetune": concept_set(state.step) if callable(concept_set) else concept_set}
        if mixed_set is not None and mixed_weight:
            sets["mixed"] = mixed_set
        terms = []
        for name, images in sets.items():
            batch = draw_minibatch(
                images, noise_scheduler, batch_size, state.generators["finetune"]
            )
            weight = mixed_weight if name == "mixed" else 1.0
            terms.append(denoising(local_shard(batch), name, weight))
        found = squared_errors(state.unet, terms, accumulation)
        losses = {term.name: loss.item() for term, loss in zip(terms, found, strict=True)}
        refuse_nan(losses, state.step, scale)
        inner_step(state.parameters, weighted_sum(terms, found), state.optimizer, scale, check)
        state.step += 1
        passes = 1 if accumulation == 1 else 2 * accumulation
        yield Record(state.step, losses, passes, time.perf_counter() - began)


@contextlib.contextmanager
def count_passes(*nets):
    """Count forward passes: yields a list that gets an entry for each."""
    passes = []
    hooks = [net.register_forward_hook(lambda *_: passes.append(1)) for net in nets if net]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def refuse_nan(losses, step, scale=1.0):
    """Raise FloatingPointError for a value that is not finite."""
    for name, value in losses.items():
        if not math.isfinite(value):
            half = f" or loss_scale ({scale:g}), or choose precision bf16 or no"
            raise FloatingPointError(
                f"{name} is {value} in step {step + 1}; the weights of step {step} are kept: lower "
                f"the learning rate, a weight or the bound{half if scale != 1 else ''}"
            )


def check_norm(gradient, state, scale):
    """Raise FloatingPointError for a gradient that is not finite."""
    norm = torch.nn.utils.get_total_norm(gradient).item()
    refuse_nan({"gradient norm": norm}, state.step, scale)


def gradient_at_theta(state, terms, runtime):
    """Return the gradient of the terms' weighted sum at θ, and their losses by name."""
    if not terms:
        return [torch.zeros_like(p) for p in state.parameters], {}
    found = squared_errors(state.unet, terms, runtime.accumulation)
    gradient = gradients(weighted_sum(terms, found), state.parameters, runtime.loss_scale)
    return gradient, {term.name: loss.item() for term, loss in zip(terms, found, strict=True)}


def clip_gradient(gradient, losses, largest, step, scale):
    """Clip the gradient's norm in place. Raises FloatingPointError if it or a loss is infinite."""
    norm = torch.nn.utils.get_total_norm(gradient).item()
    refuse_nan(losses | {"gradient norm": norm}, step, scale)
    torch._foreach_mul_(gradient, min(1.0, largest / (norm + 1e-6)))


def gradient_losses(state, batches, runtime):
    """Return each minibatch's denoising loss at θ as a function without arguments."""

    def loss(batch):
        return squared_errors(state.unet, [denoising(batch)], runtime.accumulation)[0]

    return [partial(loss, batch) for batch in batches]


def gradient_angle(state, data, objective, noise_scheduler, runtime):
    """Return inner product and cosine of the forget and related gradients, if due at this step."""
    every = objective.controls.angle_every
    if not every or state.step % every:
        return {}
    sizes = (objective.inner.batch_size, objective.retain_batch_size)
    g = state.generators["angle"]  # of its own: recording changes nothing else
    batches = draw_pair(data, objective, noise_scheduler, g, sizes)
    losses = gradient_losses(state, batches, runtime)
    product, cosine = angle(state.parameters, losses, runtime.loss_scale)
    return {"inner product": product, "cosine": cosine}


def add_controls(gradient, state, data, objective, noise_scheduler, runtime):
    """Add the control terms' gradient in place, if there are any; returns their value."""
    if not objective.controls.active:
        return {}
    sizes = (objective.inner.batch_size, objective.inner.batch_size)
    batches = draw_pair(data, objective, noise_scheduler, state.generators["meta"], sizes)
    losses = gradient_losses(state, batches, runtime)
    value, more = expansion(state.parameters, *losses, objective.controls)
    torch._foreach_add_(gradient, more)
    return {"expansion": value}
