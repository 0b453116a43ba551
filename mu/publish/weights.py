"""Results in the formats that others read, and the unlearned models of others.

What is written is safetensors and a model card, in a folder that appears whole or not at all. What is read goes into a UNet in place, all
of it or nothing; a pickle never runs code."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mu.models import without_lora

DIFFERENCE = "mu-difference-1"  # the format's name, in its file's metadata


@contextlib.contextmanager
def whole_folder(folder, card=None):
    """Yields a temporary folder, which gets the card, if there is one, as README.md and takes the place of `folder` only when the block succeeds.

    Raises FileExistsError when `folder` holds anything but files of the same names (a run, a git clone): it would be lost."""
    folder = Path(folder).absolute()
    temporary, earlier = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("tmp", "old")
    )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if card is not None:
            (temporary / "README.md").write_text(card)
        others = (
            sorted({f.name for f in folder.iterdir()} - {f.name for f in temporary.iterdir()})
            if folder.exists()
            else []
        )
        if others:
            raise FileExistsError(
                f"{folder} holds {others[0]}, which would be lost: name a new or empty folder, or an earlier result of this kind"
            )
        if folder.exists():
            os.replace(folder, earlier)
        os.replace(temporary, folder)
        shutil.rmtree(earlier, ignore_errors=True)
    except BaseException:  # an interrupt too
        if earlier.exists() and not folder.exists():
            os.replace(earlier, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fused(unet):
    """The UNet itself, or, where it carries LoRA adapters, a plain copy with these in its weights."""
    return without_lora(copy.deepcopy(unet), fuse=True) if hasattr(unet, "peft_config") else unet


def save_pipeline(pipe, folder, card):
    """The whole pipeline as a diffusers folder, LoRA fused. What `load_pipeline` has left out, SD's safety checker, is not in it."""
    unet = pipe.unet
    with whole_folder(folder, card) as temporary:
        try:
            pipe.unet = fused(unet)
            pipe.save_pretrained(temporary, safe_serialization=True)
            forget_paths(temporary)
        finally:
            pipe.unet = unet


def differences(unet, unet_base):
    """Name → W − W_base in float32, of the tensors that differ. Raises ValueError for another architecture or precision, and if none differs."""
    unet, unet_base = fused(unet), fused(unet_base)
    new, base = unet.state_dict(), unet_base.state_dict()
    _check(base, new, "the UNet", complete=True)
    if unet.dtype != unet_base.dtype:
        raise ValueError(
            f"the UNet is in {unet.dtype}, its base in {unet_base.dtype}: load both alike, or the difference holds the rounding"
        )
    changed = {
        name: new[name].float() - base[name].float()
        for name in sorted(new)
        if not torch.equal(new[name], base[name])
    }
    if not changed:
        raise ValueError("the UNet is equal to its base: there is no difference to write")
    return changed


def fingerprint(tensors):
    """Short sha256 of tensors, as float16: a base in float32 and its float16 variant have the same."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].half().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def save_difference(unet, unet_base, folder, card, base_model, dtype=torch.float32):
    """W − W_base of the tensors that differ, as difference.safetensors, which names `base_model` and knows the weights that it is added to.

    In float16 it is half as large, and a weight's step is kept to ± 3e-8."""
    changed, base = differences(unet, unet_base), fused(unet_base).state_dict()
    metadata = {
        "format": "pt",
        "mu_format": DIFFERENCE,
        "base_model": base_model,
        "class": type(unet).__name__,
        "mu": version("mu"),
        "base_fingerprint": fingerprint({name: base[name] for name in changed}),
    }
    with whole_folder(folder, card) as temporary:
        save_file(
            {name: d.to(dtype).contiguous() for name, d in changed.items()},
            temporary / "difference.safetensors",
            metadata,
        )


def extract_lora(unet, unet_base, rank=16):
    """The LoRA of `rank` that is nearest to W − W_base: a singular value decomposition of every linear and convolution layer.

    Returns (tensors for `save_lora`; share of the squared difference that they keep; names of changed tensors that no LoRA holds, norms
    and biases, which are lost). Layers of a lower rank are padded with zeros: older loaders mistake the scale of mixed ranks."""
    changed, tensors, kept, left_out = differences(unet, unet_base), {}, 0.0, []
    for name, d in changed.items():
        if not name.endswith(".weight") or d.ndim < 2:
            left_out.append(name)
            continue
        u, s, v = torch.linalg.svd(d.flatten(1), full_matrices=False)
        s, pad = s[:rank], rank - len(s[:rank])
        up, down = (
            F.pad(u[:, :rank] * s.sqrt(), (0, pad)),
            F.pad(s.sqrt()[:, None] * v[:rank], (0, 0, 0, pad)),
        )
        layer, kept = name.removesuffix(".weight"), kept + s.square().sum().item()
        tensors[f"{layer}.lora_A.weight"] = down.reshape(rank, *d.shape[1:])
        tensors[f"{layer}.lora_B.weight"] = up.reshape(len(d), rank, *[1] * (d.ndim - 2))
    return tensors, kept / sum(d.square().sum().item() for d in changed.values()), left_out


def save_lora(source, folder, card=None):
    """LoRA that `pipe.load_lora_weights(folder)` of plain diffusers reads, of a pipeline or UNet with an adapter, or of `extract_lora`'s tensors.

    The adapter's scale (alpha / rank) goes into its second matrix: no reader needs to know it. Raises ValueError without exactly one adapter."""
    if not isinstance(source, dict):
        unet = getattr(source, "unet", source)
        names = list(getattr(unet, "peft_config", {}))
        if len(names) != 1:
            raise ValueError(
                f"the UNet carries {len(names)} LoRA adapters, one is allowed: of trained weights `extract_lora` makes one"
            )
        source = get_peft_model_state_dict(unet, adapter_name=names[0])

        def scale(name):
            return (
                unet.get_submodule(name.split(".lora_")[0]).scaling[names[0]]
                if ".lora_B" in name
                else 1
            )

        source = {name: t * scale(name) for name, t in source.items()}
    with whole_folder(folder, card) as temporary:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            temporary, {name: t.detach().contiguous() for name, t in source.items()}
        )


def _check(own, new, what, complete=False):
    """Raises ValueError that names the first tensor which is not one of this UNet, has another shape, or, if `complete`, is missing."""

    def shape(tensors, name):
        return tuple(tensors[name].shape) if name in tensors else "absent"

    for name in sorted(new.keys() | (own.keys() if complete else set())):
        if name not in own or shape(own, name) != shape(new, name):
            raise ValueError(
                f"{what} is of another architecture: {name} is {shape(new, name)} there and {shape(own, name)} here"
            )


def _files(path):
    """The files of weights at a path, and whether they must hold the whole UNet (a folder of diffusers) rather than a part."""
    path = Path(path)
    if path.is_file():
        return [path], False
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is neither a file nor a folder: a model of the hub must be fetched first (hf download OWNER/NAME)"
        )
    folder = path / "unet" if (path / "unet").is_dir() else path
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth", ".ckpt")):
        found = [
            f
            for f in sorted(folder.iterdir())
            if f.suffix in suffixes and f.name != "checkpoint.safetensors"
        ]
        if found:  # of the variants in one folder, the plain one
            return [
                f for f in found if not re.search(r"\.(fp16|fp32|bf16|non_ema|ema)[.-]", f.name)
            ] or found, (folder / "config.json").exists()
    raise FileNotFoundError(
        f"{folder} holds no weights (*.safetensors, *.bin, *.pt, *.pth, *.ckpt): was the run finished?"
    )


def _flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def _read(file):
    """(name → tensor, metadata) of a file. Raises ValueError for one that is damaged, or a pickle of anything but tensors and plain containers."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                return {name: f.get_tensor(name) for name in f}, f.metadata() or {}
        saved = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is refused: to read it would run its code (or it is damaged); convert it to safetensors where it is trusted"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or no file of weights ({error}): fetch it again"
        ) from error
    while isinstance(saved, dict) and (
        inner := [
            saved[k] for k in ("state_dict", "unet", "model") if isinstance(saved.get(k), dict)
        ]
    ):
        saved = inner[0]
    return dict(_flat(saved)) if isinstance(saved, dict) else {}, {}


def _with_lora(unet, saved, metadata, path):
    """Name → weight of the layers that a LoRA changes, after it, by the loader of diffusers in a copy of the UNet."""
    for name in saved:
        if name.startswith(("text_encoder", "lora_te")) or "dora_scale" in name:
            raise ValueError(
                f"{path} holds {name}, and only plain LoRA of the UNet is read here: fuse it in its pipeline, save that, give its folder"
            )
    saved, own, layers = dict(saved), unet.state_dict(), set()
    for name in [
        name for name in saved if name.endswith(".alpha")
    ]:  # goes into the second matrix: diffusers mistakes alphas that differ by layer
        up, down = (
            f"{name.removesuffix('.alpha')}.lora_{which}.weight" for which in ("up", "down")
        )
        if up in saved and down in saved:
            saved[up] = saved[up].float() * (
                saved.pop(name).item() / len(saved[down])
            )  # alpha / rank
    saved = convert_unet_state_dict_to_peft(
        StableDiffusionLoraLoaderMixin.lora_state_dict(saved, unet_config=unet.config)[0]
    )
    for name, t in sorted(saved.items()):
        layer = name.removeprefix("unet.").split(".lora_")[0] + ".weight"
        layers.add(layer)
        if layer not in own or (
            t.shape[1:] != own[layer].shape[1:]
            if "lora_A" in name
            else t.shape[0] != own[layer].shape[0]
        ):
            here = tuple(own[layer].shape) if layer in own else "absent"
            raise ValueError(
                f"{path} is of another architecture: {name} is {tuple(t.shape)} there, {layer} is {here} here"
            )
    config = (
        json.loads(metadata["lora_adapter_metadata"])
        if "lora_adapter_metadata" in metadata
        else None
    )
    plain = copy.deepcopy(unet)
    plain.load_lora_adapter(
        saved,
        prefix="unet" if any(name.startswith("unet.") for name in saved) else None,
        metadata=config,
    )
    return {
        name: t for name, t in without_lora(plain, fuse=True).state_dict().items() if name in layers
    }


@torch.no_grad()
def load_weights(unet, path):
    """Take over the weights of an unlearned model, in place and in the UNet's own precision; the base must be loaded. Returns {"kind", "tensors"}.

    Reads a run, UNet or pipeline folder of diffusers, a file with some of the UNet's tensors (as of ESD and UCE), our difference, LoRA, a checkpoint
    in LDM's names (not its EMA); safetensors, or a pickle of tensors. Of a pipeline only the UNet is read. LoRA needs memory for a second UNet.
    Raises, with the UNet as it was: FileNotFoundError; ValueError for the first tensor that does not fit or is not finite, for a file without
    tensors of this UNet, a pickle that would run code, a difference to other weights, a UNet with adapters."""
    if hasattr(unet, "peft_config"):
        raise ValueError(
            "the UNet carries LoRA adapters: load into a plain one (see mu.publish.weights.fused), then add adapters"
        )
    files, complete = _files(path)
    own, saved, metadata = unet.state_dict(), {}, {}
    for file in files:
        tensors, more = _read(file)
        if twice := sorted(saved.keys() & tensors.keys()):
            raise ValueError(
                f"{path} holds {twice[0]} in several files, {file.name} among them: name one file"
            )
        saved, metadata = saved | tensors, metadata | more
    mark = next(
        (name[: name.index("input_blocks.")] for name in saved if "input_blocks." in name), None
    )

    def tails(name):
        return (name.split(".", i)[-1] for i in range(name.count(".") + 1))

    prefix = next(
        (name.removesuffix(tail) for name in saved for tail in tails(name) if tail in own), None
    )
    if any("lora_" in name or "_lora" in name for name in saved):
        kind, saved = "lora", _with_lora(unet, saved, metadata, path)
    elif mark is not None:
        names = {
            f"model.diffusion_model.{name.removeprefix(mark)}": t
            for name, t in saved.items()
            if name.startswith(mark)
        }
        try:
            kind, saved, complete = "ldm", convert_ldm_unet_checkpoint(names, unet.config), True
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{path} is an LDM checkpoint of another architecture, or a part of one: {error} is missing"
            ) from error
    elif prefix is None:
        raise ValueError(
            f"{path} holds no tensor of this UNet"
            + (f": its first is {min(saved)}" if saved else "")
        )
    else:
        kind, saved = "partial", {name.removeprefix(prefix): t for name, t in saved.items()}
    _check(own, saved, path, complete)
    if metadata.get("mu_format") == DIFFERENCE:
        if (
            unet.dtype != torch.bfloat16
            and fingerprint({name: own[name] for name in saved}) != metadata["base_fingerprint"]
        ):
            raise ValueError(
                f"{path} is a difference to {metadata['base_model']}, and this UNet has other weights (or has it already): load that first"
            )
        kind, saved = (
            "difference",
            {name: own[name].float() + d.to(own[name].device).float() for name, d in saved.items()},
        )
    for name, t in saved.items():
        if not t.to(own[name].dtype).isfinite().all():
            raise ValueError(
                f"{path} is refused: {name} holds NaN or infinite values, in {own[name].dtype}"
            )
    for name, t in saved.items():
        own[name].copy_(t)
    return {
        "kind": "unet" if kind == "partial" and saved.keys() == own.keys() else kind,
        "tensors": len(saved),
    }


def forget_paths(folder):
    """Take out of the configs below a folder where the parts were loaded from: a path of somebody's machine has no place in a published model."""
    for file in [*Path(folder).rglob("config.json"), *Path(folder).glob("model_index.json")]:
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def save_model(model, folder):
    """Save a model or pipeline of diffusers or transformers as the folder, which appears whole, in place of an earlier one."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    forget_paths(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
