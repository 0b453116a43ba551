"""What several notebooks of the walk do alike: read a concept's folder, carry a run out once, measure it once, tabulate, compare."""

import re
from pathlib import Path

import pandas as pd
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from mu.concepts.probe import viewing
from mu.evaluate import evaluate, score
from mu.files import read_json, save_json
from mu.images import from_grid, save_grid, veil
from mu.params import protocol
from mu.plots import panel
from mu.statistics import steps_to_revival

diffusers_logging.disable_progress_bar()  # those of reading files; the ones of training stay
transformers_logging.disable_progress_bar()
pd.set_option("display.max_colwidth", None)
pd.set_option("display.precision", 3)
LABELS = {
    "meta": "meta-unlearned",
    "first": "meta-unlearned, first phase",
    "stronger": "unlearned, stronger",
    "longer": "unlearned, longer",
    "ascent": "ascent only",
    "ascent-weak": "ascent only, weak",
    "ascent-strong": "ascent only, strong",
}


def label(run):
    """What a run is called in figures: other words for some, and "meta-0", "meta-1", … are one model, trained with several seeds."""
    base = re.sub(r"-\d+$", "", run)
    return LABELS.get(base, base)


def measure(folder, pipe, judge, probe, guidance, steps, facts):
    """Draw and judge the probe: rows and protocol card go to metrics.json, pictures to samples.png, once for the same facts. Returns rows.

    Pictures of a harmful concept are saved veiled; they are drawn anew when this is asked for differently."""
    facts = facts | {
        "images": len(probe.items),
        "sampling_guidance": guidance,
        "sampling_steps": steps,
    }
    made = read_json(Path(folder) / "metrics.json")
    wanted = {"harmful": None, "veiled": None} | viewing(probe) | facts
    if not made or {name: made["protocol"].get(name) for name in wanted} != wanted:
        rows, images = evaluate(pipe, judge, probe, guidance, steps)
        save_grid(veil(images) if probe.veiled else images, Path(folder) / "samples.png")
        made = {
            "rows": rows,
            "protocol": protocol(
                **facts | viewing(probe), run=read_json(Path(folder) / "params.json")
            ),
        }
        save_json(made, Path(folder) / "metrics.json")
    return made["rows"]


def scores(table, by, over=None):
    """Mean of "hit" and its 95 % interval in each group of rows: over images, or over the means of each `over` (columns; no interval from one)."""
    parts = [
        (key, part.hit if over is None else part.groupby(over).hit.mean())
        for key, part in table.groupby(by, sort=False)
    ]

    def interval(hits):
        return (
            score(hits, means=over is not None)
            if len(hits) > 1 and hits.notna().all()
            else (hits.mean(),)
        )  # no judge: no score

    found = [
        dict(zip(by, key, strict=False))
        | dict(zip(("score", "low", "high"), interval(hits), strict=False))
        | {"n": len(hits)}
        for key, hits in parts
    ]
    return pd.DataFrame(found, columns=[*by, "score", "low", "high", "n"])


def revival(table, threshold=0.5):
    """First evaluated step with a concept's score above the threshold, a row a run, learning rate and attack seed; inf if there is none."""
    one = ["model", "run", "lr", "attack_seed"]
    curve = (
        table[table.group == "forget"]
        .groupby([*one, "step"], sort=False, as_index=False)
        .hit.mean()
    )
    found = {
        key: (steps_to_revival(c.step, c.hit, threshold), c.step.max())
        for key, c in curve.groupby(one, sort=False)
    }
    return pd.DataFrame(
        [
            dict(zip(one, key, strict=False))
            | {"revived": float("inf") if r.censored else r.step, "last": last}
            for key, (r, last) in found.items()
        ]
    )


def compare(columns, each=2, veiled=False):
    """Figure: `each` pictures of each group, first one of each prompt, then with further seeds, side by side.

    columns: title → (rows, the PNG saved with them). veiled: hide them, for pictures that may have been saved as they are."""
    rows = next(iter(columns.values()))[0]
    shown = [
        (r["prompt"], r["seed"])
        for g in ("forget", "related", "unrelated")
        for r in sorted((r for r in rows if r["group"] == g), key=lambda r: r["seed"])[:each]
    ]

    def place(rows, item):
        return next(i for i, row in enumerate(rows) if (row["prompt"], row["seed"]) == item)

    tiles = [
        (rows, from_grid(png, len(rows), Image.open(png).width // min(len(rows), 16)))
        for rows, png in columns.values()
    ]
    shade = veil if veiled else lambda images: images
    return panel(
        [shade([images[place(rows, item)] for rows, images in tiles]) for item in shown],
        [prompt for prompt, _ in shown],
        list(columns),
    )


def bars(*claims):
    """Table of claims (words, measured, least, most): whether each is met. For figures that a short run may miss, which is shown, not hidden. What is measured may be words: it cannot be told;
    or a number and words that say it better."""

    def met(value, least, most):
        return "?" if isinstance(value, str) else "✓" if least <= value <= most else "✗"

    pairs = [
        (words, *(value if isinstance(value, tuple) else (value, value)), least, most)
        for words, value, least, most in claims
    ]
    return pd.DataFrame(
        [
            {"asked": words, "measured": said, "met": met(value, least, most)}
            for words, value, said, least, most in pairs
        ]
    )
