"""The frozen reference UNet, and what training does not need on the GPU."""

import contextlib
import copy

import torch

from mu.devices import half
from mu.models import text_encoders


def offload(pipe):
    """Move VAE and text encoders to the CPU's memory; `draw_images` fetches them again."""
    for part in (pipe.vae, *text_encoders(pipe)):
        part.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def frozen_copy(unet, dtype="same"):
    """Return ε_0, a frozen copy of the UNet in the same or in half precision.

    dtype: "same", "half", or "none" for LoRA: returns None, and `reference` switches the adapters
    off instead. Raises ValueError for another value.
    """
    if dtype not in ("same", "half", "none"):
        raise ValueError(f"unknown frozen_dtype {dtype!r}: choose same, half, or none (for LoRA)")
    if dtype == "none":
        return None
    weights = {}
    for p in unet.parameters():
        copied = p.detach().to(half(unet.device) if dtype == "half" else p.dtype, copy=True)
        weights[id(p)] = torch.nn.Parameter(copied, requires_grad=False)
    return copy.deepcopy(unet, weights)  # uses these: there is never a second full copy


@contextlib.contextmanager
def reference(unet, unet_frozen):
    """Yield the frozen UNet; for None the UNet with its adapters switched off."""
    if unet_frozen is not None:
        yield unet_frozen
        return
    if not hasattr(unet, "peft_config"):
        raise ValueError("unet_frozen=None needs adapters: train subset 'lora', or pass a copy")
    unet.disable_adapters()
    try:
        yield unet
    finally:
        unet.enable_adapters()
