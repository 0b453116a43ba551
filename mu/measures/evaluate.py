"""Draw evaluation prompts, and let a judge label the images."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from mu import ROOT
from mu.concepts.probe import probe_facts
from mu.files import read_json, save_json
from mu.images import blur, save_grid
from mu.measures.judges import named_judge
from mu.measures.metrics import check_finite
from mu.models import select
from mu.params import protocol
from mu.sampling import draw_images, images_per_batch

JUDGE = str(ROOT / "data" / "pocket-judge")


def load_judge(path=JUDGE):
    """Load the pocket judge from its folder, or another by name (`mu.measures.judges.named_judge`).

    Returns None for an empty path: images are drawn but have no score.
    """
    if not path:
        return None
    named = named_judge(str(path))
    if named is not None:
        return named
    options = dict(dtype=torch.float32, use_safetensors=True)
    judge = ResNetForImageClassification.from_pretrained(path, **options)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def judge_images(judge, images, kind="concept"):
    """Return the pocket judge's label of a kind for each image (n, 3, height, width) in [0, 1].

    kind: "concept" or "style". Raises ValueError for NaN and KeyError for an unknown kind.
    """
    check_finite(images)
    names = judge.config.id2label
    columns = [i for i, label in names.items() if label.startswith(kind + ":")]
    if not columns:
        kinds = sorted({label.split(":")[0] for label in names.values()})
        raise KeyError(f"unknown kind {kind!r}: allowed are {', '.join(kinds)}")
    side = getattr(judge.config, "image_size", 64)
    pixels = images.float()
    if images.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="area")
    logits = torch.cat([judge(part).logits for part in (pixels * 2 - 1).split(128)])
    return [names[columns[i]] for i in logits[:, columns].argmax(1).tolist()]


def label_images(judge, images, items, labels=()):
    """Return a judge's label for each image, of the expected kind; "" if it gives none.

    Raises ValueError if the pocket judge does not know an expected label: every image would be a
    miss, and the concept would seem unlearned.
    """
    if hasattr(judge, "label"):
        return judge.label(images, items, labels)
    known = list(judge.config.id2label.values())
    unknown = sorted({item["expected"] for item in items} - set(known))
    if unknown:
        raise ValueError(
            f"the judge does not know {', '.join(unknown)}: allowed are its {len(known)} labels, "
            f"such as {', '.join(known[:5])}; or choose another judge (mu.measures.judges), or none"
        )
    kinds = [item["expected"].split(":")[0] for item in items]
    seen = {kind: judge_images(judge, images, kind) for kind in set(kinds)}
    return [seen[kind][i] for i, kind in enumerate(kinds)]


def draw_probe(pipe, probe, guidance=5.0, steps=25):
    """Return the images of evaluation prompts, (n, 3, height, width) in [0, 1].

    guidance: scale of the items without one of their own.
    """
    scales = [item.get("guidance", guidance) for item in probe.items]
    images = {}
    for scale in dict.fromkeys(scales):
        index = [i for i, own in enumerate(scales) if own == scale]
        conditioning = select(probe.conditioning, torch.tensor(index))
        seeds = [probe.items[i]["seed"] for i in index]
        options = scale, steps, images_per_batch(pipe)
        drawn = draw_images(pipe, conditioning, probe.unconditional, seeds, *options)
        images |= dict(zip(index, drawn, strict=True))
    return torch.stack([images[i] for i in range(len(scales))])


def evaluate(pipe, judge, probe, guidance=5.0, steps=25):
    """Draw and judge evaluation prompts: (rows, images (n, 3, height, width) in [0, 1]).

    rows: the items with "seen", the judge's label, and "hit", whether it is the expected one.
    Without a label they are "" and NaN.
    """
    images = draw_probe(pipe, probe, guidance, steps)
    seen = [""] * len(probe.items)
    if judge is not None:
        seen = label_images(judge, images, probe.items, probe.labels)
    rows = []
    for item, label in zip(probe.items, seen, strict=True):
        hit = int(label == item["expected"]) if label else float("nan")
        rows.append(item | {"seen": label, "hit": hit})
    return rows, images


def _save_images(images, probe, path):
    save_grid(blur(images) if probe.blurred else images, path)


def evaluate_step(pipe, judge, probe, step, file, guidance, sampling_steps):
    """Evaluate after `step` steps of an attack: images to a PNG, then rows to `file` (JSON).

    Saves images of a harmful concept blurred.
    """
    rows, images = evaluate(pipe, judge, probe, guidance, sampling_steps)
    _save_images(images, probe, file.with_suffix(".png"))
    save_json([row | {"step": step} for row in rows], file)


def measure(folder, pipe, judge, probe, guidance, steps, facts):
    """Evaluate once for the same facts, and return the rows.

    Writes rows and protocol card to metrics.json and images to samples.png, blurred for a harmful
    concept. Draws again if the blur setting differs.
    """
    rows, facts = find_rows(folder, probe, guidance, steps, facts)
    if rows:
        return rows
    rows, images = evaluate(pipe, judge, probe, guidance, steps)
    _save_images(images, probe, Path(folder) / "samples.png")
    run = read_json(Path(folder) / "params.json")
    card = protocol(**facts | probe_facts(probe), run=run)
    save_json({"rows": rows, "protocol": card}, Path(folder) / "metrics.json")
    return rows


def find_rows(folder, probe, guidance, steps, facts):
    """Return the rows that `measure` saved for the same facts (else None), and these facts."""
    facts = facts | {"images": len(probe.items)}
    facts |= {"sampling_guidance": guidance, "sampling_steps": steps}
    wanted = {"harmful": None, "blurred": None} | probe_facts(probe) | facts
    made = read_json(Path(folder) / "metrics.json")
    same = made and {name: made["protocol"].get(name) for name in wanted} == wanted
    return (made["rows"] if same else None), facts
