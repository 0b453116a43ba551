"""Before a run: how much memory and time it needs, whether it fits, and what to change until it does.

What is kept (weights, copies, optimiser) is counted. What a pass needs beyond that is measured: the loop's own functions run on the real network
with fake tensors, which have sizes but no contents. So SDXL at 1024 px takes a minute on any machine, and nothing is allocated."""

import functools
import json
import math
import time
import weakref
from dataclasses import dataclass
from types import MethodType

import numpy as np
import psutil
import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from mu.frozen import frozen_copy, reference
from mu.models import predict_noise
from mu.notebooks.sizes import random_pipeline
from mu.objectives import gradients, predictions, squared_errors
from mu.runs.train import check_method
from mu.trainable import trainable

GIB = 2**30
# name → GiB that a program sees; peak TFLOP/s in half and in single precision (data sheets, dense); has bfloat16
GPUS = {
    "T4": (14.56, 65, 8.1, False),
    "L4": (22.0, 121, 30, True),
    "A10G": (22.0, 70, 31, True),
    "RTX 3090": (23.6, 71, 36, True),
    "RTX 4090": (23.5, 165, 83, True),
    "A100-40": (39.4, 312, 19.5, True),
    "A100-80": (79.1, 312, 19.5, True),
    "H100": (79.1, 989, 67, True),
}
UTILISATION = 0.15  # share of that peak which small batches of these networks reach: a guess, right within a factor of three
CPU_SHARE = 0.65  # of a CPU's free memory that tensors may take: the process takes half as much again, for kernels and for gaps in the heap
RESERVE = 0.75  # GiB of a GPU for CUDA itself, the libraries' workspaces and gaps between blocks
DEFAULTS = dict(  # of the notebooks' parameters that memory or time depends on; and resolution, pixels (the model's own)
    method="esd-f",
    subset="",
    rank=16,
    optimizer="adamw",
    ema=0.999,
    steps=100,
    unlearn=1.0,
    batch_size=4,
    trajectory_steps=20,
    trajectory_reuse=8,
    retain=0.0,
    retain_batch_size=8,
    retain_prompts=0,
    ascent=0.0,
    relearn=0.0,
    self_destruct=0.0,
    clean=0.0,
    clean_every=3,
    inner_steps=1,
    inner_batch_size=8,
    inner_optimizer="sgd",
    order="first",
    precision="no",
    weights="full",
    frozen="same",
    gradient_checkpointing=False,
    accumulation=1,
    snapshot="",
    offload=False,
    processes=1,
    resolution=0,
)


_sizes = functools.cache(functools.partial(random_pipeline, device="meta"))


class Tracker(TorchDispatchMode):
    """Bytes of the storages that operations inside a `with` block make, after each of them, and the operations' FLOPs; real tensors or fake ones.

    Not seen: what a kernel takes for itself while it runs (workspaces)."""

    cpu = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    formulas = flop_registry | dict(zip(cpu, (sdpa_flop, sdpa_backward_flop), strict=False))

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.timeline, self.flops = set(), 0, [0], 0

    def _follow(self, values, new):
        for x in values:
            if isinstance(x, (list, tuple)):
                self._follow(x, new)
            elif (
                isinstance(x, torch.Tensor)
                and (key := x.untyped_storage()._cdata) not in self.known
            ):
                size = (
                    x.untyped_storage().nbytes() if new else 0
                )  # what comes in unknown was there before
                self.known.add(key)
                self.bytes += size
                weakref.finalize(x.untyped_storage(), self._forget, key, size).atexit = False

    def _forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._follow((args, *kwargs.values()), new=False)
        out = func(*args, **kwargs)
        self._follow((out,), new=True)
        self.timeline.append(self.bytes)
        if func._overloadpacket in self.formulas:
            self.flops += self.formulas[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


@functools.cache
def _network(config, subset, rank, dtype, precision, gradient_checkpointing, frozen, gpu, plain):
    """The fake UNet as `load_pipeline`, `frozen_copy` and `trainable` make it: mode of its tensors, UNet, frozen UNet, trained parameters."""
    with torch.device("meta"):  # where modules can be converted and copied, which fake ones cannot
        unet = UNet2DConditionModel.from_config(json.loads(config))
    unet = torch.nn.Module.to(
        unet.requires_grad_(False).eval(), dtype
    )  # not diffusers' own `to`, which warns of any change of precision
    if plain:
        unet.set_attn_processor(AttnProcessor())
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if precision != "no":
        autocast = torch.autocast("cpu", {"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
        unet.forward = MethodType(convert_outputs_to_fp32(autocast(unet.forward.__func__)), unet)
    unet_frozen = frozen_copy(unet, frozen)
    trainable(unet, subset, rank)
    mode = FakeTensorMode()  # its tensors are a CPU's, since those of a GPU need a build with CUDA
    with mode:
        for module in (m for net in (unet, unet_frozen) if net is not None for m in net.modules()):
            norm = (
                gpu
                and precision != "no"
                and isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
            )
            if norm:  # autocast on a GPU computes them in float32, on a CPU in half precision
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty(p.shape, dtype=torch.float32 if norm else p.dtype),
                        p.requires_grad,
                    )
    return mode, unet, unet_frozen, [p for p in unet.parameters() if p.requires_grad]


def blank(config, n, side, tokens, device=None):
    """Noisy latents, timesteps, conditioning and noise of n rows, with nothing in them."""
    new = functools.partial(torch.zeros, device=device)
    conditioning = {"encoder_hidden_states": new(n, tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        conditioning |= {
            "text_embeds": new(
                n, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            ),
            "time_ids": new(n, 6),
        }
    latents = new(n, config.in_channels, side, side)
    return latents, new(n, dtype=torch.long), conditioning, torch.zeros_like(latents)


@functools.cache
def _trace(kind, n, side, tokens, accumulation, *network):
    """Bytes beyond the weights after each operation of one pass of n rows (an array), and the pass's FLOPs.

    kind: sample (the student, no gradient), frozen, train (with its gradient), second (with a Hessian-vector product, too)."""
    mode, unet, unet_frozen, parameters = _network(*network)
    with mode, Tracker() as tracker:
        part = blank(unet.config, n, side, tokens)
        if kind == "sample":
            with torch.no_grad():
                predict_noise(unet, *part[:3])
        elif kind == "frozen":
            with reference(unet, unet_frozen) as net:
                predictions(net, part, accumulation=accumulation)
        else:
            gradient = gradients(
                squared_errors(unet, part, accumulation=accumulation)[0],
                parameters,
                create_graph=kind == "second",
            )
            if kind == "second":
                gradients(
                    gradient,
                    parameters,
                    grad_outputs=[torch.empty_like(g) for g in gradient],
                    allow_unused=True,
                )
    return np.array(tracker.timeline, dtype=float), tracker.flops


def _pass(kind, rows, accumulation, *key):
    """Bytes that a pass of so many rows needs at most, beyond the weights, and its FLOPs. Every tensor's size is affine in the rows of a micro-batch,
    so two traces tell all numbers of rows; after two micro-batches the need does not grow any more."""
    if not rows:
        return 0, 0
    each, once = rows / accumulation, min(accumulation, 2)
    (bytes_2, flops_2), (bytes_3, flops_3) = (
        _trace(kind, n * once, *key[:2], once, *key[2:]) for n in (2, 3)
    )
    return float(max(bytes_2 + (each - 2) * (bytes_3 - bytes_2))), (
        flops_2 + (each - 2) * (flops_3 - flops_2)
    ) * accumulation / once


def _moments(name, parameters):
    """Bytes of an optimiser's state. bitsandbytes: one byte a moment and a float32 for each 256; tensors below 4,096 elements stay in float32."""

    def small(p):
        return "8bit" not in name or p.numel() < 4096

    return (
        0
        if name == "sgd"
        else sum(
            8 * p.numel() if small(p) else 2 * p.numel() + 8 * math.ceil(p.numel() / 256)
            for p in parameters
        )
    )


@dataclass(frozen=True)
class Estimate:
    gib: float  # peak memory of the loop
    flops: float  # of an outer step, on average
    kept: dict  # what → GiB that it takes all the time
    phases: dict  # phase → GiB at its peak, what is kept included


def _known(model, p, gpu):
    """A pipeline (or the sizes of a name), the objective of the method, and what `_pass` has to know: side, tokens, network."""
    dtype = torch.bfloat16 if p["weights"] == "half" else torch.float32
    pipe = _sizes(model, dtype) if isinstance(model, str) else model
    config, (objective, own_subset) = pipe.unet.config, check_method(p["method"])
    side, plain = (
        p["resolution"] // pipe.vae_scale_factor or config.sample_size,
        p["order"] == "second" or (not gpu and config.sample_size <= 32),
    )
    network = (
        json.dumps(dict(config)),
        p["subset"] or own_subset,
        p["rank"],
        dtype,
        p["precision"],
        p["gradient_checkpointing"],
        p["frozen"],
        gpu,
        plain,
    )
    return pipe, objective, (side, pipe.tokenizer.model_max_length, *network)


def pass_flops(model, kind, rows, parameters=None, gpu=True):
    """FLOPs of one pass of so many rows: kind "sample" (no gradient) or "train" (with the gradient of the subset). The rest is as in `estimate`."""
    return _pass(kind, rows, 1, *_known(model, DEFAULTS | (parameters or {}), gpu)[2])[1]


def estimate(model, parameters=None, gpu=True):
    """Memory and FLOPs of a training of `mu.runs.train`, on each of its processes. Pictures drawn before and after it are not counted.

    model: a pipeline, or a name of `mu.notebooks.sizes.SIZES`, of which nothing is loaded. parameters: those of `DEFAULTS`, with the meaning that they
    have in the notebooks. gpu: attention and autocast as on a GPU, or as on a CPU.
    Raises ValueError for an unknown model or parameter, and for batches that cannot be shared evenly; as `trainable` and `frozen_copy` do."""
    unknown, p = set(parameters or {}) - set(DEFAULTS), DEFAULTS | (parameters or {})
    if unknown:
        raise ValueError(
            f"unknown parameter {sorted(unknown)[0]!r}: allowed are {', '.join(DEFAULTS)}"
        )
    words = {
        "weights": ("full", "half"),
        "precision": ("no", "fp16", "bf16"),
        "optimizer": ("adamw", "adam", "sgd", "adamw8bit"),
        "order": ("first", "second"),
    }
    for name, allowed in words.items():
        if p[name] not in allowed:
            raise ValueError(f"unknown {name} {p[name]!r}: allowed are {', '.join(allowed)}")
    pipe, objective, (side, tokens, *network) = _known(model, p, gpu)
    k, m, second = p["accumulation"], float(np.mean(p["inner_steps"])), p["order"] == "second"
    _, unet, unet_frozen, trained = _network(*network)

    esd, sdd, attack, clean = (
        (objective == "esd"),
        (objective == "sdd"),
        bool(p["relearn"] or p["self_destruct"]),
        bool(p["clean"]),
    )
    part = {
        "batch_size": p["batch_size"] * bool(objective and p["unlearn"]),
        "inner_batch_size": p["inner_batch_size"] * bool(attack or clean or p["ascent"]),
        "retain_batch_size": p["retain_batch_size"] * bool(p["retain"] or attack or clean),
        "half of it": -(-p["retain_batch_size"] // 2) * bool(p["retain"]),
    }
    for name, n in part.items():
        if n % (p["processes"] * k):
            raise ValueError(
                f"{n} rows ({name}) cannot be shared among {p['processes']} processes × {k} micro-batches: choose multiples of that"
            )
    b, inner, retain, empty = (n // p["processes"] for n in part.values())
    drift = 2 * retain + empty * (2 if p["retain_prompts"] else 1) if empty else 0

    def cost(kind, rows):
        return _pass(kind, rows, 1 if kind == "sample" else k, side, tokens, *network)

    trajectory, target, asked = (
        cost("sample", 2 * b),
        cost("sample", b * sdd),
        cost("frozen", 2 * b * esd + drift),
    )
    at_theta = cost("train", b + max(drift, 2 * retain) + inner * bool(p["ascent"]))
    step, after, after_clean = (
        cost("train", rows)
        for rows in (inner * (attack or clean), (inner + retain) * attack, 2 * retain * clean)
    )
    product = cost("second", inner * second * (attack or clean))

    def size(*modules):
        return sum(
            x.numel() * x.element_size()
            for module in modules
            if module is not None
            for x in module.parameters()
        )

    theta, others = (
        sum(x.numel() * 4 for x in trained),
        size(
            *(
                module
                for name, module in pipe.components.items()
                if name in ("vae", "text_encoder", "text_encoder_2")
            )
        ),
    )
    names = (
        p["inner_optimizer"].split(",")
        if isinstance(p["inner_optimizer"], str)
        else p["inner_optimizer"]
    )
    kept = {
        "UNet": size(unet),
        "frozen UNet": size(unet_frozen),
        "optimiser": _moments(p["optimizer"], trained),
        "average": theta * bool(sdd and p["ema"]),
        "VAE, text encoders": 0 if p["offload"] and gpu else others,
        "random prompts": 4 * p["retain_prompts"] * tokens * unet.config.cross_attention_dim,
    }
    held = theta * (1 if p["snapshot"] == "cpu" and gpu else 2) + max(
        _moments(name, trained) for name in names
    )  # first gradient, snapshot, moments
    total = sum(kept.values())
    phases = {
        "trajectory": trajectory[0] + kept["average"],
        "frozen UNet": asked[0],
        "gradient at θ": at_theta[0],
        "simulated fine-tuning": (
            max(step[0], after[0], after_clean[0], product[0] + theta * second) + held
        )
        * bool(step[0]),
        "update": theta * (2 if attack or clean else 1),
    }
    phases = {name: (total + more) / GIB for name, more in phases.items() if more}
    phases["start"] = (
        kept["UNet"] + kept["frozen UNet"] + others
    ) / GIB  # before anything is offloaded
    often = 1 / p["clean_every"] if clean else 0
    flops = (
        trajectory[1]
        * p["trajectory_steps"]
        / (
            p["trajectory_reuse"] + 1
        )  # the latest of n stops is at n / (n + 1) of the way, every n steps
        + target[1]
        + asked[1]
        + at_theta[1]
        + often * after_clean[1]
        + (1 - often) * after[1]
        + (often + (1 - often) * attack)
        * m
        * (step[1] + product[1] + second * (m - 1) / 2 * step[1])
    )
    return Estimate(
        max(phases.values()), flops, {name: n / GIB for name, n in kept.items() if n}, phases
    )


def speed(pipe, rows=4):
    """FLOP/s that the pipeline's UNet reaches where it is: the fastest of three timed passes without gradient, after one to warm up."""
    part = blank(
        pipe.unet.config,
        rows,
        pipe.unet.config.sample_size,
        pipe.tokenizer.model_max_length,
        pipe.unet.device,
    )
    wait, seconds = torch.cuda.synchronize if pipe.unet.device.type == "cuda" else lambda: None, []
    with torch.no_grad():
        with Tracker() as tracker:
            predict_noise(pipe.unet, *part[:3])
        for _ in range(3):
            wait()
            began = time.perf_counter()
            predict_noise(pipe.unet, *part[:3])
            wait()
            seconds.append(time.perf_counter() - began)
    return tracker.flops / min(seconds)


def _device(gpu):
    """Name, usable GiB, TFLOP/s in half and in single precision (nan: not known), has bfloat16, is a GPU; of one of GPUS or the device at hand."""
    if gpu not in (None, *GPUS):
        raise ValueError(
            f"unknown GPU {gpu!r}: allowed are {', '.join(GPUS)}, or None for the device at hand"
        )
    if gpu is None and not torch.cuda.is_available():
        return (
            "this CPU",
            CPU_SHARE
            * (psutil.virtual_memory().available + psutil.Process().memory_info().rss)
            / GIB,
            math.nan,
            math.nan,
            True,
            False,
        )
    name = gpu or torch.cuda.get_device_name()
    memory, half, single, bf16 = next(
        (
            values
            for key, values in GPUS.items()
            if gpu == key or not gpu and key.split("-")[0] in name
        ),
        (0, math.nan, math.nan, True),
    )
    if gpu is None:
        memory = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    return name, memory - RESERVE, half, single, bf16, True


def guessed_speed(precision, gpu=None):
    """FLOP/s of the GPU at hand, or of one of GPUS: a guess from its data sheet (`UTILISATION`); nan where there is none, or an unknown one."""
    _, _, half, single, bf16, _ = _device(gpu)
    return (
        (half if precision == "fp16" or (precision == "bf16" and bf16) else single)
        * 1e12
        * UTILISATION
    )


def _changes(p, bf16, gpu):
    """What takes less memory, in the order of what it costs: first what leaves the result as it is, then its precision, then the experiment."""
    yield {"offload": True} if gpu else {}
    yield {"gradient_checkpointing": True}
    yield {"snapshot": "cpu"} if gpu else {}
    yield {"precision": "bf16" if bf16 else "fp16"} if p["precision"] == "no" else {}
    yield from ({"accumulation": p["accumulation"] * factor} for factor in (2, 3, 5))
    yield {"frozen": "half"} if p["frozen"] == "same" else {}
    yield {"optimizer": "adamw8bit"} if p["optimizer"] in ("adam", "adamw") else {}
    yield {"inner_optimizer": "adam8bit"} if p["inner_optimizer"] == "adam" else {}
    yield {
        name: max(1, p[name] // 2)
        for name in ("batch_size", "inner_batch_size", "retain_batch_size")
    }
    yield {"subset": "lora", "frozen": "none"}
    yield {"weights": "half"} if p["subset"] == "lora" else {}


@dataclass(frozen=True)
class Preflight:
    device: str
    usable: float  # GiB
    timed: bool  # minutes from a pass that was timed (else a guess from the data sheet)
    needs: list  # (change, GiB, minutes): as asked ({}), then with each change and those before it; minutes are nan where the speed is not known
    estimate: Estimate  # as asked

    fits = property(lambda self: self.needs[0][1] <= self.usable)

    def __str__(self):
        (_, gib, _), *changed = self.needs
        times = [
            "time unknown"
            if math.isnan(m)
            else f"about {m:.{0 if m > 10 else 1}f} minutes" + " (a guess)" * (not self.timed)
            for *_, m in self.needs
        ]
        lines = [
            f"{'fits' if self.fits else 'does not fit'} {self.device}: {gib:.1f} GiB at most, {self.usable:.1f} are usable; {times[0]}"
        ]
        lines += ["to make it fit, one after the other:"] * bool(changed)
        lines += [
            f"  {', '.join(f'{k} = {v!r}' for k, v in change.items())}: {gib:.1f} GiB, {t}"
            for (change, gib, _), t in zip(changed, times[1:], strict=False)
        ]
        return "\n".join(
            lines
            + ["that is still too much: take a smaller resolution, or a larger GPU"]
            * (self.needs[-1][1] > self.usable)
        )


def preflight(model, parameters=None, gpu=None):
    """Whether a training fits the device at hand, or one of GPUS, how long it takes, and what to change until it fits.

    model, parameters: see `estimate`, which raises. Minutes are those of the UNet's passes; a pipeline at hand is timed, otherwise they are a guess."""
    name, usable, _, _, bf16, on_gpu = _device(gpu)
    timed = speed(model) if gpu is None and not isinstance(model, str) else None

    def minutes(e, p):
        return e.flops * p["steps"] / (timed or guessed_speed(p["precision"], gpu)) / 60

    p, first = DEFAULTS | (parameters or {}), estimate(model, parameters, on_gpu)
    needs = [({}, first.gib, minutes(first, p))]
    while needs[-1][1] > usable:
        for change in _changes(p, bf16, on_gpu):
            try:
                found = estimate(model, p | change, on_gpu)
            except ValueError:  # batches that cannot be shared so
                continue
            if found.gib < 0.99 * needs[-1][1]:
                break
        else:
            break
        p |= change
        needs.append((change, found.gib, minutes(found, p)))
    return Preflight(name, usable, timed is not None, needs, first)
