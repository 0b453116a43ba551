"""Measure memory and time of training steps on any pipeline.

Random latents replace the images, so full-size networks without trained weights will do.
"""

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mu.concepts.sets import ConceptSet
from mu.devices import loss_scale
from mu.draws import Data
from mu.frozen import frozen_copy, offload
from mu.notebooks.cost import DEFAULTS, GIB, module_bytes
from mu.notebooks.trace import Tracker, blank
from mu.parallel import Runtime
from mu.phases import Phase, unlearn_in_phases
from mu.runs.parameters import FLAT, average_decay, check_method, make_phases
from mu.state import State
from mu.validation import Validation


@dataclass(frozen=True)
class Measured:
    """Memory and time of training steps."""

    records: list  # of the loop, one per step
    gib: float  # peak with weights: of the GPU's allocator, or of the tensors on a CPU (`Tracker`)
    flops: float  # per step, on average; nan on a GPU, where they are not counted
    share: float  # of the time of profiled steps inside UNet passes; nan if none was profiled


def random_data(pipe, rows=8, seed=0):
    """Return `Data` of random latents (in units of `scaling_factor`) and random text states."""
    g, config, device = torch.Generator().manual_seed(seed), pipe.unet.config, pipe.unet.device
    inputs = blank(config, rows, config.sample_size, pipe.tokenizer.model_max_length).inputs

    def random(like):
        return torch.randn(like.shape, generator=g).to(device)

    def conditioning():
        return {name: random(value) for name, value in inputs.conditioning.items()}

    def concept_set():
        mean = random(inputs.latents)
        prompts = [f"prompt {i}" for i in range(rows)]
        std = torch.full_like(mean, 0.1)
        return ConceptSet(mean, std, conditioning(), torch.arange(rows), prompts)

    return Data(
        forget=concept_set(),
        retain_related=concept_set(),
        retain_unrelated=concept_set(),
        unconditional={name: value[:1] for name, value in conditioning().items()},
        retain_prompts=conditioning(),
    )


def union(spans):
    """Return the length of the union of (start, end) intervals, which may overlap."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def unet_share(steps):
    """Return the share of the time of `steps()` inside UNet passes, and the result of `steps()`.

    `predict` and `gradients` name their intervals in the profile. One may contain another, so
    their union counts. On a GPU both times are the device's, from the first of its operations to
    the last: the program runs ahead of it.
    """
    cuda = torch.cuda.is_available()
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    activities = {ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if cuda else set())
    with profile(activities=activities) as prof, record_function("all steps"):
        result = steps()
        if cuda:
            torch.cuda.synchronize()
    spans = {"unet pass": [], "all steps": []}
    for event in prof.profiler.kineto_results.events():  # prof.events() builds a tree for minutes
        if event.device_type() == device and event.name() in spans:
            spans[event.name()].append((event.start_ns(), event.end_ns()))
    return union(spans["unet pass"]) / union(spans["all steps"]), result


def prepare_loop(pipe, p, data, steps):
    """Return a function that trains until a given step and returns the records.

    It trains the last phase, without head starts of attackers; validation runs if it comes within
    `steps`.
    """
    loss, subset = check_method(p["method"])
    loop = {name: p[name] for name in (*FLAT, "steps", "phases", "validation")}
    phases, validation = make_phases(loop, loss, p["lr"])
    last = phases[-1].objective
    objective = replace(last, inner=replace(last.inner, head_start=0))
    unet_frozen = frozen_copy(pipe.unet, p["frozen_dtype"])
    ema = average_decay(p["ema"], loss)
    subset = p["subset"] or subset
    state = State(pipe.unet, subset, optimizer=p["optimizer"], rank=p["rank"], ema=ema)
    runtime = Runtime(
        p["accumulation"], p["snapshot"] or None, p["half_pool"], loss_scale(pipe.precision)
    )
    validation = validation if validation.every <= steps else Validation(every=0)
    fixed = (state, unet_frozen, pipe.scheduler, data)

    def train_until(step):
        phase = Phase("rehearsal", step, objective, p["lr"])
        state.phase, state.phase_start = 0, 0  # a later call goes on in the same phase
        return list(unlearn_in_phases(*fixed, [phase], validation=validation, runtime=runtime))

    return train_until


def rehearse(pipe, parameters, steps=1, profiled_steps=0):
    """Run steps of the last phase of a training as `mu.runs.train` would; returns what they took.

    The pipeline's UNet is trained; its other parts leave the device with `offload`. The first step
    reaches the peak memory, except for a simulated CLEAN fine-tuning and a validation.
    parameters: of `DEFAULTS`. profiled_steps: further steps, under the profiler. Returns
    `Measured`. Raises as `unlearn` and `trainable` do.
    """
    p, cuda = DEFAULTS | parameters, pipe.unet.device.type == "cuda"
    data = random_data(pipe)  # before the tracker: not part of what the estimate counts
    if not p["retain_prompts"]:
        data = replace(data, retain_prompts=None)
    if p["offload"]:
        offload(pipe)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if p["offload"] and cuda:
        modules = [pipe.unet]
    here = module_bytes(*modules)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.nullcontext() if cuda else Tracker() as tracker:
        train_until = prepare_loop(pipe, p, data, steps)
        records = train_until(steps)
    peak = torch.cuda.max_memory_allocated() if cuda else here + max(tracker.timeline)
    flops = math.nan if cuda else tracker.flops / steps
    share = math.nan
    if profiled_steps:
        share, _ = unet_share(lambda: train_until(steps + profiled_steps))
    return Measured(records, peak / GIB, flops, share)
