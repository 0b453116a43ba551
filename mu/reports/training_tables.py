"""Tables of how each method was trained and how its gradients' angle changed in training."""

from pathlib import Path

import numpy as np
import pandas as pd

from mu.measures.statistics import student_interval
from mu.reports.tables import VARIANTS, display_name, sort_like_paper


def merge_phases(records):
    """Records in which a first phase (a run <method>-first) and the run that starts from it are one training of the meta-unlearned model, its steps counted on."""
    first = records.run.str.endswith("-first")
    length = records[first].groupby(["method", "training"]).step.max()
    offset = [
        length.get((method, training), 0) * (model == "meta-unlearned")
        for method, training, model in zip(
            records.method, records.training, records.model, strict=False
        )
    ]
    return records.assign(
        step=records.step + offset, model=records.model.mask(first, "meta-unlearned")
    )


def angle_change(records):
    """How the angle of the two gradients changes over a training: a line a method and variant with its mean over the first and the last quarter (degrees, from the recorded cosines; above 90
    a step towards the concept leads away from its relatives), the change between the two with Student's 95 % interval over the trainings, and in how many its regression line rises."""
    found = []
    for (method, model), part in records.groupby(["method", "model"], sort=False):
        each = [
            np.degrees(np.arccos(one.sort_values("step").cosine.clip(-1, 1).to_numpy()))
            for _, one in part.groupby("training")
        ]
        quarter = [max(1, len(values) // 4) for values in each]
        first, last = (
            np.array([values[pick(n)].mean() for values, n in zip(each, quarter, strict=False)])
            for pick in (lambda n: slice(None, n), lambda n: slice(-n, None))
        )
        rises = sum(
            np.polyfit(np.arange(len(values)), values, 1)[0] > 0
            for values in each
            if len(values) > 1
        )
        _, low, high = student_interval(last - first) if len(each) > 1 else [np.nan] * 3
        found.append(
            (
                display_name(method),
                model,
                first.mean(),
                last.mean(),
                (last - first).mean(),
                low,
                high,
                rises,
                len(each),
            )
        )
    return sort_like_paper(
        pd.DataFrame(
            found,
            columns=[
                "method",
                "variant",
                "angle, first quarter",
                "angle, last quarter",
                "change",
                "low",
                "high",
                "trainings in which it rises",
                "trainings",
            ],
        )
    )


def trainings_table(rows, cards):
    """How each method was trained, a line each, by the cards of one training: steps and learning rate of plain unlearning; of meta-unlearning the steps of its phases, learning rate, weights of
    the terms, inner steps M and inner learning rates τ of the last phase. "" where there is none."""
    found = []
    for method, part in rows[rows.panel.eq("") & rows.model.isin(VARIANTS)].groupby(
        "method", sort=False
    ):
        line = {"method": display_name(method)}
        for model, one in part.groupby("model"):
            made = cards.get(f"/{one.run.iloc[0]}", {}).get("run") or {}
            loop = made.get("loop") or {}
            if model == "unlearned":
                line |= {
                    "plain: steps": loop.get("steps", "closed form"),
                    "plain: lr": f"{made.get('lr', 0):g}" if loop else "",
                }
            else:
                line |= {
                    "meta: steps": " + ".join(map(str, phase_steps(cards, one.run.iloc[0]))),
                    "meta: lr": f"{made.get('lr', 0):g}",
                    "weights: unlearn, ascent, relearn, ζ, clean, retain": ", ".join(
                        f"{loop.get(term, 0):g}"
                        for term in (
                            "unlearn",
                            "ascent",
                            "relearn",
                            "self_destruct",
                            "clean",
                            "retain",
                        )
                    ),
                    "M": "–".join(map(str, loop.get("inner_steps", ()))),
                    "τ": "–".join(f"{rate:g}" for rate in loop.get("inner_lr", ())),
                }
        found.append(line)
    return (
        sort_like_paper(pd.DataFrame(found)).fillna("")
        if found
        else pd.DataFrame(columns=["method"])
    )


def run_chain(cards, run):
    """A run and those that it started from, the first of them first, by their cards (of one training)."""
    before = Path((cards.get(f"/{run}", {}).get("run") or {}).get("start") or "").name
    return [*(run_chain(cards, before) if before else []), run]


def phase_steps(cards, run):
    """Steps of meta-unlearning of a run, phase by phase, by its card and those of the runs that it started from."""
    loops = [
        (cards.get(f"/{name}", {}).get("run") or {}).get("loop") or {}
        for name in run_chain(cards, run)
    ]
    return [loop["steps"] for loop in loops if "inner_steps" in loop]
