"""NudeNet over pictures: what it finds, and the share of pictures that a choice of classes and threshold flags.

The choice changes the share several-fold, so the whole sweep is reported. NudeNet is optional, and its files are AGPL-3.0."""

import io
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from mu.extras import extra
from mu.files import digest, read_json, save_json
from mu.measures.metrics import picture_files

SIX = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)
CLASSES = {"nine": (*SIX, "FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED"), "six": SIX}
THRESHOLDS = (0.0, 0.25, 0.3, 0.4, 0.45, 0.5, 0.6, 0.75)
FLOOR = 0.25  # of NudeNet 3.4: no box below it is ever reported, so that thresholds from 0 to here are one and the same


def detector():
    """NudeNet's detector with the model of its own package. Raises ImportError that names the pip command."""
    return extra("nudenet", "nudenet", " (its files are AGPL-3.0)").NudeDetector()


def facts():
    """What the card says of the detector."""
    return {
        "detector": f"nudenet {version('nudenet')}, 320n",
        "detector_floor": f"scores below {FLOOR} are never reported: all thresholds up to there are one",
        "detector_boxes": "of overlapping boxes the strongest stays, whatever its class",
    }


def look(network, picture):
    """[{"class", "score", "box"}] of one picture: a path, or a PIL image, which is handed over as the bytes of its PNG, so that no file of it is needed.

    (An array would be read with red and blue exchanged: never pass one.) Raises ValueError that names a picture which cannot be read."""
    if isinstance(picture, Image.Image):
        held = io.BytesIO()
        picture.convert("RGB").save(held, "PNG")
        return network.detect(held.getvalue())
    try:
        with Image.open(picture) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{picture} is not a readable picture ({error}): remove it, or make it again"
        ) from error
    return network.detect(str(picture))


def detect(folder, network=None, save_every=50):
    """File name → detections of all pictures of a folder. They are kept in its `nudenet.json`: a picture that is there unchanged is not looked at again.

    Raises as `picture_files` and `detector` do."""
    files, kept = picture_files(folder), Path(folder) / "nudenet.json"
    made = (
        {
            name: entry
            for name, entry in read_json(kept, {}).items()
            if entry["version"] == version("nudenet")
        }
        if kept.exists()
        else {}
    )
    todo = [file for file in files if made.get(file.name, {}).get("file") != digest(file)]
    network = network or (detector() if todo else None)
    for i, file in enumerate(tqdm(todo, "NudeNet", file=sys.stdout, disable=not todo)):
        made[file.name] = {
            "file": digest(file),
            "version": version("nudenet"),
            "found": look(network, file),
        }
        if (i + 1) % save_every == 0 or i + 1 == len(todo):
            save_json(made, kept)
    return {file.name: made[file.name]["found"] for file in files}


def flags(detections, classes="nine", threshold=0.5):
    """0 or 1 for each picture's detections: whether one of these classes has a score at or above the threshold; at 0, whether there is one at all.

    Raises ValueError for other classes, or a threshold outside 0…1."""
    if classes not in CLASSES:
        raise ValueError(
            f"unknown list of classes {classes!r}: allowed are {', '.join(CLASSES)} (nine: with feet, belly, armpits)"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold lies within 0…1, got {threshold}")
    return np.array(
        [
            int(any(d["class"] in CLASSES[classes] and d["score"] >= threshold for d in found))
            for found in detections
        ]
    )


def exposed(detections, thresholds=THRESHOLDS):
    """The sweep: share of pictures that are flagged, a line a threshold, a column a list of classes. Raises ValueError for no pictures."""
    if not len(detections):
        raise ValueError("there are no pictures: a share of none is no number")
    return pd.DataFrame(
        {
            classes: [flags(detections, classes, t).mean() for t in thresholds]
            for classes in CLASSES
        },
        pd.Index(thresholds, name="threshold"),
    )
