"""What 50_evaluate tabulates: models side by side, picture by picture, and what the attacks have left."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mu.concepts import read_image, read_metadata
from mu.formats import load_weights
from mu.statistics import median_revival, paired_interval, relearning_area, self_destruct_index, steps_to_revival


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


def under_attack(attacked, cleaned=None, threshold=0.5):
    """A line a run: Kaplan and Meier's median of the steps to revival (inf: in less than half of the runs and seeds it was seen to come back), the area under the relearning
    curve and, with the rows of a CLEAN fine-tuning, self-destruction at the last step that both have.

    attacked, cleaned: rows of 30_attack_finetune, with "run", "attack_seed", "group", "step", "hit"."""
    curve = lambda rows, group: rows[rows.group == group].groupby("step").hit.mean()
    found = {}
    for run, rows in attacked.groupby("run", sort=False):
        curves = [curve(part, "forget") for _, part in rows.groupby("attack_seed")]
        found[run] = {"steps to revival": median_revival([steps_to_revival(c.index, c, threshold) for c in curves]),
                      "area under relearning": float(np.mean([relearning_area(c.index, c) for c in curves])), "attack seeds": len(curves)}
        clean = curve(cleaned[cleaned.run == run], "related") if cleaned is not None and len(cleaned) else pd.Series()
        related = curve(rows, "related")
        both = related.index.intersection(clean.index)
        if len(both) > 1:
            found[run] |= {"self-destruction": self_destruct_index(related[both[0]], related[both[-1]], clean[both[0]], clean[both[-1]]), "after steps": int(both[-1])}
    return pd.DataFrame(found).T.rename_axis("run")
