"""Where models come from: short names, folders, the hub."""

import contextlib
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


@contextlib.contextmanager
def located(model):
    """Yield the folder or hub id of a model, for the block that loads it.

    Raises FileNotFoundError for an unknown model and for one that cannot be fetched,
    PermissionError for a gated one.
    """
    path = MODELS.get(model, model)
    unknown = (
        f"unknown model {model!r}: choose {', '.join(MODELS)}, a folder with a diffusers pipeline, "
        "or a hub id (owner/name)"
    )
    if not Path(path).is_dir() and (Path(path).is_absolute() or path.count("/") != 1):
        raise FileNotFoundError(unknown)
    try:
        yield path
    except OSError as error:
        if any(isinstance(e, GatedRepoError) for e in (error, error.__cause__, error.__context__)):
            raise PermissionError(
                f"{model!r} is gated: accept its licence on its page, then run `hf auth login` (or "
                "set HF_TOKEN)"
            ) from error
        raise FileNotFoundError(
            f"{unknown} that can be reached. Without a network, name its folder or put it into the "
            f"cache, {constants.HF_HUB_CACHE} (HF_HUB_CACHE): {error}"
        ) from error
