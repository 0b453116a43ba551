"""Memory and FLOPs of one UNet pass, traced on fake tensors, which have sizes but no contents.

The functions of the training loop run on the real architecture, but nothing is allocated: SDXL at
1024 px takes a minute on any machine.
"""

import functools
import json
import weakref
from dataclasses import dataclass
from types import MethodType
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from mu.frozen import frozen_copy, reference
from mu.losses import Inputs, Minibatch, denoising, gradients, predictions, squared_errors
from mu.models import predict
from mu.trainable import trainable

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)
FORMULAS = flop_registry | {  # attention on a CPU, which the registry lacks
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Tracker(TorchDispatchMode):
    """Tracks the memory and FLOPs of operations in a `with` block, on real or fake tensors.

    `bytes` is the size of the living storages that the block created, `timeline` its value after
    each operation. A kernel's own workspace is not counted.
    """

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.timeline, self.flops = set(), 0, [0], 0

    def _follow(self, values, new):
        for x in values:
            if isinstance(x, (list, tuple)):
                self._follow(x, new)
            elif isinstance(x, torch.Tensor):
                self._follow_storage(x.untyped_storage(), new)

    def _follow_storage(self, storage, new):
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if new else 0  # an unknown input existed before the block
        self.known.add(key)
        self.bytes += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._follow((args, *kwargs.values()), new=False)
        out = func(*args, **kwargs)
        self._follow((out,), new=True)
        self.timeline.append(self.bytes)
        if func._overloadpacket in FORMULAS:
            self.flops += FORMULAS[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


@dataclass(frozen=True)
class Network:
    """What the memory and FLOPs of a UNet pass depend on, besides its rows."""

    config: str  # of the UNet, as JSON
    side: int  # of the latents
    tokens: int  # per prompt
    dtype: torch.dtype  # of the weights
    subset: str = "f"
    rank: int = 16  # of LoRA
    precision: str = "no"
    gradient_checkpointing: bool = False
    frozen_dtype: str = "same"
    gpu: bool = True  # attention and autocast as on a GPU, or as on a CPU
    plain: bool = False  # attention by plain products


class Cost(NamedTuple):
    """Cost of a UNet pass."""

    memory: float = 0  # peak, bytes beyond the weights
    flops: float = 0


def autocast_forward(unet, precision):
    """Run the UNet's forward pass under autocast, in place, as accelerate does."""
    autocast = torch.autocast("cpu", DTYPES[precision])
    unet.forward = MethodType(convert_outputs_to_fp32(autocast(unet.forward.__func__)), unet)


def make_fake(module, norms_in_float32):
    """Replace a module's own parameters by fake ones, inside a `FakeTensorMode`."""
    is_cast = norms_in_float32 and isinstance(module, NORMS)
    if is_cast:
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    for name, p in module._parameters.items():
        if p is not None:
            fake = torch.empty(p.shape, dtype=torch.float32 if is_cast else p.dtype)
            module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)


@functools.cache
def fake_network(network):
    """Return the mode of the fake tensors, UNet, frozen UNet and trained parameters.

    They are as `load_pipeline`, `frozen_copy` and `trainable` make them.
    """
    with torch.device("meta"):  # meta modules can be converted and copied, fake ones cannot
        unet = UNet2DConditionModel.from_config(json.loads(network.config))
    unet.requires_grad_(False).eval()
    torch.nn.Module.to(unet, network.dtype)  # diffusers' own `to` warns of a change of precision
    if network.plain:
        unet.set_attn_processor(AttnProcessor())
    if network.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if network.precision != "no":
        autocast_forward(unet, network.precision)
    unet_frozen = frozen_copy(unet, network.frozen_dtype)
    trainable(unet, network.subset, network.rank)
    # autocast computes norms in float32 on a GPU, in half precision on a CPU
    norms_in_float32 = network.gpu and network.precision != "no"
    with FakeTensorMode() as mode:  # on the CPU: fake GPU tensors need a CUDA build
        for net in (unet, unet_frozen):
            for module in net.modules() if net is not None else ():
                make_fake(module, norms_in_float32)
    return mode, unet, unet_frozen, [p for p in unet.parameters() if p.requires_grad]


def blank(config, n, side, tokens, device=None):
    """Return a `Minibatch` of n rows of zeros for a UNet of this config."""
    new = functools.partial(torch.zeros, device=device)
    conditioning = {"encoder_hidden_states": new(n, tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        ids = 6
        width = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        conditioning |= {"text_embeds": new(n, width), "time_ids": new(n, ids)}
    latents = new(n, config.in_channels, side, side)
    inputs = Inputs(latents, new(n, dtype=torch.long), conditioning)
    return Minibatch(inputs, torch.zeros_like(latents))


def run_pass(kind, batch, accumulation, unet, unet_frozen, parameters):
    """Run one pass of a kind of `pass_cost`."""
    if kind == "sample":
        with torch.no_grad():
            predict(unet, *batch.inputs)
        return
    if kind == "frozen":
        with reference(unet, unet_frozen) as net:
            predictions(net, [batch.inputs], accumulation)
        return
    loss = squared_errors(unet, [denoising(batch)], accumulation)[0]
    gradient = gradients(loss, parameters, create_graph=kind == "second")
    if kind == "second":
        vector = [torch.empty_like(g) for g in gradient]
        gradients(gradient, parameters, grad_outputs=vector, allow_unused=True)


@functools.cache
def trace(network, kind, n, accumulation=1):
    """Return the bytes beyond the weights after each operation of a pass (array), and its FLOPs."""
    mode, unet, unet_frozen, parameters = fake_network(network)
    with mode, Tracker() as tracker:
        batch = blank(unet.config, n, network.side, network.tokens)
        run_pass(kind, batch, accumulation, unet, unet_frozen, parameters)
    return np.array(tracker.timeline, dtype=float), tracker.flops


def pass_cost(network, kind, rows, accumulation=1):
    """Return the `Cost` of one pass of so many rows.

    kind: sample (UNet without gradient), frozen (frozen UNet), train (with the gradient of the
    trained weights), or second (with a Hessian-vector product as well).
    The size of every tensor is affine in the rows of a micro-batch, so two traces give all row
    counts. Memory does not grow beyond two micro-batches.
    """
    if not rows:
        return Cost()
    traced = min(accumulation, 2)
    bytes_2, flops_2 = trace(network, kind, 2 * traced, traced)
    bytes_3, flops_3 = trace(network, kind, 3 * traced, traced)
    beyond = rows / accumulation - 2
    memory = float(max(bytes_2 + beyond * (bytes_3 - bytes_2)))
    flops = flops_2 + beyond * (flops_3 - flops_2)
    return Cost(memory, flops * accumulation / traced)
