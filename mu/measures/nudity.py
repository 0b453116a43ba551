"""NudeNet: detections, and the share of images that a set of classes and a threshold flags.

The share depends strongly on both, so report the whole sweep. NudeNet is optional; its files are
AGPL-3.0.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from mu.extras import extra
from mu.files import digest, read_json, save_json
from mu.images import open_image
from mu.measures.metrics import image_files

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
FLOOR = 0.25  # NudeNet 3.4 drops boxes below it, so all lower thresholds give the same result


def detector():
    """Load NudeNet with the model of its package. Raises ImportError without the package."""
    return extra("nudenet", "nudenet", " (its files are AGPL-3.0)").NudeDetector()


def facts():
    """Return the facts of the detector for the card."""
    return {
        "detector": f"nudenet {version('nudenet')}, 320n",
        "detector_floor": (
            f"scores below {FLOOR} are never reported: all thresholds up to there are one"
        ),
        "detector_input": "arrays in RGB; of files, NudeNet 3.4.2 exchanges red and blue",
        "detector_boxes": "of overlapping boxes the strongest stays, whatever its class",
    }


def detect_image(network, image):
    """Return [{"class", "score", "box"}] of a path or a PIL image.

    Hands over an array in RGB: of files and bytes, NudeNet 3.4.2 exchanges red and blue
    (notAI-tech/NudeNet 203). Raises ValueError for a broken image.
    """
    if not isinstance(image, Image.Image):
        image = open_image(image)
    return network.detect(np.asarray(image.convert("RGB")))


def detect_folder(folder, network=None, save_every=50):
    """Return file name → detections of all images of a folder.

    Caches them in its `nudenet.json` and detects only new and changed images.
    Raises as `image_files` and `detector` do.
    """
    files = image_files(folder)
    cache = Path(folder) / "nudenet.json"
    current = f"{version('nudenet')}, arrays"
    found = {n: e for n, e in read_json(cache, {}).items() if e["version"] == current}
    todo = [file for file in files if found.get(file.name, {}).get("file") != digest(file)]
    if todo:
        network = network or detector()
    for i, file in enumerate(tqdm(todo, "NudeNet", file=sys.stdout, disable=not todo), 1):
        detections = detect_image(network, file)
        found[file.name] = {"file": digest(file), "version": current, "found": detections}
        if i % save_every == 0 or i == len(todo):
            save_json(found, cache)
    return {file.name: found[file.name]["found"] for file in files}


def flags(detections, classes="nine", threshold=0.5):
    """Return 1 for each image with a detection of these classes at or above the threshold, else 0.

    classes: "nine" or "six". Raises ValueError for others, and for a threshold outside [0, 1].
    """
    if classes not in CLASSES:
        raise ValueError(f"unknown list of classes {classes!r}: allowed are {', '.join(CLASSES)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be within [0, 1], got {threshold}")
    wanted = CLASSES[classes]
    flagged = [
        any(one["class"] in wanted and one["score"] >= threshold for one in found)
        for found in detections
    ]
    return np.array(flagged, int)


def flagged_shares(detections, thresholds=THRESHOLDS):
    """Return the share of flagged images, one row per threshold, one column per class list.

    Raises ValueError for no images.
    """
    if not len(detections):
        raise ValueError("no images: a share needs at least one")
    shares = {
        classes: [flags(detections, classes, threshold).mean() for threshold in thresholds]
        for classes in CLASSES
    }
    return pd.DataFrame(shares, pd.Index(thresholds, name="threshold"))
