"""Read a LoRA of the UNet with the names of kohya, diffusers, PEFT or ComfyUI.

diffusers converts the names and PEFT applies the matrices, to a copy of the UNet.
"""

import copy
import json
from pathlib import Path
from typing import NamedTuple

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft

from mu.files import read_json
from mu.trainable import without_lora

# Part of a tensor's name → the format that it belongs to, which is not read.
OTHERS = {
    "hada_w": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "ia3_": "(IA)³",
    "on_input": "(IA)³",
    "lora_mid": "LoCon with a Tucker decomposition",
    "custom_diffusion": "Custom Diffusion",
    "lora_controlnet": "Control-LoRA",
    "controlnet_": "ControlNet",
    "control_model.": "ControlNet",
    "lllite": "ControlNet-LLLite",
    "ip_adapter": "IP-Adapter",
    "image_proj": "IP-Adapter",
    "string_to_param": "textual inversion",
    "emb_params": "textual inversion",
}
PAIRS = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
)
KEPT = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
INSTEAD = "fuse it in its pipeline, save that, and name the folder as `model`"


class Lora(NamedTuple):
    """What a LoRA file changes."""

    weights: dict  # name → weight of this UNet with the LoRA fused
    scales: str  # rank and alpha


def refuse_others(saved, path):
    """Raise ValueError if a tensor belongs to an adapter that is no LoRA of the UNet."""
    for name in saved:
        kind = next((kind for part, kind in OTHERS.items() if part in name), None)
        if kind:
            raise ValueError(
                f"{path} is of {kind} ({name}), allowed is plain LoRA of the UNet: {INSTEAD}"
            )
        if name.startswith(("text_encoder", "lora_te")):
            raise ValueError(
                f"{path} has {name}, allowed is plain LoRA of the UNet: {INSTEAD}, which then has "
                "the text encoder that was trained, too"
            )


def is_lora(saved):
    """Return whether the tensors of a file are those of a LoRA."""
    return any(part in name for name in saved for part in ("lora_", "_lora", ".lora."))


def fuse_lora(unet, saved, metadata, path):
    """Return the `Lora` of a file; needs memory for a second UNet.

    metadata: of its safetensors. An adapter_config.json beside the file is read, too.
    Raises ValueError for a tensor that does not fit and for settings of PEFT that are not read.
    """
    config, folded = read_config(metadata, path), fold_alphas(saved)
    alphas = sorted({t.item() for name, t in saved.items() if name.endswith(".alpha")})
    if alphas and config:
        raise ValueError(
            f"{path} has an alpha both in its tensors and in its configuration: remove one"
        )
    state, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(folded, unet_config=unet.config)
    state = strip_prefix(convert_unet_state_dict_to_peft(state), unet.state_dict())
    changed = check_lora(unet.state_dict(), state, path)
    plain = copy.deepcopy(unet)
    if config:
        config["target_modules"] = sorted({name.rsplit(".", 1)[0] for name in changed})
    plain.load_lora_adapter(state, prefix=None, metadata=config)
    weights = without_lora(plain, fuse=True).state_dict()
    ranks = sorted({len(t) for name, t in state.items() if "lora_A" in name})
    named = [config["lora_alpha"], *config["alpha_pattern"].values()] if config else ranks
    scales = f"rank {listed(ranks)}, alpha {listed(alphas or named)}"
    return Lora({name: weights[name] for name in changed}, scales)


def listed(values):
    """Return distinct numbers as text, such as "4" or "4 and 8"."""
    return " and ".join(f"{value:g}" for value in sorted(set(values)))


def read_config(metadata, path):
    """Return PEFT's settings of a LoRA, or None: of its metadata, or of adapter_config.json.

    Raises ValueError for settings of more than plain LoRA.
    """
    saved = json.loads(metadata.get("lora_adapter_metadata", "null"))
    if saved:
        saved = {name.removeprefix("unet."): value for name, value in saved.items()}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    config = saved or read_json(folder / "adapter_config.json")
    if not config:
        return None
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
    plain |= {"modules_to_save": None, "layer_replication": None}
    for name, value in plain.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name} of its adapter is {config[name]}, allowed is {value}: {INSTEAD}"
            )
    defaults = {"rank_pattern": {}, "alpha_pattern": {}}
    return defaults | {name: config[name] for name in KEPT if config.get(name) is not None}


def fold_alphas(saved):
    """Multiply alpha / rank into the second matrices: diffusers misreads alphas that differ."""
    saved = dict(saved)
    for name in [name for name in saved if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        for up, down in ((f"{layer}.{up}", f"{layer}.{down}") for up, down in PAIRS):
            if up in saved and down in saved:
                scale = saved.pop(name).item() / len(saved[down])
                saved[up] = saved[up].float() * scale
    return saved


def strip_prefix(state, own):
    """Remove what stands before the names of the UNet's layers, such as "unet."."""
    for name in state:
        parts = name.split(".lora_")[0].split(".")
        for start in range(len(parts)):
            if ".".join([*parts[start:], "weight"]) in own:
                prefix = name[: len(".".join(["", *parts[:start]]))]
                return {name.removeprefix(prefix): t for name, t in state.items()}
    return state


def check_lora(own, state, path):
    """Return the names of the weights and biases that a LoRA changes.

    Raises ValueError for the first tensor that does not fit, or whose other half is missing.
    """
    changed = set()
    for name, t in sorted(state.items()):
        layer, _, rest = name.partition(".lora_")
        other = f"{layer}.lora_{'B' if rest.startswith('A') else 'A'}.weight"
        if other not in state:
            raise ValueError(f"{path} is incomplete: it has {name}, and no {other}: fetch it again")
        target = f"{layer}.bias" if rest.endswith("bias") else f"{layer}.weight"
        changed.add(target)
        if target in own:
            wanted = own[target].shape
            first = rest.startswith("A")  # (rank, in, …); the second is (out, rank, …)
            fits = t.shape[1:] == wanted[1:] if first else len(t) == wanted[0]
            if fits:
                continue
        expected = tuple(own[target].shape) if target in own else "absent"
        raise ValueError(
            f"{path} has another architecture: {name} is {tuple(t.shape)}, and {target} of this "
            f"UNet is {expected}"
        )
    return changed
