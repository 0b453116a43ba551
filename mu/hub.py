"""Where models come from: short names, folders, the hub."""

import contextlib
import textwrap
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from mu import ROOT

MODELS = {
    "pocket": str(ROOT / "data" / "pocket-sd"),
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "pocket-sdxl": str(ROOT / "data" / "pocket-sdxl"),
}
CHOICES = (
    f"choose {', '.join(MODELS)}, a folder with a diffusers pipeline, or a hub id (owner/name)"
)


@contextlib.contextmanager
def located(model):
    """Yield the folder or hub id of a model, for the block that loads it.

    Raises FileNotFoundError for an unknown model, an incomplete folder and a model that cannot be
    fetched, PermissionError for a gated one, ValueError for a file in place of a folder.
    """
    path = Path(MODELS.get(model, model))
    if path.is_file():
        raise ValueError(
            f"{model!r} is a file, allowed is a folder with a diffusers pipeline: convert it with "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{model!r} has no model_index.json: name the folder of the whole pipeline, not of a "
            "part of it"
        )
    if not path.is_dir() and (path.is_absolute() or str(path).count("/") != 1):
        raise FileNotFoundError(f"unknown model {model!r}: {CHOICES}")
    try:
        yield MODELS.get(model, model)
    except OSError as error:
        raise explained(model, path, error) from error


def explained(model, path, error):
    """Return an error that says why a model cannot be loaded, and what to do."""
    if any(isinstance(e, GatedRepoError) for e in (error, error.__cause__, error.__context__)):
        return PermissionError(
            f"{model!r} is gated: accept its licence on its page, then run `hf auth login` (or "
            "set HF_TOKEN)"
        )
    cause = textwrap.shorten(str(error), 300)
    pickled = "which are not read: convert them where you trust them, with save_pretrained(folder)"
    if (
        path.is_dir()
        and list(path.glob("unet/*.bin"))
        and not list(path.glob("unet/*.safetensors"))
    ):
        return FileNotFoundError(f"{model!r} has only pickled weights (.bin), {pickled}")
    if path.is_dir():
        return FileNotFoundError(f"{model!r} is incomplete: {cause}")
    return FileNotFoundError(
        f"{model!r} cannot be fetched: {cause}. Check its name ({CHOICES}). Without a network, "
        f"name its folder or put it into the cache, {constants.HF_HUB_CACHE} (HF_HUB_CACHE)"
    )
