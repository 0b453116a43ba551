"""What each model draws for a prompt while an attack goes on: the same saved pictures on the page and in JupyterLab."""

import io
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image

from mu.files import atomic, read_json
from mu.images import blur, from_grid
from mu.reports.plots import label

KEEP = {"forget": 8, "related": 1, "unrelated": 1}  # seeds of each prompt that are shown, by group
LARGEST = 256  # side of a picture on the page: a sheet of larger ones is larger than browsers draw


@dataclass(frozen=True)
class Course:
    """The pictures of one attack on several models."""

    name: str
    models: list  # as they are called in figures
    steps: list  # of the attack
    items: list  # {"group", "prompt", "seed"}, the same for all models
    pictures: np.ndarray  # (models, steps, items, side, side, 3), uint8
    hits: (
        np.ndarray
    )  # (models, steps, items): 1 where the judge saw what was asked for, nan where nobody looked


def _tiles(rows, png):
    """{(prompt, seed): (picture, hit)} of judged rows and the grid that was saved with them."""
    side = Image.open(png).width // min(len(rows), 16)
    return {
        (row.get("asked", row["prompt"]), row["seed"]): (tile, row["hit"])
        for row, tile in zip(rows, from_grid(png, len(rows), side), strict=False)
    }


def read_course(out, name, runs, attack_seed=0, keep=KEEP, original=True, blurred=False):
    """The `Course` of the attack `name` below `<out>/attack` on `runs`, and of the original, which nobody attacks, where it was judged.

    keep: how many seeds of each group's prompts, or (prompts, seeds). blurred: hide the pictures (`mu.images.blur`). Only steps and pictures that all of them have are shown.
    Raises FileNotFoundError for an attack or a run that is not there, ValueError where the runs have no picture in common."""
    folders = {run: Path(out) / "attack" / run / f"{name}-{attack_seed}" for run in runs}
    found = {
        run: {
            int(f.stem.split("-")[1]): _tiles(read_json(f), f.with_suffix(".png"))
            for f in sorted(folder.glob("step-*.json"))
        }
        for run, folder in folders.items()
    }
    if absent := [str(folders[run]) for run, steps in found.items() if not steps]:
        there = sorted(f.name for f in (Path(out) / "attack").glob("*/*-*") if f.is_dir())
        raise FileNotFoundError(
            f"no pictures in {', '.join(absent)}: run 30_attack_finetune or 31_attack_prompts; there are: {', '.join(dict.fromkeys(there)) or 'none'}"
        )
    steps = sorted(set.intersection(*(set(by_step) for by_step in found.values())))
    untouched = Path(out) / "original" / "metrics.json"
    if original and untouched.is_file():
        found = {
            "original": dict.fromkeys(
                steps, _tiles(read_json(untouched)["rows"], untouched.with_name("samples.png"))
            )
        } | found
    common = set.intersection(*(set(by_step[step]) for by_step in found.values() for step in steps))
    rows = [
        row | {"prompt": row.get("asked", row["prompt"])}
        for row in read_json(folders[runs[0]] / f"step-{steps[0]:04d}.json")
    ]
    kept = set()
    for group, most in keep.items():
        known = {}  # prompt → its seeds: of a list of prompts each may have its own
        for row in rows:
            if row["group"] == group and (row["prompt"], row["seed"]) in common:
                known.setdefault(row["prompt"], []).append(row["seed"])
        prompts, seeds = most if isinstance(most, tuple) else (len(known), most)
        each = min(seeds, min(map(len, known.values()), default=1))
        kept |= {
            (prompt, seed)
            for prompt in list(known)[: prompts * seeds // each]
            for seed in sorted(known[prompt])[:seeds]
        }  # more prompts where each has few pictures
    items = [
        {key: row[key] for key in ("group", "prompt", "seed")}
        for row in rows
        if row["group"] in keep and (row["prompt"], row["seed"]) in kept
    ]
    if not items:
        raise ValueError(
            f"the runs {', '.join(runs)} have no picture of {name} in common: they were judged with different probes"
        )
    at = [
        [[by_step[step][item["prompt"], item["seed"]] for item in items] for step in steps]
        for by_step in found.values()
    ]
    pictures = np.array([[[picture for picture, _ in line] for line in model] for model in at])
    if blurred:
        pictures = np.array(
            [blur(picture) for picture in pictures.reshape(-1, *pictures.shape[3:])]
        ).reshape(pictures.shape)
    return Course(
        name,
        [label(run) for run in found],
        steps,
        items,
        pictures,
        np.array([[[hit for _, hit in line] for line in model] for model in at], float),
    )


def save_sheet(course, folder, name=""):
    """All pictures of a course as one file `<folder>/explorer/<name>.webp` (its own name, or another), a line an item, in it a column a model and step. Returns what a page, or
    `read_sheet`, needs to show it (JSON)."""
    name = name or course.name
    file = Path(folder) / "explorer" / f"{name}.webp"
    models, steps, items, side = course.pictures.shape[:4]
    sheet = Image.fromarray(
        course.pictures.transpose(2, 3, 0, 1, 4, 5).reshape(items * side, models * steps * side, 3)
    )
    if side > LARGEST:
        sheet = sheet.resize((models * steps * LARGEST, items * LARGEST), Image.LANCZOS)
    with atomic(file) as temporary:
        sheet.save(temporary, format="WEBP", quality=88, method=6)
    hits = [
        [[None if np.isnan(hit) else int(hit) for hit in line] for line in model]
        for model in course.hits
    ]
    return {
        "name": name,
        "sheet": f"explorer/{file.name}",
        "models": course.models,
        "steps": course.steps,
        "items": course.items,
        "hits": hits,
    }


def read_sheet(told, folder):
    """The `Course` that `save_sheet` has told of, its pictures as the file keeps them (WebP loses a little, a large picture its size)."""
    models, steps, items = (len(told[what]) for what in ("models", "steps", "items"))
    sheet = np.asarray(Image.open(Path(folder) / told["sheet"]).convert("RGB"))
    side = sheet.shape[0] // items
    pictures = sheet.reshape(items, side, models, steps, side, 3).transpose(2, 3, 0, 1, 4, 5)
    return Course(
        told["name"],
        told["models"],
        told["steps"],
        told["items"],
        pictures,
        np.array(told["hits"], float),
    )


def explore(courses, scale=2):
    """An ipywidget for JupyterLab: attack, prompt, seed, models (all at first) and a slider over the attack's steps; below, what each model draws, and whether the judge sees what was
    asked for.

    courses: of `read_course`. scale: how many times the pictures are enlarged."""
    by_name = {course.name: course for course in courses}
    attack = widgets.Dropdown(options=list(by_name), description="attack")
    prompt, seed = widgets.Dropdown(description="prompt"), widgets.Dropdown(description="seed")
    models = widgets.SelectMultiple(description="models", rows=3)
    step, shown = widgets.SelectionSlider(options=[0], description="step"), widgets.HBox()

    def fill(*_):
        course = by_name[attack.value]
        prompts = list(dict.fromkeys(item["prompt"] for item in course.items))
        kept = prompt.value if prompt.value in prompts else prompts[0]
        models.options = course.models
        models.value = course.models
        step.options = course.steps  # first: what is drawn in between must find its step
        prompt.options, prompt.value = prompts, kept
        seeds()

    def seeds(*_):
        known = [
            item["seed"] for item in by_name[attack.value].items if item["prompt"] == prompt.value
        ]
        kept = seed.value if seed.value in known else known[0]
        seed.options, seed.value = known, kept
        draw()

    def draw(*_):
        course = by_name[attack.value]
        at = next(
            (
                i
                for i, item in enumerate(course.items)
                if (item["prompt"], item["seed"]) == (prompt.value, seed.value)
            ),
            None,
        )
        if at is None:  # between two changes
            return
        now, boxes = course.steps.index(step.value), []
        for m, model in (
            (m, model) for m, model in enumerate(course.models) if model in models.value
        ):
            picture = widgets.Image(
                value=_png(course.pictures[m, now, at], scale),
                format="png",
                layout={"width": f"{scale * course.pictures.shape[3]}px"},
            )
            words = {1.0: "recognised", 0.0: "not recognised"}.get(
                course.hits[m, now, at], "not judged"
            )
            boxes.append(widgets.VBox([widgets.Label(model), picture, widgets.Label(words)]))
        shown.children = boxes

    (
        attack.observe(fill, "value"),
        prompt.observe(seeds, "value"),
        seed.observe(draw, "value"),
        step.observe(draw, "value"),
        models.observe(draw, "value"),
    )
    fill()
    return widgets.VBox([widgets.HBox([attack, prompt, seed, models]), step, shown])


def _png(picture, scale):
    buffer = io.BytesIO()
    Image.fromarray(picture).resize(
        [scale * side for side in picture.shape[1::-1]], Image.NEAREST
    ).save(buffer, "PNG")
    return buffer.getvalue()
