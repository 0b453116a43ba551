"""Estimate the peak memory and the FLOPs of a training.

Weights, copies and optimizer states are counted; what a pass takes beyond them is traced.
"""

import functools
import json
import math
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from mu.devices import PRECISIONS, resolve_precision
from mu.notebooks.sizes import random_pipeline
from mu.notebooks.trace import Network, fake_network, pass_cost
from mu.objective import Objective
from mu.optimizers import OPTIMIZERS
from mu.runs.parameters import FLAT, average_decay, check_method, defaults, make_phases
from mu.targets import ESD, SDD
from mu.validation import FIXED, PICTURED

GIB = 2**30
# a notebook without meta terms trains without them, so these are not the defaults of `META`
DEFAULTS = defaults(Objective()) | {
    "steps": 100,
    "frozen_dtype": "same",
    "gradient_checkpointing": False,
    "offload": False,
    "processes": 1,
    "resolution": 0,  # pixels; 0: the model's own
    "half_pool": False,
    "phases": None,
    "validation": None,
}
CHOICES = {
    "weights_dtype": ("full", "half"),
    "precision": PRECISIONS,
    "optimizer": OPTIMIZERS,
    "order": ("first", "second"),
}


@dataclass(frozen=True)
class Estimate:
    """Peak memory and FLOPs of a training, per process."""

    gib: float  # peak memory of the loop
    flops: float  # per outer step, on average over the phases of the training
    steps: int  # outer steps, of all phases
    kept: dict  # name → GiB that it takes all the time
    phases: dict  # phase → GiB at its peak, including what is kept


@dataclass(frozen=True)
class Rows:
    """Rows of a step on one process; 0: not used."""

    concept: int  # noisy latents of ESD or SDD
    inner: int  # forget images of a minibatch
    retain: int  # images per retain set
    prompts: int  # of other drift terms: unrelated images with other prompts, own samples
    sampled: int  # own samples


def with_defaults(parameters):
    """Return parameters with defaults for the missing ones.

    Raises ValueError for an unknown parameter or value.
    """
    if unknown := sorted(set(parameters or {}) - set(DEFAULTS)):
        raise ValueError(f"unknown parameter {unknown[0]!r}: choose {', '.join(DEFAULTS)}")
    p = DEFAULTS | (parameters or {})
    for name, allowed in CHOICES.items():
        if p[name] not in allowed:
            raise ValueError(f"unknown {name} {p[name]!r}: choose {', '.join(allowed)}")
    return p


@functools.cache
def sized_pipeline(name, dtype):
    """Return a full-size pipeline on the meta device."""
    return random_pipeline(name, dtype, "meta")


def as_pipeline(model, p):
    """Return a pipeline as it is, or the pipeline of a name of `SIZES` without its weights."""
    dtype = torch.bfloat16 if p["weights_dtype"] == "half" else torch.float32
    return sized_pipeline(model, dtype) if isinstance(model, str) else model


def make_network(pipe, p, gpu):
    """Return the `Network` of a training; precision "auto" is half on a GPU."""
    config = pipe.unet.config
    precision = p["precision"]
    if precision == "auto":  # both half precisions take the same memory
        precision = "bf16" if gpu else resolve_precision("auto", "cpu")
    return Network(
        config=json.dumps(dict(config)),
        side=p["resolution"] // pipe.vae_scale_factor or config.sample_size,
        tokens=pipe.tokenizer.model_max_length,
        dtype=torch.bfloat16 if p["weights_dtype"] == "half" else torch.float32,
        subset=p["subset"] or check_method(p["method"])[1],
        rank=p["rank"],
        precision=precision,
        gradient_checkpointing=p["gradient_checkpointing"],
        frozen_dtype=p["frozen_dtype"],
        gpu=gpu,
        plain=p["order"] == "second" or (not gpu and config.sample_size <= 32),
    )


def pass_flops(model, kind, rows, parameters=None, gpu=True):
    """Return the FLOPs of one pass; kind as in `pass_cost`, the rest as in `estimate`."""
    p = DEFAULTS | (parameters or {})
    return pass_cost(make_network(as_pipeline(model, p), p, gpu), kind, rows).flops


def is_attacked(weights):
    """Return whether the objective simulates the attack on the concept."""
    return bool(weights.relearn or weights.self_destruct)


def count_rows(objective, p):
    """Return the `Rows` of a step.

    Raises ValueError for a batch that does not divide among processes and micro-batches.
    """
    w, retain = objective.weights, objective.retain_batch_size
    simulated, learns = is_attacked(w) or w.clean, w.learn_related or w.learn_unrelated
    is_sampled = w.retain and "sampled" in objective.drift_terms
    batches = {
        "batch_size": objective.method.batch_size if w.unlearn else 0,
        "inner_batch_size": objective.inner.batch_size if simulated or w.ascent else 0,
        "retain_batch_size": retain if simulated or w.retain or learns else 0,
        "half of retain_batch_size": math.ceil(retain / 2) if w.retain else 0,
        "a quarter of retain_batch_size": math.ceil(retain / 4) if is_sampled else 0,
    }
    shards = p["processes"] * p["accumulation"]
    for name, n in batches.items():
        if n % shards:
            raise ValueError(
                f"{name}: {n} rows do not divide among {p['processes']} processes × "
                f"{p['accumulation']} micro-batches: choose a multiple of {shards}"
            )
    concept, inner, retained, half, quarter = (n // p["processes"] for n in batches.values())
    is_empty = "empty" in objective.drift_terms
    is_any = "any" in objective.drift_terms and p["retain_prompts"] > 0
    prompts = half * (is_empty + is_any) + 4 * quarter
    return Rows(concept, inner, retained, prompts, 2 * quarter)


def step_costs(network, objective, rows, accumulation):
    """Return pass → `Cost` for all passes of a step; an unused pass costs 0."""
    w, method = objective.weights, objective.method
    is_attack, is_clean = is_attacked(w), bool(w.clean)
    is_simulated = is_attack or is_clean
    is_second = objective.inner.order == "second"
    kept = len({"related", "unrelated"} & set(objective.drift_terms)) if w.retain else 0
    asked = 2 * rows.concept * isinstance(method, ESD) + kept * rows.retain + rows.prompts
    at_theta = rows.concept + 2 * rows.retain + rows.prompts + rows.inner * bool(w.ascent)

    after_keep = (w.keep > 0) * (rows.retain + rows.sampled)
    after_attack = rows.inner + rows.retain + (w.keep < 0) * rows.retain

    def cost(kind, n):
        return pass_cost(network, kind, n, accumulation)

    return {
        "trajectory": pass_cost(network, "sample", 2 * rows.concept),
        "own samples": pass_cost(network, "sample", 2 * rows.sampled),
        "target": pass_cost(network, "sample", rows.concept * isinstance(method, SDD)),
        "frozen": cost("frozen", asked),
        "theta": cost("train", at_theta),
        "inner": cost("train", rows.inner * is_simulated),
        "after attack": cost("train", after_attack * is_attack),
        "keep": cost("train", after_keep * is_attack),
        "after clean": cost("train", 2 * rows.retain * is_clean),
        "product": cost("second", rows.inner * is_second * is_simulated),
    }


def average_flops(costs, objective):
    """Return the FLOPs of an outer step, averaged over attack, CLEAN and trajectory steps."""
    flops = {name: cost.flops for name, cost in costs.items()}
    w, trajectory = objective.weights, objective.method.trajectory
    clean = 1 / objective.clean_every if w.clean else 0
    m = float(np.mean(objective.inner.steps))
    if objective.inner.horizon:
        m *= 1 + np.mean(objective.inner.head_start) / np.mean(objective.inner.horizon)
    replay = (m - 1) / 2 * flops["inner"] if objective.inner.order == "second" else 0
    simulated = clean + (1 - clean) * is_attacked(w)
    # the latest of n stops is on average at n / (n + 1) of a trajectory, sampled every n steps
    drawn = flops["trajectory"] + flops["own samples"]
    return (
        drawn * trajectory.steps / (trajectory.reuse + 1)
        + flops["target"]
        + flops["frozen"]
        + flops["theta"]
        + clean * flops["after clean"]
        + (1 - clean) * (flops["after attack"] + flops["keep"])
        + simulated * m * (flops["inner"] + flops["product"] + replay)
    )


def module_bytes(*modules):
    """Return the size of the parameters of modules; None counts 0."""
    found = [p for module in modules if module is not None for p in module.parameters()]
    return sum(p.numel() * p.element_size() for p in found)


def moment_bytes(name, parameters):
    """Return the size of an optimizer's state, in bytes.

    bitsandbytes takes one byte per moment and a float32 per 256 of them; tensors of fewer than
    4,096 elements stay in float32.
    """
    if name == "sgd":
        return 0
    total = 0
    for n in (p.numel() for p in parameters):
        is_8bit = "8bit" in name and n >= 4096
        total += 2 * n + 8 * math.ceil(n / 256) if is_8bit else 8 * n
    return total


def encoder_bytes(pipe):
    """Return the size of VAE and text encoders."""
    names = ("vae", "text_encoder", "text_encoder_2")
    return module_bytes(*(pipe.components.get(name) for name in names))


def theta_bytes(trained):
    """Return the size of the trained weights in float32."""
    return 4 * sum(x.numel() for x in trained)


def pool_bytes(objective, trained, half):
    """Return the size of attackers that persist: δ and the optimizer's moments of each.

    Attackers with a LoRA of their own are counted as if they trained the weights themselves.
    """
    if not objective.inner.horizon:
        return 0
    members = objective.inner.pool * is_attacked(objective.weights) + bool(objective.weights.clean)
    moments = max(moment_bytes(name, trained) for name in objective.inner.optimizer)
    return members * (theta_bytes(trained) + moments) // (2 if half else 1)


def kept_bytes(pipe, network, objective, p):
    """Return name → bytes that are kept all the time."""
    _, unet, unet_frozen, trained = fake_network(network)
    loss, _ = check_method(p["method"])
    in_memory = not (p["snapshot"] == "cpu" and network.gpu)
    width = unet.config.cross_attention_dim
    return {
        "UNet": module_bytes(unet),
        "frozen UNet": module_bytes(unet_frozen),
        "optimiser": moment_bytes(p["optimizer"], trained),
        "average": theta_bytes(trained) if average_decay(p["ema"], loss) else 0,
        "best average": theta_bytes(trained) if (p["validation"] or {}).get("every") else 0,
        "attackers": pool_bytes(objective, trained, p["half_pool"]) * in_memory,
        "VAE, text encoders": 0 if p["offload"] and network.gpu else encoder_bytes(pipe),
        "random prompts": 4 * p["retain_prompts"] * network.tokens * width,
    }


def simulation_bytes(costs, objective, trained, keeps_theta):
    """Return the peak of a simulated fine-tuning: gradient, snapshot, moments, and its passes.

    keeps_theta: whether the snapshot of θ takes the same memory as the weights.
    """
    if not costs["inner"].memory:
        return 0
    theta, optimizers = theta_bytes(trained), objective.inner.optimizer
    moments = max(moment_bytes(name, trained) for name in optimizers)
    if objective.inner.horizon:
        moments = 0  # a part of the pool
    vector = theta if objective.inner.order == "second" else 0
    passes = [costs[name].memory for name in ("inner", "after attack", "after clean")]
    if costs["keep"].memory:  # its pass comes after that of self-destruction, whose gradient stays
        passes.append(costs["keep"].memory + theta)
    peak = max(*passes, costs["product"].memory + vector)
    return peak + theta * (1 + keeps_theta) + moments


def peak_bytes(pipe, network, objective, p, costs, validation):
    """Return what is kept, name → bytes, and the peak of each phase."""
    kept = kept_bytes(pipe, network, objective, p)
    trained = fake_network(network)[3]
    keeps_theta = not (p["snapshot"] == "cpu" and network.gpu)
    is_simulated = costs["inner"].memory > 0
    beyond = {
        "trajectory": costs["trajectory"].memory + kept["average"],
        "own samples": costs["own samples"].memory,
        "frozen UNet": costs["frozen"].memory,
        "gradient at θ": costs["theta"].memory,
        "simulated fine-tuning": simulation_bytes(costs, objective, trained, keeps_theta),
        "update": theta_bytes(trained) * (1 + is_simulated + (objective.weights.keep > 0)),
        "validation": validation_bytes(network, validation, trained, p["accumulation"]),
    }
    total = sum(kept.values())
    phases = {name: total + more for name, more in beyond.items() if more}
    # before anything is offloaded
    phases["start"] = kept["UNet"] + kept["frozen UNet"] + encoder_bytes(pipe)
    return {name: n for name, n in kept.items() if n}, phases


def validation_flops(network, validation):
    """Return the FLOPs of validation per outer step."""
    if not validation.every:
        return 0.0
    attack = max(validation.depths) * pass_cost(network, "train", validation.batch_size).flops
    image = pass_cost(network, "sample", 1).flops
    passes = 2 * (validation.sampling_steps + validation.gain_steps)  # with and without prompt
    times = 2 * len(validation.depths)  # after two attacks, and once before
    pictures = times * validation.pictures + (validation.pictures_before or validation.pictures)
    rows = (times + 1) * len(FIXED) * validation.images + passes * pictures * len(PICTURED)
    return (2 * attack + rows * image) / validation.every


def validation_bytes(network, validation, trained, accumulation):
    """Return the peak of a validation: a copy of θ, Adam's moments, a gradient, and its passes."""
    if not validation.every:
        return 0
    attack = pass_cost(network, "train", validation.batch_size, accumulation).memory
    passes = max(attack, pass_cost(network, "sample", 16).memory)
    return 2 * theta_bytes(trained) + moment_bytes("adam", trained) + passes


def estimate(model, parameters=None, gpu=True):
    """Estimate memory and FLOPs of a training of `mu.runs.train`, on each of its processes.

    Judged images before and after it, the control terms and the angle are not counted. With
    phases, memory is that of the phase that needs most.

    model: a pipeline, or a name of `mu.notebooks.sizes.SIZES`, without its weights.
    parameters: of `DEFAULTS`, as in the notebooks. gpu: whether to assume a GPU or a CPU.
    Raises ValueError for an unknown model, parameter or value, and for batches that do not divide
    evenly; as `trainable` and `frozen_copy` do.
    """
    p = with_defaults(parameters)
    loss, _ = check_method(p["method"])
    loop = {name: p[name] for name in (*FLAT, "steps", "phases", "validation")}
    phases, validation = make_phases(loop, loss, p["lr"])
    pipe = as_pipeline(model, p)
    network = make_network(pipe, p, gpu)
    fake_network(network)  # refuses an impossible subset or frozen_dtype before the batches
    peaks, flops = [], 0.0
    for phase in phases:
        rows = count_rows(phase.objective, p)
        costs = step_costs(network, phase.objective, rows, p["accumulation"])
        kept, peak = peak_bytes(pipe, network, phase.objective, p, costs, validation)
        peaks.append((max(peak.values()), kept, peak))
        each = average_flops(costs, phase.objective)
        if phase.objective.simulates:
            each += validation_flops(network, validation)
        flops += phase.steps * each
    steps = sum(phase.steps for phase in phases)
    most, kept, peak = max(peaks, key=itemgetter(0))
    kept, peak = ({name: n / GIB for name, n in part.items()} for part in (kept, peak))
    return Estimate(most / GIB, flops / max(steps, 1), steps, kept, peak)
