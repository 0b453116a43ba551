"""Read the weights of unlearned models in the formats that others publish.

`load_weights` changes a UNet in place, completely or not at all. A pickle never runs code.
"""

import hashlib
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import SafetensorError, safe_open

from mu.publish.lora import fuse_lora, is_lora, refuse_others

DIFFERENCE = "mu-difference-1"  # value of "mu_format" in the metadata of a difference
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
VARIANT = re.compile(r"\.(fp16|fp32|bf16|non_ema|ema)[.-]")  # in the name of a second copy
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")  # in the name of a file that holds a part of the tensors


class Loaded(NamedTuple):
    """What was read from a file or folder."""

    kind: str  # unet, partial, difference, ldm or lora
    tensors: int  # of the UNet that were set
    of: int  # tensors of the UNet
    scales: str = ""  # rank and alpha of a LoRA

    def __str__(self):
        text = f"{self.kind}: {self.tensors} of {self.of} tensors"
        return f"{text}, {self.scales}" if self.scales else text


@torch.no_grad()
def load_weights(unet, path):
    """Load the weights of an unlearned model into its base, in place and in the UNet's precision.

    Reads a run folder; a diffusers UNet or pipeline folder (only its UNet); a file with some of the
    UNet's tensors, as ESD and UCE publish; a difference of `mu.publish.export`; a LoRA (needs
    memory for a second UNet); a checkpoint with LDM's names (not its EMA). Files are safetensors or
    pickles of tensors. Returns `Loaded`.
    Leaves the UNet unchanged and raises FileNotFoundError if there are no weights; ValueError for a
    UNet with adapters, a tensor that does not fit or is not finite, a file without tensors of this
    UNet, a single shard, a pickle with code, a difference to other weights, a pipeline whose UNet
    is this one.
    """
    if hasattr(unet, "peft_config"):
        raise ValueError(
            "the UNet has LoRA adapters: load into a plain UNet (see mu.publish.export.fused), "
            "then add adapters"
        )
    saved, metadata, complete = _read_all(path)
    own = unet.state_dict()
    kind, new, scales = _convert(unet, saved, metadata, path)
    check_architecture(own, new, path, complete or kind == "ldm")
    if metadata.get("mu_format") == DIFFERENCE:
        kind, new = "difference", _add_difference(unet, new, metadata, path)
    elif kind == "partial" and new.keys() == own.keys():
        kind = "unet"
    for name, t in new.items():
        dtype = own[name].dtype
        if not t.to(dtype).isfinite().all():
            raise ValueError(f"{path} is refused: {name} has NaN or infinite values in {dtype}")
    if (Path(path) / "model_index.json").is_file():
        _check_changes(own, new, path)
    for name, t in new.items():
        own[name].copy_(t)
    return Loaded(kind, len(new), len(own), scales)


def _check_changes(own, new, path):
    """Raise ValueError if a pipeline has the UNet that is to be changed."""
    if all(torch.equal(own[name], t.to(own[name])) for name, t in new.items()):
        raise ValueError(
            f"{path} has the same UNet as the base, which nothing has unlearned. If its text "
            "encoder has (AdvUnlearn), name the folder as `model`"
        )


def load_start(pipe, path):
    """Load an unlearned model's UNet into its base pipeline, as `load_weights`; returns `Loaded`.

    Raises as `load_weights` does, and ValueError for a pipeline folder with other text encoders:
    what follows would encode prompts with the base's.
    """
    for part in ("text_encoder", "text_encoder_2"):
        files = sorted(Path(path).glob(f"{part}/*.safetensors"))
        own = getattr(pipe, part, None)
        own = own.state_dict() if own is not None else {}
        for name, t in (pair for file in files for pair in _read(file)[0].items()):
            if name in own and not torch.allclose(own[name].cpu().float(), t.float(), atol=1e-3):
                raise ValueError(
                    f"{path} has another {part} than the base ({name}), and only its UNet would be "
                    "read: name the folder as `model`"
                )
    return load_weights(pipe.unet, path)


def check_architecture(own, new, source, complete=False):
    """Raise ValueError for the first new tensor that has no counterpart of its shape in `own`.

    complete: `new` must also contain every tensor of `own`.
    """

    def shape(tensors, name):
        return tuple(tensors[name].shape) if name in tensors else "absent"

    names = new.keys() | own.keys() if complete else new.keys()
    for name in sorted(names):
        found, expected = shape(new, name), shape(own, name)
        if found != expected:
            raise ValueError(
                f"{source} has another architecture: {name} is {found}, expected {expected}"
            )


def fingerprint(tensors):
    """Return a short SHA-256 of tensors as float16, the same for a base in float32 and float16."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].half().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def _find_files(path):
    """Return the weight files at a path, and whether they must contain the whole UNet.

    A diffusers folder contains all of it, a single file may be a part.
    """
    path = Path(path)
    if path.name.endswith(".safetensors.index.json"):
        path = path.parent
    if path.is_file() and SHARD.search(path.name):
        raise ValueError(f"{path} is one of several shards: name its folder, which has all")
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is neither a file nor a folder: fetch a model of the hub first "
            "(hf download OWNER/NAME)"
        )
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = [file for file in sorted(folder.iterdir()) if file.name != "checkpoint.safetensors"]
    for suffixes in ((".safetensors",), PICKLES):
        weights = [file for file in files if file.suffix in suffixes]
        if weights:
            plain = [file for file in weights if not VARIANT.search(file.name)]
            return plain or weights, (folder / "config.json").exists()
    raise FileNotFoundError(
        f"{folder} has no weights (*.safetensors, *{', *'.join(PICKLES)}): finish the run, or "
        "choose another folder"
    )


def _read_all(path):
    """Return (name → tensor, metadata, complete) of all files at a path; see `_find_files`."""
    files, complete = _find_files(path)
    saved, metadata = {}, {}
    for file in files:
        tensors, more = _read(file)
        twice = sorted(saved.keys() & tensors.keys())
        if twice:
            raise ValueError(
                f"{path} has {twice[0]} in {file.name} and in another file: choose one file"
            )
        saved |= tensors
        metadata |= more
    return saved, metadata, complete


def _read(file):
    """Return (name → tensor, metadata) of a file.

    Raises ValueError for a damaged file and a pickle of more than tensors and plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                names = f.keys()  # `f` itself is not iterable
                return {name: f.get_tensor(name) for name in names}, f.metadata() or {}
        saved = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: reading it would run its code, or it is damaged; convert it to "
            "safetensors where you trust it"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or contains no weights ({error}): fetch it again"
        ) from error
    return dict(_flatten(_unwrap(saved))), {}


def _unwrap(saved):
    """Return the innermost dict below the usual keys of checkpoints; {} if there is no dict."""
    if not isinstance(saved, dict):
        return {}
    for key in ("state_dict", "unet", "model"):
        if isinstance(saved.get(key), dict):
            return _unwrap(saved[key])
    return saved


def _flatten(tree, prefix=""):
    """Yield (dotted name, tensor) of nested dicts; ESD's .pt has one dict per module."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def _convert(unet, saved, metadata, path):
    """Return ("lora", "ldm" or "partial"; name → tensor in the names of this UNet; scales)."""
    refuse_others(saved, path)
    if is_lora(saved):
        lora = fuse_lora(unet, saved, metadata, path)
        return "lora", lora.weights, lora.scales
    if any("input_blocks." in name for name in saved):
        return "ldm", _convert_ldm(unet, saved, path), ""
    prefix = _find_prefix(saved, unet.state_dict())
    if prefix is None:
        first = f": its first is {min(saved)}" if saved else ""
        raise ValueError(f"{path} has no tensor of this UNet{first}")
    return "partial", {name.removeprefix(prefix): t for name, t in saved.items()}, ""


def _find_prefix(saved, own):
    """Return the prefix of the UNet's names in a file; None if no name ends with one of them."""
    for name in saved:
        parts = name.split(".")
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            if tail in own:
                return name.removesuffix(tail)
    return None


def _convert_ldm(unet, saved, path):
    """Return the UNet of a checkpoint with LDM's names in the names of diffusers."""
    first = next(name for name in saved if "input_blocks." in name)
    prefix = first[: first.index("input_blocks.")]
    own = {name.removeprefix(prefix): t for name, t in saved.items() if name.startswith(prefix)}
    if all(".attn2.to_" in name for name in own):
        raise ValueError(
            f"{path} has cross attention only, with LDM's names, as a delta of Custom Diffusion: "
            "load it with its own code, save the whole model, and name that"
        )
    state = {f"model.diffusion_model.{name}": t for name, t in own.items()}
    try:
        return convert_ldm_unet_checkpoint(state, unet.config)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path} is incomplete, or an LDM checkpoint of another architecture: {error} is "
            "missing"
        ) from error


def _add_difference(unet, difference, metadata, path):
    """Return W_base + (W − W_base) in float32. Raises ValueError unless the UNet is the base."""
    own = {name: t for name, t in unet.state_dict().items() if name in difference}
    # a base in bfloat16 has lost the digits that the fingerprint covers
    if unet.dtype != torch.bfloat16 and fingerprint(own) != metadata["base_fingerprint"]:
        raise ValueError(
            f"{path} is a difference to {metadata['base_model']}, and this UNet has other weights "
            "or has the difference already: load the base first"
        )
    return {name: t.float() + difference[name].to(t.device).float() for name, t in own.items()}
