"""Write results in the formats that others read: safetensors with a model card.

A result's folder appears complete or not at all.
"""

import contextlib
import copy
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from mu.publish.weights import DIFFERENCE, check_architecture, fingerprint
from mu.trainable import without_lora


@contextlib.contextmanager
def whole_folder(folder, card=None, overwrite=False):
    """Yield a temporary folder that replaces `folder` once the block succeeds.

    card: text of its README.md. Unless `overwrite`, raises FileExistsError if `folder` has files of
    other names, which would be lost (a run, a git clone).
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    earlier = temporary.with_suffix(".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if card is not None:
            (temporary / "README.md").write_text(card)
        if folder.exists():
            new = {file.name for file in temporary.iterdir()}
            others = sorted({file.name for file in folder.iterdir()} - new)
            if others and not overwrite:
                raise FileExistsError(
                    f"{folder} has {others[0]}, which would be lost: choose a new or empty folder, "
                    "or an earlier result of this kind"
                )
            os.replace(folder, earlier)
        os.replace(temporary, folder)
        shutil.rmtree(earlier, ignore_errors=True)
    except BaseException:  # an interrupt too
        if earlier.exists() and not folder.exists():
            os.replace(earlier, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def forget_paths(folder):
    """Remove local paths from the configs below a folder: diffusers notes where parts came from."""
    for file in [*Path(folder).rglob("config.json"), *Path(folder).glob("model_index.json")]:
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def save_model(model, folder):
    """Save a model or pipeline of diffusers or transformers as a folder, over an earlier one."""
    with whole_folder(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        forget_paths(temporary)


def fused(unet):
    """Return the UNet; if it has LoRA adapters, a plain copy with them in its weights."""
    if hasattr(unet, "peft_config"):
        return without_lora(copy.deepcopy(unet), fuse=True)
    return unet


def save_pipeline(pipe, folder, card):
    """Save the pipeline as a diffusers folder, LoRA fused.

    It lacks what `load_pipeline` leaves out: SD's safety checker.
    """
    unet = pipe.unet
    with whole_folder(folder, card) as temporary:
        try:
            pipe.unet = fused(unet)
            pipe.save_pretrained(temporary, safe_serialization=True)
            forget_paths(temporary)
        finally:
            pipe.unet = unet


def differences(unet, unet_base):
    """Return name → W − W_base, in float32, of the tensors that differ.

    Raises ValueError for another architecture or precision, and if none differs.
    """
    unet, unet_base = fused(unet), fused(unet_base)
    new, base = unet.state_dict(), unet_base.state_dict()
    check_architecture(base, new, "the UNet", complete=True)
    if unet.dtype != unet_base.dtype:
        raise ValueError(
            f"the UNet is in {unet.dtype}, its base in {unet_base.dtype}: load both in the same "
            "precision, or the difference includes rounding"
        )
    changed = [name for name in sorted(new) if not torch.equal(new[name], base[name])]
    if not changed:
        raise ValueError("the UNet is equal to its base: choose an unlearned model")
    return {name: new[name].float() - base[name].float() for name in changed}


def save_difference(unet, unet_base, folder, card, base_model, dtype=torch.float32):
    """Save W − W_base of the tensors that differ as difference.safetensors.

    base_model: hub id of the base. The metadata also hold a fingerprint of the base's weights.
    dtype: float16 halves the file and rounds each weight's change to ± 3e-8.
    """
    changed = differences(unet, unet_base)
    base = fused(unet_base).state_dict()
    metadata = {
        "format": "pt",
        "mu_format": DIFFERENCE,
        "base_model": base_model,
        "class": type(unet).__name__,
        "mu": version("mu"),
        "base_fingerprint": fingerprint({name: base[name] for name in changed}),
    }
    tensors = {name: t.to(dtype).contiguous() for name, t in changed.items()}
    with whole_folder(folder, card) as temporary:
        save_file(tensors, temporary / "difference.safetensors", metadata)


def low_rank(matrix, rank):
    """Return (up (out, rank), down (rank, in), squared norm kept) of the truncated SVD.

    A smaller full rank is padded with zeros: older loaders misread the scale of mixed ranks.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s[:rank]
    pad = rank - len(s)
    up = F.pad(u[:, :rank] * s.sqrt(), (0, pad))
    down = F.pad(s.sqrt()[:, None] * v[:rank], (0, 0, 0, pad))
    return up, down, s.square().sum().item()


def extract_lora(unet, unet_base, rank=16):
    """Approximate W − W_base by a LoRA: `low_rank` of every linear and convolution layer.

    Returns (tensors for `save_lora`; share of the squared difference that they keep; names of the
    changed tensors that no LoRA represents: norms and biases).
    """
    changed = differences(unet, unet_base)
    tensors, left_out, kept = {}, [], 0.0
    for name, d in changed.items():
        if not name.endswith(".weight") or d.ndim < 2:
            left_out.append(name)
            continue
        up, down, norm = low_rank(d.flatten(1), rank)
        kept += norm
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.lora_A.weight"] = down.reshape(rank, *d.shape[1:])
        tensors[f"{layer}.lora_B.weight"] = up.reshape(len(d), rank, *[1] * (d.ndim - 2))
    total = sum(d.square().sum().item() for d in changed.values())
    return tensors, kept / total, left_out


def adapter_tensors(unet):
    """Return the tensors of the UNet's adapter, with alpha / rank in the second matrix.

    Readers need not know the scale then. Raises ValueError unless there is exactly one adapter.
    """
    adapters = list(getattr(unet, "peft_config", {}))
    if len(adapters) != 1:
        raise ValueError(
            f"the UNet has {len(adapters)} LoRA adapters, allowed is one: for trained weights, use "
            "`extract_lora`"
        )
    tensors = get_peft_model_state_dict(unet, adapter_name=adapters[0])
    for name in tensors:
        if ".lora_B" in name:
            layer = unet.get_submodule(name.split(".lora_")[0])
            tensors[name] = tensors[name] * layer.scaling[adapters[0]]
    return tensors


def save_lora(source, folder, card=None):
    """Save a LoRA that `pipe.load_lora_weights(folder)` of plain diffusers reads.

    source: a pipeline or UNet with an adapter, or the tensors of `extract_lora`. Raises as
    `adapter_tensors` does.
    """
    if not isinstance(source, dict):
        source = adapter_tensors(getattr(source, "unet", source))
    tensors = {name: t.detach().contiguous() for name, t in source.items()}
    with whole_folder(folder, card) as temporary:
        StableDiffusionLoraLoaderMixin.save_lora_weights(temporary, tensors)
