"""What several notebooks of the walk do alike: read a concept's folder, carry a run out once, measure it once, tabulate, compare."""

import re

import pandas as pd
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from mu.images import from_grid, veil
from mu.plots import panel

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
