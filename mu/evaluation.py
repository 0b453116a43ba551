"""What 50_evaluate tabulates: models side by side, picture by picture."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mu.concepts import read_image, read_metadata
from mu.formats import load_weights
from mu.statistics import paired_interval


def finished(out, runs):
    """The names in `runs` (with commas), each a finished run below `out`, or "original". Raises FileNotFoundError that lists those which are there."""
    names = [name.strip() for name in runs.split(",")]
    absent = [name for name in names if name != "original" and not (Path(out) / name / "unet").is_dir()]
    if absent:
        there = ", ".join(sorted(folder.parent.name for folder in Path(out).glob("*/unet"))) or "none"
        raise FileNotFoundError(f"{', '.join(absent)}: no finished run below {out}; there are: {there}. Make it by 20_unlearn or 21_meta_unlearn, or name another `out`")
    return names


def wear(pipe, original, out, name):
    """Give the pipeline's UNet the weights of a run below `out`, or those of `original` (a state dict) for the name "original". Returns where they come from."""
    pipe.unet.load_state_dict(original)
    if name == "original":
        return ""
    load_weights(pipe.unet, f"{out}/{name}/unet")
    return f"{out}/{name}/unet"


def note(sheet, name, values, facts):
    """Add numbers, and what belongs on their card, to a line of a sheet: name → (numbers, facts), as `mu.cards.one_table` takes it."""
    numbers, card = sheet.setdefault(name, ({}, {}))
    numbers |= values
    card |= facts


def differences(table, names):
    """Each model minus the first, in each group, paired by prompt and seed: a line each, with the interval over those columns of the two that vary.

    table: rows with "run", "group", "prompt", "seed", "hit". No interval where neither varies."""
    found = []
    for name in names[1:]:
        for group, part in table[table.run.isin([name, names[0]])].groupby("group", sort=False):
            over = [column for column in ("prompt", "seed") if part[column].nunique() > 1]
            values = paired_interval(part, name, names[0], "run", over) if over else (np.nan, np.nan, np.nan)
            found.append({"run": name, "group": group, **dict(zip((f"minus {names[0]}", "low", "high"), values)), "over": " and ".join(over) or "one picture"})
    return pd.DataFrame(found)


def real_drawings(sets):
    """The pictures of a concept's folder whose concept is known: (images (n, 3, 64, 64) in 0…1, labels as the judge has them); none: (None, [])."""
    tables = sorted(Path(sets).glob("*/*/metadata.jsonl"))
    known = [(file.parent / line["file_name"], f"concept:{line['concept']}") for file in tables for line in read_metadata(file.parent) if line.get("concept")]
    return (torch.stack([(read_image(file, 64) + 1) / 2 for file, _ in known]) if known else None), [label for _, label in known]
