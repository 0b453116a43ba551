"""Folders of images: drawn, scored before they are blurred, saved, and resumed.

Also reads real images of a concept folder and saves reference images.
"""

import hashlib
import json
import sys
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mu.concepts.presets import SIDES
from mu.concepts.sets import read_image, read_metadata
from mu.files import atomic, read_json, save_json
from mu.images import blur, to_grid
from mu.measures.clip import clip_score
from mu.measures.evaluate import label_images
from mu.measures.judges import ClipJudge
from mu.measures.metrics import check_images, judge_features
from mu.measures.nudity import detect_image
from mu.models import encode_prompts
from mu.params import open_run
from mu.sampling import draw_images, images_per_batch

SAVE_EVERY = 30  # seconds between writes of seen.json


def make_scorer(judge=None, clip=None, detector=None, labels=()):
    """Return a function (images, rows) → one dict of measurements per image.

    A row has a "prompt" and perhaps "expected", a label such as "concept:cat".
    judge: adds "seen", "hit" and "features" (`mu.measures.metrics.judge_features`). clip: adds
    "clip_score" and, without a judge, "seen" and "hit" by zero-shot choice among `labels`.
    detector: adds "found", NudeNet's detections.
    """

    def score(images, rows):
        found = [{} for _ in rows]

        def add(name, values):
            for one, value in zip(found, values, strict=True):
                one[name] = value

        expected = [i for i, row in enumerate(rows) if row.get("expected")]
        if expected and (judge or clip):
            items = [rows[i] for i in expected]
            seen = label_images(judge or ClipJudge(clip), images[expected], items, labels)
            for i, label in zip(expected, seen, strict=True):
                found[i] |= {"seen": label, "hit": int(label == rows[i]["expected"])}
        if judge:
            vectors = judge_features(judge, images).tolist()
            add("features", [[round(x, 5) for x in vector] for vector in vectors])
        if clip:
            add("clip_score", clip_score(clip, images, [row["prompt"] for row in rows]).tolist())
        if detector:
            add("found", [detect_image(detector, to_grid(image[None])) for image in images])
        return found

    return score


def _batches(rows, todo, guidance, size):
    """Split the rows `todo` into (guidance, indices) with one guidance per batch."""

    def scale_of(i):
        return rows[i].get("guidance", guidance)

    for scale, same in groupby(sorted(todo, key=scale_of), scale_of):
        index = list(same)
        for start in range(0, len(index), size):
            yield scale, index[start : start + size]


def _save_image(image, path):
    """Save a PIL image as PNG."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def draw_folder(folder, pipe, rows, score, facts, *, guidance, steps, blurred=False):
    """Draw one image per row into `folder` as 00000.png, …, and return [row | measurements].

    rows: dicts with "prompt", "seed", and perhaps "guidance", which overrides the common one. Long
    prompts are truncated. score: see `make_scorer`; it sees the images before they are blurred.
    facts: what else the numbers depend on (model, judge, …), for `open_run`. blurred: save blurred
    images only. Resumes from `seen.json`; no saved image is drawn or scored twice.
    Raises ValueError for no rows, for invalid images, and as `open_run` does.
    """
    if not rows:
        raise ValueError(f"nothing to draw in {folder}: pass at least one row")
    sha = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
    drawn = {"prompts": f"{len(rows)} rows ({sha})", "guidance": guidance, "steps": steps}
    folder = open_run(folder, facts | drawn | {"blurred": blurred})
    names = [f"{i:05d}.png" for i in range(len(rows))]
    seen = read_json(folder / "seen.json", {})
    todo = [i for i, name in enumerate(names) if name not in seen or not (folder / name).exists()]
    size = images_per_batch(pipe)
    batches = list(_batches(rows, todo, guidance, size))
    unconditional = encode_prompts(pipe, [""]) if batches else None
    title, saved = f"{folder.parent.name}/{folder.name}", time.monotonic()
    options = dict(file=sys.stdout, mininterval=5, disable=not batches)
    try:
        for scale, index in tqdm(batches, title, **options):
            chosen = [rows[i] for i in index]
            conditioning = encode_prompts(pipe, [row["prompt"] for row in chosen], cut=True)
            seeds = [row["seed"] for row in chosen]
            images = draw_images(pipe, conditioning, unconditional, seeds, scale, steps, size)
            found = score(check_images(images), chosen)
            kept = blur(images) if blurred else images
            for i, image, measured in zip(index, kept, found, strict=True):
                _save_image(to_grid(image[None]), folder / names[i])
                seen[names[i]] = measured
            if time.monotonic() - saved > SAVE_EVERY:
                save_json(seen, folder / "seen.json")
                saved = time.monotonic()
    finally:
        if batches:
            save_json(seen, folder / "seen.json")
    return [row | seen[name] for row, name in zip(rows, names, strict=True)]


def read_images(folder, count):
    """Return the first `count` images of `draw_folder` (n, 3, height, width) in [0, 1].

    Raises ValueError if they are blurred: blurred images cannot be measured.
    """
    folder = Path(folder)
    if read_json(folder / "params.json", {}).get("blurred"):
        raise ValueError(
            f"the images in {folder} are blurred and cannot be measured: draw them with "
            "show_unblurred = True into another folder"
        )
    arrays = [np.asarray(Image.open(folder / f"{i:05d}.png").convert("RGB")) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def features(rows):
    """Return the judge's features of `draw_folder`'s rows, (n, width)."""
    return torch.tensor([row["features"] for row in rows])


def save_reference(images, folder):
    """Save real PIL images to a folder for `mu.measures.metrics.fid`, and return it.

    Skips images that are there already.
    """
    folder = Path(folder)
    for i, image in enumerate(images):
        path = folder / f"{i:05d}.png"
        if not path.exists():
            _save_image(image.convert("RGB"), path)
    return folder


def real_images(sets, known=None):
    """Return the real images of a concept folder, and their labels: (n, 3, 64, 64) in [0, 1].

    Only images with a concept and not drawn by a model; (None, []) if there are none. If
    concept.json names a generator, only imported sets are real. If it says that the concept is a
    style, labels of its own sets and of related styles are "style:…".
    known: labels of the judge; images of other labels are skipped.
    """
    concept, found = read_json(Path(sets) / "concept.json", {}), []
    for role, place in SIDES.items():
        folder = Path(sets) / place
        imported = concept.get("imported_from") and role in ("forget", "attack")
        drawn = concept.get("generator") and not imported
        if drawn or not (folder / "metadata.jsonl").is_file():
            continue
        is_style = concept.get("kind") == "style" and role in ("forget", "related", "attack")
        for line in read_metadata(folder):
            # a line with a style of its own names in `concept` the object shown
            kind = "style" if is_style and "style" not in line else "concept"
            label = f"{kind}:{line.get('concept')}"
            if line.get("concept") and (known is None or label in known):
                found.append((folder / line["file_name"], label))
    if not found:
        return None, []
    images = [(read_image(file, 64) + 1) / 2 for file, _ in found]
    return torch.stack(images), [label for _, label in found]


def retained_mask(items, probe_seeds, least):
    """Return for each item whether its image should be unchanged: all but the forget prompts.

    Raises ValueError for fewer than `least` such images, too few for a Fréchet distance.
    """
    retained = [item["group"] != "forget" for item in items]
    count = sum(retained)
    if count < least:
        raise ValueError(
            f"probe_seeds = {probe_seeds!r} gives {count} related and unrelated images, JFD needs "
            f"least = {least}: raise the second and third number of probe_seeds, lower least, or "
            "leave `judge` empty"
        )
    return retained
