"""Images of each model while an attack progresses: sprite sheets for the page, a widget."""

import io
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image

from mu.files import atomic, read_json
from mu.images import blur
from mu.reports.plots import label, saved_images

KEEP = {"forget": 8, "related": 1, "unrelated": 1}  # group → seeds per prompt
LARGEST = 256  # side of an image on the page; browsers do not draw larger sprite sheets


@dataclass(frozen=True)
class AttackProgress:
    """Images of one attack on several models, step by step."""

    name: str
    models: list  # display names
    steps: list  # of the attack
    items: list  # {"group", "prompt", "seed"}, the same for all models
    pictures: np.ndarray  # (models, steps, items, side, side, 3), uint8
    hits: np.ndarray  # (models, steps, items): 1 if recognised, else 0; nan if not judged


def _by_key(rows, png):
    """Return (prompt, seed) → (image, hit) of evaluation rows and the grid saved with them."""
    images = saved_images(rows, png)
    return {
        (row.get("asked", row["prompt"]), row["seed"]): (image, row["hit"])
        for row, image in zip(rows, images, strict=True)
    }


def read_progress(out, name, runs, attack_seed=0, keep=KEEP, original=True, blurred=False):
    """Read the `AttackProgress` of the attack `name` on `runs`, below `<out>/attack`.

    Only steps and images that all models have are kept.

    keep: group → seeds per prompt, or (prompts, seeds). original: add the original model, which is
    not attacked, if it was evaluated. blurred: blur the images (`mu.images.blur`).
    Raises FileNotFoundError for a missing attack or run, ValueError if the runs share no image.
    """
    found = _read_runs(out, name, runs, attack_seed)
    steps = sorted(set.intersection(*(set(by_step) for by_step in found.values())))
    untouched = Path(out) / "original" / "metrics.json"
    if original and untouched.is_file():
        rows = read_json(untouched)["rows"]
        images = _by_key(rows, untouched.with_name("samples.png"))
        found = {"original": dict.fromkeys(steps, images)} | found
    items = _common_items(_folder(out, name, runs[0], attack_seed), steps, found, keep)
    if not items:
        raise ValueError(
            f"the runs {', '.join(runs)} share no image of {name}: "
            "evaluate them with the same prompts and seeds"
        )
    keys = [(item["prompt"], item["seed"]) for item in items]
    cells = [[[by_step[step][key] for key in keys] for step in steps] for by_step in found.values()]
    pictures = np.array([[[image for image, _ in line] for line in model] for model in cells])
    if blurred:
        flat = pictures.reshape(-1, *pictures.shape[3:])
        pictures = np.array([blur(image) for image in flat]).reshape(pictures.shape)
    hits = np.array([[[hit for _, hit in line] for line in model] for model in cells], float)
    return AttackProgress(name, [label(run) for run in found], steps, items, pictures, hits)


def _folder(out, name, run, attack_seed):
    return Path(out) / "attack" / run / f"{name}-{attack_seed}"


def _read_runs(out, name, runs, attack_seed):
    """Return run → step → `_by_key` of an attack. Raises FileNotFoundError for a missing one."""
    found, missing = {}, []
    for run in runs:
        folder = _folder(out, name, run, attack_seed)
        files = sorted(folder.glob("step-*.json"))
        found[run] = {
            int(file.stem.split("-")[1]): _by_key(read_json(file), file.with_suffix(".png"))
            for file in files
        }
        if not files:
            missing.append(str(folder))
    if missing:
        folders = (Path(out) / "attack").glob("*/*-*")
        known = dict.fromkeys(sorted(f.name for f in folders if f.is_dir()))
        raise FileNotFoundError(
            f"no images in {', '.join(missing)}; available attacks: {', '.join(known) or 'none'}. "
            "Run 30_attack_finetune or 31_attack_prompts."
        )
    return found


def _common_items(folder, steps, found, keep):
    """Return the items of `keep` that all models have at all steps, in the order of `folder`."""
    rows = [
        row | {"prompt": row.get("asked", row["prompt"])}
        for row in read_json(folder / f"step-{steps[0]:04d}.json")
    ]
    by_model = [by_step[step].keys() for by_step in found.values() for step in steps]
    common = set.intersection(*map(set, by_model))
    kept = set()
    for group, most in keep.items():
        seeds = {}  # prompt → its seeds, which may differ between prompts
        for row in rows:
            if row["group"] == group and (row["prompt"], row["seed"]) in common:
                seeds.setdefault(row["prompt"], []).append(row["seed"])
        kept |= _choose(seeds, most)
    return [
        {key: row[key] for key in ("group", "prompt", "seed")}
        for row in rows
        if row["group"] in keep and (row["prompt"], row["seed"]) in kept
    ]


def _choose(seeds, most):
    """Return the (prompt, seed) to show, more prompts if each has fewer seeds than asked for.

    seeds: prompt → its seeds. most: seeds per prompt, or (prompts, seeds).
    """
    prompts, each = most if isinstance(most, tuple) else (len(seeds), most)
    available = min(each, min(map(len, seeds.values()), default=1))
    chosen = list(seeds)[: prompts * each // available]
    return {(prompt, seed) for prompt in chosen for seed in sorted(seeds[prompt])[:each]}


def save_sprite_sheet(progress, folder, name=""):
    """Save all images as one sprite sheet, `<folder>/explorer/<name>.webp`.

    One row per item, one column per model and step. name: by default that of the attack.
    Returns what the page, or `read_sprite_sheet`, needs to show it (JSON).
    """
    name = name or progress.name
    file = Path(folder) / "explorer" / f"{name}.webp"
    models, steps, items, side = progress.pictures.shape[:4]
    pixels = progress.pictures.transpose(2, 3, 0, 1, 4, 5)
    sheet = Image.fromarray(pixels.reshape(items * side, models * steps * side, 3))
    if side > LARGEST:
        sheet = sheet.resize((models * steps * LARGEST, items * LARGEST), Image.LANCZOS)
    with atomic(file) as temporary:
        sheet.save(temporary, format="WEBP", quality=88, method=6)
    hits = [
        [[None if np.isnan(hit) else int(hit) for hit in line] for line in model]
        for model in progress.hits
    ]
    return {
        "name": name,
        "sheet": f"explorer/{file.name}",
        "models": progress.models,
        "steps": progress.steps,
        "items": progress.items,
        "hits": hits,
    }


def read_sprite_sheet(facts, folder):
    """Read the `AttackProgress` that `save_sprite_sheet` saved, given what it returned.

    Images are those of the file: WebP is lossy, and large images were scaled down.
    """
    models, steps, items = (len(facts[key]) for key in ("models", "steps", "items"))
    sheet = np.asarray(Image.open(Path(folder) / facts["sheet"]).convert("RGB"))
    side = sheet.shape[0] // items
    pictures = sheet.reshape(items, side, models, steps, side, 3).transpose(2, 3, 0, 1, 4, 5)
    hits = np.array(facts["hits"], float)
    return AttackProgress(
        facts["name"], facts["models"], facts["steps"], facts["items"], pictures, hits
    )


def explore(courses, scale=2):
    """Return a widget for JupyterLab that shows attacks step by step.

    Menus choose attack, prompt, seed and models (all by default), a slider the step. Below are the
    image of each model and whether the judge recognises it.
    courses: of `read_progress`. scale: enlargement of the images.
    """
    return _Explorer(courses, scale).box


class _Explorer:
    """The widget of `explore`; a change of one menu updates those that depend on it."""

    def __init__(self, courses, scale):
        self.courses = {progress.name: progress for progress in courses}
        self.scale = scale
        self.attack = widgets.Dropdown(options=list(self.courses), description="attack")
        self.prompt = widgets.Dropdown(description="prompt")
        self.seed = widgets.Dropdown(description="seed")
        self.models = widgets.SelectMultiple(description="models", rows=3)
        self.step = widgets.SelectionSlider(options=[0], description="step")
        self.images = widgets.HBox()
        self.attack.observe(self.update_attack, "value")
        self.prompt.observe(self.update_seeds, "value")
        for menu in (self.seed, self.step, self.models):
            menu.observe(self.draw, "value")
        self.update_attack()
        menus = widgets.HBox([self.attack, self.prompt, self.seed, self.models])
        self.box = widgets.VBox([menus, self.step, self.images])

    @property
    def progress(self):
        return self.courses[self.attack.value]

    def update_attack(self, *_):
        prompts = list(dict.fromkeys(item["prompt"] for item in self.progress.items))
        kept = self.prompt.value if self.prompt.value in prompts else prompts[0]
        self.models.options = self.progress.models
        self.models.value = self.progress.models
        # Steps change before the prompt, whose change draws an image of one of them.
        self.step.options = self.progress.steps
        self.prompt.options, self.prompt.value = prompts, kept
        self.update_seeds()

    def update_seeds(self, *_):
        items = self.progress.items
        seeds = [item["seed"] for item in items if item["prompt"] == self.prompt.value]
        kept = self.seed.value if self.seed.value in seeds else seeds[0]
        self.seed.options, self.seed.value = seeds, kept
        self.draw()

    def draw(self, *_):
        progress = self.progress
        keys = [(item["prompt"], item["seed"]) for item in progress.items]
        key = (self.prompt.value, self.seed.value)
        if key not in keys:  # one of two menus has changed
            return
        item, step = keys.index(key), progress.steps.index(self.step.value)
        boxes = []
        for m, model in enumerate(progress.models):
            if model in self.models.value:
                hit = progress.hits[m, step, item]
                verdict = {1.0: "recognised", 0.0: "not recognised"}.get(hit, "not judged")
                image = self.image(progress.pictures[m, step, item])
                boxes.append(widgets.VBox([widgets.Label(model), image, widgets.Label(verdict)]))
        self.images.children = boxes

    def image(self, pixels):
        height, width = (self.scale * side for side in pixels.shape[:2])
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.NEAREST).save(buffer, "PNG")
        return widgets.Image(value=buffer.getvalue(), format="png", layout={"width": f"{width}px"})
