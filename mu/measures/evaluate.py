"""What a model still draws: a judge trained on real emoji, scores with intervals."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from mu import ROOT
from mu.concepts.probe import blur_facts
from mu.files import read_json, save_json
from mu.images import blur, save_grid
from mu.measures.judges import named_judge
from mu.models import select
from mu.params import protocol
from mu.sampling import draw_images, images_per_batch

JUDGE = str(ROOT / "data" / "pocket-judge")


def load_judge(path=JUDGE):
    """The pocket models' judge by its folder, another by its name (`mu.measures.judges.named_judge`), or None for an empty path: pictures are then drawn and looked at, not scored."""
    if not path:
        return None
    if (named := named_judge(str(path))) is not None:
        return named
    return (
        ResNetForImageClassification.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True
        )
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def judge_images(judge, images, kind="concept"):
    """The label of a kind ("concept" or "style") that the judge gives to each image (n, 3, height, width) in 0…1.

    Raises ValueError for images that are not finite, KeyError for a kind that the judge does not know."""
    if not torch.isfinite(images).all():
        raise ValueError(
            "images hold NaN or infinite values: the model that drew them has diverged"
        )
    columns = [i for i, label in judge.config.id2label.items() if label.startswith(kind + ":")]
    if not columns:
        raise KeyError(
            f"unknown kind {kind!r}: allowed are {', '.join(sorted({v.split(':')[0] for v in judge.config.id2label.values()}))}"
        )
    side = judge.config.image_size if hasattr(judge.config, "image_size") else 64
    pixels = (
        images.float()
        if images.shape[-1] == side
        else F.interpolate(images.float(), size=(side, side), mode="area")
    )
    logits = torch.cat([judge(x).logits for x in (pixels * 2 - 1).split(128)])[:, columns]
    return [judge.config.id2label[columns[i]] for i in logits.argmax(1).tolist()]


def answers(judge, images, items, labels=()):
    """The label that a judge gives each picture, of the kind that is expected of it; "" where it does not look.

    Raises ValueError where the pocket judge does not know what is expected: every picture would be a miss, and the concept taken for forgotten."""
    if hasattr(judge, "see"):
        return judge.see(images, items, labels)
    unknown = sorted({item["expected"] for item in items} - set(judge.config.id2label.values()))
    if unknown:
        raise ValueError(
            f"the judge does not know {', '.join(unknown)}, and would call every picture of it something else: choose among its "
            f"{len(judge.config.id2label)} labels, such as {', '.join(list(judge.config.id2label.values())[:5])}, or another judge (mu.measures.judges), or none"
        )
    kinds = [item["expected"].split(":")[0] for item in items]
    seen = {kind: judge_images(judge, images, kind) for kind in set(kinds)}
    return [seen[kind][i] for i, kind in enumerate(kinds)]


def draw_probe(pipe, probe, guidance=5.0, steps=25):
    """The probe's pictures, (n, 3, height, width) in 0…1; an item that names a guidance of its own gets that."""
    scales, images = [item.get("guidance", guidance) for item in probe.items], {}
    for scale in dict.fromkeys(scales):
        index = [i for i, own in enumerate(scales) if own == scale]
        found = draw_images(
            pipe,
            select(probe.conditioning, torch.tensor(index)),
            probe.unconditional,
            [probe.items[i]["seed"] for i in index],
            scale,
            steps,
            images_per_batch(pipe),
        )
        images |= dict(zip(index, found, strict=False))
    return torch.stack([images[i] for i in range(len(scales))])


def evaluate(pipe, judge, probe, guidance=5.0, steps=25):
    """Draw a probe and judge it. Returns (rows: the items with "seen" and "hit", nothing and NaN where nobody looks; images (n, 3, height, width) in 0…1)."""
    images = draw_probe(pipe, probe, guidance, steps)
    if judge is None:
        return [item | {"seen": "", "hit": float("nan")} for item in probe.items], images
    found = answers(judge, images, probe.items, probe.labels)
    return [
        item | {"seen": label, "hit": int(label == item["expected"]) if label else float("nan")}
        for item, label in zip(probe.items, found, strict=False)
    ], images


def evaluate_step(pipe, judge, probe, step, file, guidance, sampling_steps):
    """Draw and judge a probe after so many steps of an attack: pictures (PNG; blurred if the concept is harmful), and then rows (JSON), into the file."""
    found, images = evaluate(pipe, judge, probe, guidance, sampling_steps)
    save_grid(blur(images) if probe.blurred else images, file.with_suffix(".png"))
    save_json([row | {"step": step} for row in found], file)


def measure(folder, pipe, judge, probe, guidance, steps, facts):
    """Draw and judge the probe: rows and protocol card go to metrics.json, pictures to samples.png, once for the same facts. Returns rows.

    Pictures of a harmful concept are saved blurred; they are drawn anew when this is asked for differently."""
    facts = facts | {
        "images": len(probe.items),
        "sampling_guidance": guidance,
        "sampling_steps": steps,
    }
    made = read_json(Path(folder) / "metrics.json")
    wanted = {"harmful": None, "blurred": None} | blur_facts(probe) | facts
    if not made or {name: made["protocol"].get(name) for name in wanted} != wanted:
        rows, images = evaluate(pipe, judge, probe, guidance, steps)
        save_grid(blur(images) if probe.blurred else images, Path(folder) / "samples.png")
        made = {
            "rows": rows,
            "protocol": protocol(
                **facts | blur_facts(probe), run=read_json(Path(folder) / "params.json")
            ),
        }
        save_json(made, Path(folder) / "metrics.json")
    return made["rows"]
