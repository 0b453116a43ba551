"""What a step of a loop really takes, memory and time: on any pipeline, with random latents for pictures, so that full-size networks without weights will do."""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mu.concepts.sets import ConceptSet
from mu.frozen import frozen_copy, offload
from mu.notebooks.preflight import DEFAULTS, GIB, Tracker, blank
from mu.objectives import loss_scale
from mu.runs.train import check_method, keywords
from mu.train import State, unlearn


@dataclass(frozen=True)
class Measured:
    records: list  # of the loop, one a step
    gib: float  # peak: of a GPU's allocator, or on a CPU of the tensors (`Tracker`), weights included
    flops: float  # of a step, on average; nan on a GPU, where nothing counts them
    share: float  # of the time of later steps that is spent inside passes of the UNet; nan where none was profiled


def random_sets(pipe, rows=8, seed=0):
    """What `unlearn` takes as sets, of random latents (in units of `scaling_factor`) and random states of the text encoder: a dict."""
    g, c, device = torch.Generator().manual_seed(seed), pipe.unet.config, pipe.unet.device
    latents, _, conditioning, _ = blank(c, rows, c.sample_size, pipe.tokenizer.model_max_length)

    def random(like):
        return torch.randn(like.shape, generator=g).to(device)

    def new():
        return {name: random(value) for name, value in conditioning.items()}

    def one():
        return ConceptSet(
            random(latents),
            torch.full_like(latents, 0.1, device=device),
            new(),
            torch.arange(rows),
            [f"prompt {i}" for i in range(rows)],
        )

    return dict(
        forget=one(),
        retain_related=one(),
        retain_unrelated=one(),
        unconditional={name: value[:1] for name, value in new().items()},
        retain_prompts=new(),
    )


def union(spans):
    """Length of the union of (start, end) stretches, which may overlap."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def unet_share(steps):
    """(share of the time of `steps()` inside passes of the UNet, what it returned).

    `predict_noise` and `gradients` give their stretches a name in the profile, and a pass may lie inside another, so it is their union that counts. On a GPU
    both are times of the device, from the first of its operations to the last: there the program runs ahead of it."""
    cuda = torch.cuda.is_available()
    device, activity = (
        (DeviceType.CUDA, ProfilerActivity.CUDA) if cuda else (DeviceType.CPU, ProfilerActivity.CPU)
    )
    with profile(activities={ProfilerActivity.CPU, activity}) as prof, record_function("all steps"):
        result = steps()
        if cuda:
            torch.cuda.synchronize()
    spans = [
        (e.name(), e.start_ns(), e.end_ns())
        for e in prof.profiler.kineto_results.events()
        if e.device_type() == device
    ]  # prof.events() would first build a tree, for minutes

    def of(name):
        return [(start, end) for found, start, end in spans if found == name]

    return union(of("unet pass")) / union(of("all steps")), result


def rehearse(pipe, parameters, steps=1, profiled_steps=0):
    """Do the first steps of the training that `parameters` (of `mu.notebooks.preflight.DEFAULTS`) describe, as `mu.runs.train` would, and measure them.

    The pipeline's UNet is trained, and its other parts leave the device with `offload`. The first step holds everything that memory depends on, but for a CLEAN
    fine-tuning. profiled_steps: further ones, under the profiler. Returns `Measured`. Raises as `unlearn` and `trainable` do."""
    p, cuda = DEFAULTS | parameters, pipe.unet.device.type == "cuda"
    objective, subset = check_method(p["method"])
    sets = random_sets(pipe)
    if not p["retain_prompts"]:
        sets["retain_prompts"] = None
    if p["offload"]:
        offload(pipe)
    modules = [
        part
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module) and (part is pipe.unet or not (p["offload"] and cuda))
    ]
    here = sum(x.numel() * x.element_size() for part in modules for x in part.parameters())
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.nullcontext() if cuda else Tracker() as tracker:
        unet_frozen = frozen_copy(pipe.unet, p["frozen"])
        state = State(
            pipe.unet,
            p["subset"] or subset,
            optimizer=p["optimizer"],
            rank=p["rank"],
            ema=p["ema"] if objective == "sdd" else 0.0,
        )
        loop = keywords(
            {name: p[name] for name in unlearn.__kwdefaults__ if name in DEFAULTS}, objective
        ) | {"snapshot": p["snapshot"] or None}

        def until(step):
            return list(
                unlearn(
                    state,
                    unet_frozen,
                    pipe.scheduler,
                    **sets,
                    loss_scale=loss_scale(p["precision"]),
                    **loop | {"steps": step},
                )
            )

        records = until(steps)
    gib = (torch.cuda.max_memory_allocated() if cuda else here + max(tracker.timeline)) / GIB
    share = unet_share(lambda: until(steps + profiled_steps))[0] if profiled_steps else math.nan
    return Measured(records, gib, math.nan if cuda else tracker.flops / steps, share)
