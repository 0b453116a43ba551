"""Before a run: how much memory and time it needs, whether it fits, and what to change until it does.

What is kept (weights, copies, optimiser) is counted. What a pass needs beyond that is measured: the loop's own functions run on the real network
with fake tensors, which have sizes but no contents. So SDXL at 1024 px takes seconds on any machine, and nothing is allocated."""

import functools
import inspect
import json
import math
import os
import time
import weakref
from dataclasses import dataclass
from types import MethodType

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from mu import train
from mu.models import frozen_copy, load_pipeline, predict_noise, reference, trainable
from mu.objectives import gradients, predictions, squared_errors
from mu.sizes import SIZES

GIB = 2**30
# name → GiB that a program sees; peak TFLOP/s in half and in single precision (data sheets, dense); has bfloat16
GPUS = {"T4": (14.56, 65, 8.1, False), "L4": (22.0, 121, 30, True), "A10G": (22.0, 70, 31, True), "RTX 3090": (23.6, 71, 36, True),
        "RTX 4090": (23.5, 165, 83, True), "A100-40": (39.4, 312, 19.5, True), "A100-80": (79.1, 312, 19.5, True), "H100": (79.1, 989, 67, True)}
UTILISATION = 0.15  # share of that peak which small batches of these networks reach: a guess, right within a factor of two or three
RESERVE = 0.75  # GiB of a GPU for CUDA itself, the libraries' workspaces and gaps between blocks
DEFAULTS = {name: value.default for f in (load_pipeline, train.State, train.unlearn) for name, value in inspect.signature(f).parameters.items()
            if value.default is not value.empty} | {"steps": 100, "resolution": None, "frozen_dtype": "same", "lr": 1e-5}


class Tracker(TorchDispatchMode):
    """Bytes of the storages that operations inside a `with` block make, now and at most, and the operations' FLOPs; real tensors or fake ones.

    Not seen: what a kernel takes for itself while it runs (workspaces)."""

    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = flop_registry | dict(zip(cpu, (sdpa_flop, sdpa_backward_flop)))

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.peak, self.flops = set(), 0, 0, 0

    def _follow(self, values, new):
        for storage in (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)):
            key, size = storage._cdata, storage.nbytes() if new else 0  # what comes in unknown was there before
            if key not in self.known:
                self.known.add(key)
                self.bytes += size
                weakref.finalize(storage, self._forget, key, size).atexit = False
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._follow((args, kwargs), new=False)
        out = func(*args, **kwargs)
        self._follow(out, new=True)
        if func._overloadpacket in self.formulas:
            self.flops += self.formulas[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


@functools.cache
def _network(config, subset, rank, dtype, precision, gradient_checkpointing, frozen_dtype, gpu, plain):
    """The fake UNet as `load_pipeline`, `frozen_copy` and `trainable` make it: mode of its tensors, UNet, frozen UNet, trained parameters."""
    with torch.device("meta"):  # where modules can be converted and copied, which fake ones cannot
        unet = UNet2DConditionModel.from_config(json.loads(config))
    unet = unet.requires_grad_(False).to(dtype).eval()
    if plain:
        unet.set_attn_processor(AttnProcessor())
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if precision != "no":
        autocast = torch.autocast("cpu", {"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
        unet.forward = MethodType(convert_outputs_to_fp32(autocast(unet.forward.__func__)), unet)
    frozen = frozen_copy(unet, frozen_dtype)
    trainable(unet, subset, rank)
    mode = FakeTensorMode()  # its tensors are a CPU's, since those of a GPU need a build with CUDA
    with mode:
        for module in (m for net in (unet, frozen) if net is not None for m in net.modules()):
            norm = gpu and precision != "no" and isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
            if norm:  # autocast on a GPU computes them in float32, on a CPU in half precision
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=torch.float32 if norm else p.dtype), p.requires_grad)
    return mode, unet, frozen, [p for p in unet.parameters() if p.requires_grad]


@functools.cache
def _pass(kind, rows, side, tokens, accumulated, *network):
    """Bytes that one pass needs at most, beyond the weights, and its FLOPs.

    kind: sample (the student, no gradient), frozen, train (with its gradient), second (and a Hessian-vector product).
    accumulated: two micro-batches of so many rows, after which the need does not grow any more; the FLOPs are per micro-batch."""
    mode, unet, frozen, parameters = _network(*network)
    with mode, Tracker() as tracker:
        n, c = rows * (1 + accumulated), unet.config
        latents, noise = (torch.empty(n, c.in_channels, side, side) for _ in range(2))
        conditioning = {"encoder_hidden_states": torch.empty(n, tokens, c.cross_attention_dim)}
        if c.addition_embed_type == "text_time":
            conditioning |= {"text_embeds": torch.empty(n, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim), "time_ids": torch.empty(n, 6)}
        part = (latents, torch.zeros(n, dtype=torch.long), conditioning, noise)
        if kind == "sample":
            with torch.no_grad():
                predict_noise(unet, *part[:3])
        elif kind == "frozen":
            with reference(unet, frozen) as net:
                predictions(net, part)
        else:
            gradient = gradients(squared_errors(unet, part, accumulation=1 + accumulated)[0], parameters, create_graph=kind == "second")
            if kind == "second":
                gradients(gradient, parameters, grad_outputs=[torch.empty_like(g) for g in gradient], allow_unused=True)
    return tracker.peak, tracker.flops / (1 + accumulated)


def _moments(name, parameters):
    """Bytes of an optimiser's state. bitsandbytes: one byte a moment and a float32 for each 256; tensors below 4,096 elements stay in float32."""
    if name == "sgd":
        return 0
    return sum(8 * p.numel() if "8bit" not in name or p.numel() < 4096 else 2 * p.numel() + 8 * math.ceil(p.numel() / 256) for p in parameters)


@dataclass(frozen=True)
class Estimate:
    gib: float  # peak memory of the loop
    flops: float  # of an outer step
    kept: dict  # what → GiB, all the time
    phases: dict  # phase of an outer step → GiB at its peak, what is kept included


def estimate(model, parameters=None, gpu=True):
    """Memory and FLOPs of `mu.train.unlearn` for one process. model: a pipeline, or a name of `mu.sizes.SIZES`, of which nothing is loaded.

    parameters: those of `load_pipeline`, `State` and `unlearn` by name, as the notebooks have them, and besides: steps (100), resolution (pixels; the
    model's own), frozen_dtype ("same"; see `frozen_copy`). gpu: attention and autocast as on a GPU, or as on a CPU.
    Assumed: text encoders and VAE are elsewhere (`mu.models.offload`). Raises ValueError for an unknown model or parameter, or batches that accumulation
    does not divide; as `trainable` and `frozen_copy` do."""
    unknown = set(parameters or {}) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"unknown parameter {sorted(unknown)[0]!r}: allowed are {', '.join(sorted(DEFAULTS))}")
    if isinstance(model, str) and model not in SIZES:
        raise ValueError(f"no sizes of {model!r}: allowed are {', '.join(SIZES)}, or a pipeline (load_pipeline)")
    p = DEFAULTS | (parameters or {})
    config, tokens, scale = (SIZES[model]["unet"], 77, 8) if isinstance(model, str) else (dict(model.unet.config), model.tokenizer.model_max_length, model.vae_scale_factor)
    side, k = p["resolution"] // scale if p["resolution"] else config["sample_size"], p["accumulation"]
    dtype = getattr(torch, p["dtype"]) if isinstance(p["dtype"], str) else p["dtype"]
    plain = p["order"] == "second" or (not gpu and config["sample_size"] <= 32)
    network = (json.dumps(config), p["subset"], p["rank"], dtype, p["precision"], p["gradient_checkpointing"], p["frozen_dtype"], gpu, plain)
    _, unet, frozen, trained = _network(*network)

    attack, clean, b, inner, retain = (p["relearn"] or p["self_destruct"]), p["clean"], p["batch_size"], p["inner_batch_size"], p["retain_batch_size"]
    sdd, many = p["method"] == "sdd", lambda value: list(value) if isinstance(value, (list, tuple)) else [value]
    parts = {"ESD": b * bool(p["unlearn"]), "related": retain * bool(p["retain"] or attack or clean), "empty": -(-retain // 2) * bool(p["retain"]),
             "any": -(-retain // 2) * bool(p["retain"] and p["retain_prompts"]), "ascent": inner * bool(p["ascent"]), "attack": inner * bool(attack or clean)}
    if any(n % k for n in parts.values()):
        raise ValueError(f"accumulation {k} does not divide all of {', '.join(f'{n} rows ({name})' for name, n in parts.items() if n)}: choose a divisor of them")
    drift = (2 * retain + parts["empty"] + parts["any"]) * bool(p["retain"])
    outer = {"attack": (inner + retain) * bool(attack), "CLEAN": 2 * retain * bool(clean)}
    share = {"attack": 1 - 1 / p["clean_every"] if clean else 1, "CLEAN": 1 / p["clean_every"]}
    at_theta = parts["ESD"] + 2 * parts["related"] + parts["empty"] + parts["any"] + parts["ascent"]

    def cost(kind, rows):
        """Bytes, FLOPs of so many rows."""
        if not rows:
            return 0, 0
        peak, flops = _pass(kind, rows // k if kind != "sample" else rows, side, tokens, k > 1 and kind in ("train", "second"), *network)
        return peak, flops * (k if kind != "sample" else 1)

    weights = lambda network: sum(x.numel() * x.element_size() for x in network)
    theta = weights(trained)
    kept = {"UNet": weights(unet.parameters()), "frozen UNet": weights(frozen.parameters()) if frozen is not None else 0,
            "optimiser": _moments(p["optimizer"], trained), "average": theta * bool(p["ema"])}
    held = theta * (2 if p["snapshot"] in (None, "device") or not gpu else 1) + max(_moments(name, trained) for name in many(p["inner_optimizer"]))
    trajectory, target, asked = (cost("sample", 2 * parts["ESD"]), cost("frozen", parts["ESD"] * sdd), cost("frozen", 2 * parts["ESD"] * (not sdd) + drift))
    first = cost("train", at_theta)
    steps, after = cost("train", parts["attack"]), {name: cost("train", rows) for name, rows in outer.items()}
    second = cost("second", parts["attack"] if p["order"] == "second" else 0)
    phases = {"trajectory": trajectory[0] + theta * bool(p["ema"]), "frozen UNet": max(asked[0], target[0]), "gradient at θ": first[0],
              "simulated fine-tuning": max(steps[0], *(peak for peak, _ in after.values()), second[0] + theta * bool(second[0])) + held if parts["attack"] else 0,
              "update": theta * (2 if parts["attack"] else 1)}
    m = sum(many(p["inner_steps"])) / len(many(p["inner_steps"]))
    sampled = p["trajectory_steps"] / (p["trajectory_reuse"] + 1)  # the latest of n stops is at n / (n + 1) of the way, on average, each n steps
    flops = trajectory[1] * sampled + asked[1] + target[1] + first[1] + sum(share[name] * (cost_[1] + m * steps[1]) for name, cost_ in after.items() if outer[name])
    if second[1]:
        flops += m * second[1] + m * (m - 1) / 2 * steps[1]
    total = sum(kept.values())
    return Estimate((total + max(phases.values())) / GIB, flops, {k: v / GIB for k, v in kept.items()}, {k: (total + v) / GIB for k, v in phases.items() if v})
