"""Folders of drawn pictures, each looked at while it is there as it was drawn; then it is kept, blurred if its concept is harmful. They resume."""

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

from mu.files import atomic, read_json, save_json
from mu.images import blur, to_grid
from mu.measures.clip import clip_score
from mu.measures.evaluate import answers
from mu.measures.judges import ZeroShot
from mu.measures.metrics import finite, judge_features
from mu.measures.nudity import look as look_for_nudity
from mu.models import encode_prompts
from mu.params import open_run
from mu.sampling import draw_images, images_per_batch


def look_with(judge=None, clip=None, detector=None, labels=()):
    """What is asked of each picture, as a function (images, rows) → a dict a picture. A row has a `prompt`, and perhaps `expected`, a label as "concept:cat".

    judge: "seen", "hit" and "features" (mu.measures.metrics). clip: "clip_score", and without a judge "seen" and "hit" by zero-shot choice among `labels`. detector: "found",
    NudeNet's detections. Nothing at all: {}."""

    def look(images, rows):
        seen = [{} for _ in rows]

        def add(name, values):
            return [one.update({name: value}) for one, value in zip(seen, values, strict=False)]

        index = [i for i, row in enumerate(rows) if row.get("expected")]
        if index and (judge or clip):
            found = answers(
                judge or ZeroShot(clip), images[index], [rows[i] for i in index], labels
            )
            for i, label in zip(index, found, strict=False):
                seen[i] |= {"seen": label, "hit": int(label == rows[i]["expected"])}
        if judge:
            add(
                "features",
                [[round(x, 5) for x in line] for line in judge_features(judge, images).tolist()],
            )
        if clip:
            add("clip_score", clip_score(clip, images, [row["prompt"] for row in rows]).tolist())
        if detector:
            add("found", [look_for_nudity(detector, to_grid(image[None])) for image in images])
        return seen

    return look


def draw_folder(
    folder,
    pipe,
    rows,
    look,
    facts,
    *,
    guidance,
    steps,
    blurred=False,
    save_every=30,
    batch_size=None,
):
    """Draw a picture for each row into `folder`, as 00000.png, …, and look at it first: [row | what `look` returned].

    rows: dicts with `prompt`, `seed`, perhaps `guidance`, which goes before the common one. A prompt with more tokens than the text encoder reads is cut, as usual for
    prompts of the wild. facts: what else the numbers depend on (model, weights, judge, …), for `open_run`. blurred: keep no picture as it was drawn; what look found
    is all that remains of it. save_every: seconds between writes of `seen.json`: a stopped folder goes on, one picture is looked at once. batch_size: by default what suits the model's size.
    Raises ValueError for no rows, for pictures that are not finite, and as `open_run` for another protocol in the same folder."""
    if not rows:
        raise ValueError(f"there is nothing to draw in {folder}: give one row or more")
    sha = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
    folder = open_run(
        folder,
        facts
        | {
            "prompts": f"{len(rows)} rows ({sha})",
            "guidance": guidance,
            "steps": steps,
            "blurred": blurred,
        },
    )
    names, seen = [f"{i:05d}.png" for i in range(len(rows))], read_json(folder / "seen.json", {})
    todo = [i for i, name in enumerate(names) if name not in seen or not (folder / name).exists()]
    scale, batch = (
        (lambda i: rows[i].get("guidance", guidance)),
        batch_size or images_per_batch(pipe),
    )
    chunks = [
        part[k : k + batch]
        for _, part in ((s, list(g)) for s, g in groupby(sorted(todo, key=scale), scale))
        for k in range(0, len(part), batch)
    ]
    unconditional, saved = encode_prompts(pipe, [""]) if chunks else None, time.monotonic()
    try:
        for chunk in tqdm(
            chunks,
            folder.parent.name + "/" + folder.name,
            file=sys.stdout,
            mininterval=5,
            disable=not chunks,
        ):
            images = draw_images(
                pipe,
                encode_prompts(pipe, [rows[i]["prompt"] for i in chunk], cut=True),
                unconditional,
                [rows[i]["seed"] for i in chunk],
                scale(chunk[0]),
                steps,
                batch,
            )
            found = look(finite(images), [rows[i] for i in chunk])
            for i, image, numbers in zip(
                chunk, blur(images) if blurred else images, found, strict=False
            ):
                with atomic(folder / names[i]) as temporary:
                    to_grid(image[None]).save(temporary, format="PNG")
                seen[names[i]] = numbers
            if time.monotonic() - saved > save_every:
                save_json(seen, folder / "seen.json")
                saved = time.monotonic()
    finally:
        if chunks:
            save_json(seen, folder / "seen.json")
    return [row | seen[name] for row, name in zip(rows, names, strict=False)]


def read_pictures(folder, count):
    """The first `count` pictures of `draw_folder` as a tensor (n, 3, height, width) in 0…1. Raises ValueError where they are blurred: nothing can be measured on them."""
    folder = Path(folder)
    if read_json(folder / "params.json", {}).get("blurred"):
        raise ValueError(
            f"the pictures in {folder} are blurred, so there is nothing to measure on them: draw them with show_unblurred = True into another folder"
        )
    arrays = [np.asarray(Image.open(folder / f"{i:05d}.png").convert("RGB")) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def features(rows):
    """The judge's features of `draw_folder`'s rows, (n, width)."""
    return torch.tensor([row["features"] for row in rows])


def save_reference(images, folder):
    """Real pictures (PIL) as a folder for `mu.measures.metrics.fid`, each once; a folder that has them all is left as it is. Returns it."""
    folder = Path(folder)
    for i, image in enumerate(images):
        if not (folder / f"{i:05d}.png").exists():
            with atomic(folder / f"{i:05d}.png") as temporary:
                image.convert("RGB").save(temporary, format="PNG")
    return folder
