"""All random choices of one training step, drawn before anything is computed."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mu.attackers import Simulation
from mu.losses import Inputs, Minibatch, draw_minibatch
from mu.models import select, stack
from mu.parallel import local_shard
from mu.sampling import sample_trajectory

# own samples with their prompts, and with the empty one: of related prompts, of unrelated ones
SAMPLED = (
    ("sampled related", "sampled related, empty"),
    ("sampled unrelated", "sampled unrelated, empty"),
)


@dataclass(frozen=True)
class Data:
    """Concept sets and conditionings of the defender, encoded once."""

    forget: object  # `mu.concepts.sets.ConceptSet`, as the next two
    retain_related: object
    retain_unrelated: object
    unconditional: dict  # of the empty prompt, one row
    retain_prompts: dict | None = None  # of random words, for the drift term "any"; None: no term
    replace: dict | None = None  # the concept is drawn as this, one row; None: the empty prompt
    rehearsal: object = None  # images of the concept for simulated attackers; None: forget

    def concept_set(self, name):
        """Return the forget, related or unrelated set as simulated attackers have it."""
        if name == "forget":
            return self.rehearsal or self.forget
        return getattr(self, f"retain_{name}")


class Draws(NamedTuple):
    """All random choices of one step, as this process's shards; one generator per purpose."""

    concept: Inputs | None  # points of trajectories, with the concept's prompt
    no_concept: Inputs | None  # the same latents with the empty or the replacing prompt
    retained: dict[str, Minibatch]  # of the related and the unrelated set
    prompts: dict[str, Inputs]  # of other drift terms: empty, any, and those of `SAMPLED`
    ascent: Minibatch | None
    simulation: Simulation | None


def repeat(one_row, n):
    """Return n copies of a conditioning of one row."""
    return select(one_row, torch.zeros(n, dtype=torch.long))


def trajectory_points(state, use, n, trajectory, sample):
    """Return the next n points of the trajectories that `trajectory.reuse` steps share.

    sample: draws them anew, as rows of latents, timesteps and prompts.
    """
    position = state.step % trajectory.reuse
    points = state.trajectories.get(use)
    if points is None or position == 0 or len(points[0]) != n * trajectory.reuse:  # a new phase
        points = state.trajectories[use] = sample()
    return [x[position * n : (position + 1) * n] for x in points]


def draw_concept(state, data, method, noise_scheduler):
    """Return ESD's and SDD's inputs: with the concept's prompt, and without the concept."""
    forget, g, n = data.forget, state.generators["unlearn"], method.batch_size

    def sample():
        prompt = torch.randint(len(forget.prompts), (n,), generator=g)
        conditioning = select(forget.conditioning, prompt)
        fixed = (noise_scheduler, conditioning, data.unconditional, g, method.trajectory)
        with method.sampler(state) as sampler:
            points = sample_trajectory(sampler, *fixed, forget.mean.shape[1:])
        return *points, prompt.repeat(method.trajectory.reuse)

    drawn = trajectory_points(state, "concept", n, method.trajectory, sample)
    latents, timesteps, prompt = drawn
    concept = Inputs(latents, timesteps, select(forget.conditioning, prompt))
    no_concept = Inputs(latents, timesteps, repeat(data.replace or data.unconditional, n))
    return local_shard(concept), local_shard(no_concept)


def draw_sampled(state, data, objective, noise_scheduler):
    """Return points of θ's own trajectories: name → `Inputs`, see `SAMPLED`.

    As many trajectories have related prompts as unrelated ones. Each point also comes with the
    empty prompt. A model may match the frozen one on noisy images and still leave it step by step
    when it samples.
    """
    sets, g = (data.retain_related, data.retain_unrelated), state.generators["sampled"]
    n = math.ceil(objective.retain_batch_size / 4)
    trajectory = replace(objective.method.trajectory, guidance=objective.retain_guidance)

    def conditionings(prompt):
        pairs = zip(sets, prompt.split(n), strict=True)
        return [select(images.conditioning, part) for images, part in pairs]

    def sample():
        prompt = torch.cat([torch.randint(len(x.prompts), (n,), generator=g) for x in sets])
        fixed = (noise_scheduler, stack(*conditionings(prompt)), data.unconditional, g, trajectory)
        points = sample_trajectory(state.unet, *fixed, sets[0].mean.shape[1:])
        return *points, prompt.repeat(trajectory.reuse)

    drawn = trajectory_points(state, "sampled", 2 * n, trajectory, sample)
    latents, timesteps, prompt = drawn
    rows, points = conditionings(prompt), zip(latents.split(n), timesteps.split(n), strict=True)
    inputs = {}
    for (name, empty), row, point in zip(SAMPLED, rows, points, strict=True):
        inputs[name] = local_shard(Inputs(*point, row))
        inputs[empty] = local_shard(Inputs(*point, repeat(data.unconditional, n)))
    return inputs


def draw_prompts(data, objective, unrelated, generator):
    """Return every second row of the unrelated minibatch with the empty and random prompts."""
    latents, timesteps = unrelated.inputs.latents[::2], unrelated.inputs.timesteps[::2]
    n, prompts = len(latents), {}
    if "empty" in objective.drift_terms:
        prompts["empty"] = Inputs(latents, timesteps, repeat(data.unconditional, n))
    if data.retain_prompts and "any" in objective.drift_terms:
        count = len(data.retain_prompts["encoder_hidden_states"])
        index = torch.randint(count, (n,), generator=generator)
        prompts["any"] = Inputs(latents, timesteps, select(data.retain_prompts, index))
    return {name: local_shard(inputs) for name, inputs in prompts.items()}


def draw_step(state, data, objective, simulator, noise_scheduler):
    """Return the `Draws` of a step; the order of draws of each generator is part of the results."""
    weights, attacker = objective.weights, objective.attacker(state.step)
    g_retain, g_meta = state.generators["retain"], state.generators["meta"]

    def draw(name, generator=g_meta, n=objective.inner.batch_size, images=()):
        chosen = data.concept_set(name)
        if images:
            chosen = chosen.subset(torch.tensor(images))
        return draw_minibatch(chosen, noise_scheduler, n, generator, objective.timestep)

    concept = no_concept = ascent = simulation = None
    retained, prompts = {}, {}
    if weights.unlearn:
        concept, no_concept = draw_concept(state, data, objective.method, noise_scheduler)
    if weights.retain or weights.learn_related or weights.learn_unrelated or attacker:
        n = objective.retain_batch_size
        retained = {name: draw(name, g_retain, n) for name in ("related", "unrelated")}
    if weights.retain:
        prompts = draw_prompts(data, objective, retained["unrelated"], g_retain)
        if "sampled" in objective.drift_terms:
            prompts |= draw_sampled(state, data, objective, noise_scheduler)
    retained = {name: local_shard(batch) for name, batch in retained.items()}
    if weights.ascent:
        ascent = local_shard(draw("forget"))
    if attacker:
        prompts_of = data.concept_set("forget").prompt
        simulation = simulator.draw(
            attacker,
            lambda name, images: local_shard(draw(name, images=images)),
            retained,
            prompts_of,
            g_meta,
        )
    return Draws(concept, no_concept, retained, prompts, ascent, simulation)


def draw_pair(data, objective, noise_scheduler, generator, sizes):
    """Return a forget and a related minibatch of the given sizes, for their two gradients."""
    sets = zip(("forget", "related"), sizes, strict=True)
    draw = [
        draw_minibatch(data.concept_set(name), noise_scheduler, n, generator, objective.timestep)
        for name, n in sets
    ]
    return [local_shard(batch) for batch in draw]
