"""What a model still draws: a judge trained on real emoji, scores with intervals, steps to revival."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from transformers import ResNetForImageClassification

from mu.models import draw_images, encode_prompts, rows

JUDGE = str(Path(__file__).parent.parent / "data" / "pocket-judge")


@dataclass(frozen=True)
class Probe:
    """Prompts to draw and what should be seen in them, encoded once: one row an image."""
    items: list  # {"group", "concept", "prompt", "seed"}, one an image
    conditioning: dict
    unconditional: dict


def load_judge(path=JUDGE):
    return ResNetForImageClassification.from_pretrained(path, use_safetensors=True).eval().requires_grad_(False)


def judge_labels(judge, kind="concept"):
    """Names of the judge's concepts (or styles) in the order of its logits."""
    return [name.split(":", 1)[1] for _, name in sorted(judge.config.id2label.items()) if name.startswith(kind + ":")]


@torch.no_grad()
def judge_images(judge, images, kind="concept"):
    """The name that the judge gives to each image (n, 3, height, width) in 0…1. kind: "concept" or "style"."""
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values: the model that drew them has diverged")
    names = [judge.config.id2label[i] for i in range(judge.config.num_labels)]
    columns = [i for i, name in enumerate(names) if name.startswith(kind + ":")]
    pixels = F.interpolate(images.float(), size=(64, 64), mode="area") if images.shape[-1] != 64 else images.float()
    logits = torch.cat([judge(x).logits for x in (pixels * 2 - 1).split(128)])[:, columns]
    return [names[columns[i]].split(":", 1)[1] for i in logits.argmax(1)]


def make_probe(pipe, groups, templates=("a {}",), seeds=range(8)):
    """Every concept of every group (name → list of concepts), every template, every seed."""
    items = [{"group": group, "concept": concept, "prompt": template.format(concept), "seed": int(seed)}
             for group, concepts in groups.items() for concept in concepts for template in templates for seed in seeds]
    prompts = sorted({item["prompt"] for item in items})
    index = torch.tensor([prompts.index(item["prompt"]) for item in items])
    return Probe(items, rows(encode_prompts(pipe, prompts), index), encode_prompts(pipe, [""]))


def evaluate(pipe, judge, probe, guidance=5.0, steps=25, kind="concept"):
    """Draw a probe and judge it. Returns (rows: the items with "seen" and "hit", images in 0…1)."""
    images = draw_images(pipe, probe.conditioning, probe.unconditional, [item["seed"] for item in probe.items], guidance, steps)
    seen = judge_images(judge, images, kind)
    return [item | {"seen": name, "hit": int(name == item["concept"])} for item, name in zip(probe.items, seen)], images


def score(hits, level=0.95, seed=0):
    """Mean of hits (0 or 1, or per-seed means) and its percentile-bootstrap interval: (mean, low, high)."""
    hits = np.asarray(hits, float)
    if not len(hits) or not np.isfinite(hits).all():
        raise ValueError(f"a score needs at least one finite value, got {hits}")
    if len(hits) == 1 or (hits == hits[0]).all():
        return hits.mean(), hits.mean(), hits.mean()
    found = bootstrap((hits,), np.mean, confidence_level=level, method="percentile", n_resamples=2000, rng=seed).confidence_interval
    return hits.mean(), found.low, found.high


def steps_to_revival(steps, scores, threshold=0.5):
    """First evaluated step at which the score passes the threshold; None if it never does (censored at the last step)."""
    return next((step for step, value in zip(steps, scores) if value > threshold), None)
