"""Choose which weights are trained: subsets of the UNet, or LoRA adapters."""

import torch
from peft import LoraConfig

NOT_U = ("conv_out", "time_embedding", "add_embedding", "conv_norm_out")
SUBSETS = {  # ESD's names → whether a parameter is trained
    "x": lambda name: "attn2" in name,
    "u": lambda name: "attn2" not in name and not name.startswith(NOT_U),
    "f": lambda name: True,
    "lora": lambda name: "lora_" in name,
}
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]


def without_lora(unet, fuse=False):
    """Remove the UNet's adapters, after adding them to its weights if `fuse`; returns it."""
    if hasattr(unet, "peft_config"):
        if fuse:
            unet.fuse_lora()
        unet.unload_lora()
    return unet


def trainable(unet, subset="u", rank=16):
    """Return name → parameter of a subset, and freeze the rest.

    subset: x (cross attention), u (all but cross attention, time embedding and output), f (full),
    or lora (float32 adapters of `rank` in all attention blocks). Raises ValueError for another
    subset, and for half-precision weights: small steps would be rounded away.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}: choose {', '.join(SUBSETS)}")
    unet.requires_grad_(False)
    if subset == "lora" and not hasattr(unet, "peft_config"):
        kind = dict(r=rank, lora_alpha=rank, init_lora_weights="gaussian")
        unet.add_adapter(LoraConfig(**kind, target_modules=LINEAR))
    chosen = {name: p for name, p in unet.named_parameters() if SUBSETS[subset](name)}
    for p in chosen.values():
        if subset == "lora":
            p.data = p.data.float()
        elif p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"subset {subset!r} would train weights in {p.dtype}: load them in float32 "
                "(weights_dtype full), or train subset lora"
            )
        p.requires_grad_(True)
    return chosen
