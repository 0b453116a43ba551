"""Real images of a concept folder."""

from pathlib import Path

import torch

from mu.concepts.presets import SIDES
from mu.concepts.sets import read_image, read_metadata
from mu.files import read_json


def real_drawings(sets, known=None):
    """The pictures of a concept's folder which no model drew and whose concept is known: (images (n, 3, 64, 64) in 0…1, labels as the judge has them); none: (None, []).

    Where concept.json says that the concept is a style, its own sets and those of related styles are labelled "style:…". It also says whether a generator drew the folder; then only what was
    imported is left. known: labels of the judge; pictures of anything else are left out."""
    made, found = read_json(Path(sets) / "concept.json", {}), []
    for role, place in SIDES.items():
        imported = bool(made.get("imported_from")) and role in ("forget", "attack")
        if (Path(sets) / place / "metadata.jsonl").is_file() and (
            imported or not made.get("generator")
        ):
            style = made.get("kind") == "style" and role in ("forget", "related", "attack")

            def kind(line):
                return (
                    "style" if style and "style" not in line else "concept"
                )  # with a style beside it, `concept` is the thing shown

            found += [
                (Path(sets) / place / line["file_name"], f"{kind(line)}:{line['concept']}")
                for line in read_metadata(Path(sets) / place)
                if line.get("concept")
            ]
    found = [(file, label) for file, label in found if known is None or label in known]
    return (
        torch.stack([(read_image(file, 64) + 1) / 2 for file, _ in found]) if found else None
    ), [label for _, label in found]


def staying(items, probe_seeds, least):
    """Of each picture of a probe whether it should have stayed as it was: all but the concept's. Raises ValueError where fewer than `least` should, of which no Fréchet distance is computed."""
    stays = [item["group"] != "forget" for item in items]
    if sum(stays) < least:
        raise ValueError(
            f"with probe_seeds = {probe_seeds!r} {sum(stays)} pictures of the probe should have stayed, and JFD is refused below least = {least}: raise the second and third number of "
            "probe_seeds, or lower least (the card marks a distance of few pictures), or leave `judge` empty"
        )
    return stays
