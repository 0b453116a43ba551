"""The two loops, as generators: each yields one frozen record after each optimizer step.

Progress bars, logging, plots and stopping belong to the caller.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.attention_processor import AttnProcessor

from mu.attackers import Simulator
from mu.controls import add_controls, gradient_angle
from mu.draws import Data, draw_step
from mu.guards import calm, check_norm, clip_gradient, count_passes, limit, refuse_nan
from mu.losses import denoising, draw_minibatch, gradients, squared_errors, weighted_sum
from mu.meta import inner_step
from mu.objective import Objective, frozen_predictions, terms_after_attack, terms_at_theta
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
    After a closed-form edit (UCE, RECE) it is the edited UNet, and the meta terms train alone.
    noise_scheduler: DDIM, with the model's betas. Yields a `Record` per step. Raises ValueError as
    `Objective.check` and `mu.parallel.shard` do; FloatingPointError for a loss that is not finite:
    `state` then holds the last good step.
    """
    objective.check(state, runtime)
    simulator = Simulator(state, objective.inner, runtime)
    if objective.inner.order == "second" or objective.controls.active:
        state.unet.set_attn_processor(AttnProcessor())  # can be differentiated twice everywhere
    fixed = (unet_frozen, noise_scheduler, data, objective, simulator, runtime)
    with count_passes(state.unet, unet_frozen) as passes:
        while state.step < steps:
            began = time.perf_counter()
            passes.clear()
            gradient, losses = step_gradient(state, *fixed)
            clip_gradient(gradient, losses, objective.clip, state.step, runtime.loss_scale)
            state.apply(gradient)
            del gradient
            yield Record(state.step, losses, len(passes), time.perf_counter() - began)


def step_gradient(state, unet_frozen, noise_scheduler, data, objective, simulator, runtime):
    """Return the gradient of the objective at θ, and the losses by name.

    Passes, first order: 1 at θ, M + 1 of the simulated attack, 1 of the frozen UNet, those of the
    trajectories, 1 of SDD's target; second order: M(M + 1)/2 more.
    """
    angle = gradient_angle(state, data, objective, noise_scheduler, runtime)
    draws = draw_step(state, data, objective, simulator, noise_scheduler)
    frozen = frozen_predictions(state.unet, unet_frozen, draws, objective, runtime)
    terms = terms_at_theta(state.unet, draws, frozen, objective, runtime)
    gradient, losses = gradient_at_theta(state, terms, runtime)
    if draws.simulation:
        terms = terms_after_attack(draws, frozen, objective)
        (destroy, keep), after = simulator.gradients(draws.simulation, terms)
        losses |= after
        losses |= add_limited(gradient, destroy, keep, objective, losses)
    losses |= add_controls(gradient, state, data, objective, noise_scheduler, runtime)
    return gradient, losses | angle


def add_limited(gradient, destroy, keep, objective, losses):
    """Add the gradients at θ_FT to that at θ in place; returns the norms that were limited.

    With `meta_clip`, either has at most so many norms of the gradient at θ. That of the maximised
    losses has less where θ drifts. Clipped together, the steep one of self-destruction would leave
    nothing of the other.
    """
    norms, largest = {}, objective.meta_clip
    limits = (
        ("", destroy, largest * calm(losses, objective.drift_bound)),
        (" keep", keep, largest),
    )
    parts = [(name, part, most) for name, part, most in limits if part is not None]
    for name, part, most in parts if largest else ():
        norms[f"norm after{name}"], norms["norm"] = limit(part, gradient, most)
    for _, part, _ in parts:
        torch._foreach_add_(gradient, part)
    return norms


def gradient_at_theta(state, terms, runtime):
    """Return the gradient of the terms' weighted sum at θ, and their losses by name."""
    if not terms:
        return [torch.zeros_like(p) for p in state.parameters], {}
    found = squared_errors(state.unet, terms, runtime.accumulation)
    gradient = gradients(weighted_sum(terms, found), state.parameters, runtime.loss_scale)
    return gradient, {term.name: loss.item() for term, loss in zip(terms, found, strict=True)}


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
    generator = state.generators["finetune"]
    scale, accumulation = runtime.loss_scale, runtime.accumulation
    check = partial(check_norm, state=state, scale=scale) if scale != 1 else None
    while state.step < steps:
        began = time.perf_counter()
        sets = {"finetune": concept_set(state.step) if callable(concept_set) else concept_set}
        if mixed_set is not None and mixed_weight:
            sets["mixed"] = mixed_set
        terms = []
        for name, images in sets.items():
            batch = draw_minibatch(images, noise_scheduler, batch_size, generator)
            weight = mixed_weight if name == "mixed" else 1.0
            terms.append(denoising(local_shard(batch), name, weight))
        found = squared_errors(state.unet, terms, accumulation)
        losses = {term.name: loss.item() for term, loss in zip(terms, found, strict=True)}
        refuse_nan(losses, state.step, scale)
        inner_step(state.parameters, weighted_sum(terms, found), state.optimizer, scale, check)
        state.step += 1
        passes = 1 if accumulation == 1 else 2 * accumulation
        yield Record(state.step, losses, passes, time.perf_counter() - began)
