"""Helpers of the tests that build concept sets."""

from pathlib import Path

import yaml
from PIL import Image

from mu.concepts.build import BuildOptions
from mu.concepts.presets import PRESETS, SIDES, make_concept

ROOT = Path(__file__).parents[2]
SETS = ROOT / "data" / "pocket-sets"
NAMES = list(yaml.safe_load(Path(PRESETS).read_text())["presets"])
FEW = BuildOptions(images_a_prompt=2, images_a_concept=1, steps=1)


def cat(generator, **changes):
    """Return a small concept with some roles or parameters of `make_concept` changed."""
    prompts = {"related": ["tiger"], "unrelated": ["apple", "book"], "clean": ["sun"]}
    prompts |= {role: changes.pop(role) for role in SIDES if role in changes}
    return make_concept(prompts=prompts, **{"name": "cat", "generator": generator} | changes)


def pictures(folder):
    """Return name → bytes of every PNG below a folder."""
    files = sorted(Path(folder).rglob("*.png"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def save_emoji(folder, names, side=64):
    """Save drawings from the pocket sets under some names; returns the folder."""
    files = sorted(
        {file.name[4:]: file for file in SETS.glob("*/*/*/*.png")}.values(),
        key=lambda file: file.name[4:],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in zip(names, files, strict=False):
        Image.open(file).resize((side, side)).save(folder / name)
    return folder
