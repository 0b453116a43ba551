"""How each method was trained, and how the angle of its two gradients changed in training."""

import numpy as np
import pandas as pd

from mu.measures.statistics import student_interval
from mu.reports.tables import VARIANTS, display_name, sort_like_paper

WEIGHTS = ("unlearn", "ascent", "relearn", "self_destruct", "keep", "clean", "retain")


def angle_change(records):
    """Return how the angle between the gradients of concept and related loss changes in training.

    One row per method and variant: the mean angle (degrees, from the recorded cosines) over the
    first and the last quarter of the training, the change with Student's 95 % interval over
    trainings, and in how many trainings the regression line rises. Above 90°, a step towards the
    concept increases the related loss.
    """
    found = []
    for (method, model), part in records.groupby(["method", "model"], sort=False):
        curves = []
        for _, run in part.groupby("training"):
            cosine = run.sort_values("step").cosine.clip(-1, 1).to_numpy()
            curves.append(np.degrees(np.arccos(cosine)))
        first = np.array([curve[: _quarter(curve)].mean() for curve in curves])
        last = np.array([curve[-_quarter(curve) :].mean() for curve in curves])
        change = last - first
        _, low, high = student_interval(change) if len(curves) > 1 else [np.nan] * 3
        found.append(
            {
                "method": display_name(method),
                "variant": model,
                "angle, first quarter": first.mean(),
                "angle, last quarter": last.mean(),
                "change": change.mean(),
                "low": low,
                "high": high,
                "trainings in which it rises": sum(map(_rises, curves)),
                "trainings": len(curves),
            }
        )
    return sort_like_paper(pd.DataFrame(found))


def _quarter(curve):
    return max(1, len(curve) // 4)


def _rises(curve):
    return len(curve) > 1 and np.polyfit(np.arange(len(curve)), curve, 1)[0] > 0


def trainings_table(rows, cards):
    """Return how each method was trained, from the cards of one training; "" if not applicable.

    For plain unlearning: steps and learning rate. For meta-unlearning: steps of its phases and, of
    the last phase, learning rate, weights of the terms, inner steps M and inner learning rates τ.
    """
    rows = rows[rows.panel.eq("") & rows.model.isin(VARIANTS)]
    found = []
    for method, part in rows.groupby("method", sort=False):
        line = {"method": display_name(method)}
        for model, run in part.groupby("model").run.first().items():
            facts = _plain_facts if model == "unlearned" else _meta_facts
            line |= facts(cards, run)
        found.append(line)
    if not found:
        return pd.DataFrame(columns=["method"])
    return sort_like_paper(pd.DataFrame(found)).fillna("")


def _plain_facts(cards, run):
    params = _params(cards, run)
    loop = params.get("loop") or {}
    return {
        "plain: steps": loop.get("steps", "closed form"),
        "plain: lr": f"{params.get('lr', 0):g}" if loop else "",
    }


def _meta_facts(cards, run):
    params = _params(cards, run)
    loop = params.get("loop") or {}
    loop = params | loop | (loop.get("phases") or [{}])[-1]
    weights = [f"{loop.get(term, 0):g}" for term in WEIGHTS]
    return {
        "meta: steps": " + ".join(map(str, phase_steps(cards, run))),
        "meta: lr": f"{loop.get('lr', 0):g}",
        "weights: unlearn, ascent, relearn, ζ, keep, clean, retain": ", ".join(weights),
        "M": "–".join(map(str, loop.get("inner_steps", ()))),
        "τ": "–".join(f"{rate:g}" for rate in loop.get("inner_lr", ())),
    }


def _params(cards, run):
    """Return params.json of a run from its protocol card, {} without one."""
    return cards.get(f"/{run}", {}).get("run") or {}


def phase_steps(cards, run):
    """Return the meta-unlearning steps, at most, of each phase of a run."""
    loop = _params(cards, run).get("loop") or {}
    phases = loop.get("phases") or [loop]
    return [phase["steps"] for phase in phases] if "inner_steps" in loop else []


def attackers_persist(cards, run):
    """Return whether a run simulates attackers that go on over several outer steps."""
    return any((_params(cards, run).get("loop") or {}).get("horizon") or [])
