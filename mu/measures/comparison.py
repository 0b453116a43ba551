"""Compare attacks and models: peaks, steps, costs, gains and self-destruction, with intervals.

`rows` and `budget` are the tables of `mu.measures.attack_results.read_attacks`.
"""

import numpy as np
import pandas as pd

from mu.measures.statistics import (
    FEW_TRAININGS,
    interval,
    median_relearning_step,
    paired_interval,
    relearning_area,
    relearning_step,
    score,
    self_destruct_index,
    student_interval,
)


def _varying(part):
    """Return the random factors that vary in a table."""
    factors = ("training", "attack_seed", "asked", "seed")
    return [factor for factor in factors if factor in part and part[factor].nunique() > 1]


def _widened(found, means):
    """Widen an interval to Student's over the means of a few trainings."""
    if not 1 < len(means) < FEW_TRAININGS:
        return found
    mean, low, high = found
    _, student_low, student_high = student_interval(means)
    return mean, min(low, student_low), max(high, student_high)


def mean_interval(part, value="hit", signed=False):
    """Return the mean and its 95 % interval over all random factors that vary, within [0, 1].

    The factors are trainings, attack seeds, prompts and images. With few trainings, the interval is
    at least as wide as Student's over them. If all values agree, it is Wilson's over images.
    signed: values are differences of hits, in [−1, 1]. If all are 0, the interval is Wilson's of no
    hit, to both sides.
    """
    over, values = _varying(part), part[value]
    if values.nunique() > 1 and over:
        means = part.groupby("training")[value].mean()
        mean, low, high = _widened(interval(part, over, value), means)
        return mean, max(low, -1.0 if signed else 0.0), min(high, 1.0)
    if signed and set(values) in ({0}, {-1}):
        _, low, high = score(values.abs())
        return (-1.0, -1.0, -low) if values.any() else (0.0, -high, high)
    if set(values) <= {0, 1}:
        return score(values)
    mean, n = values.mean(), len(values)
    if not 0 < mean < 1:
        return mean, float("nan"), float("nan")
    # identical fractions: Wilson's interval of n images with this share
    z2 = 1.96**2
    middle = mean + z2 / (2 * n)
    half = (z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) ** 0.5
    return mean, (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def picture_areas(forget):
    """Return the area under each image's own relearning curve, in column "area".

    The mean area is the area under the mean curve.
    """
    curves = forget.pivot_table("hit", ["run", "training", "attack_seed", "asked", "seed"], "step")
    areas = curves.apply(lambda curve: relearning_area(curve.index, curve), axis=1)
    return areas.rename("area").reset_index()


def _peak_row(part, threshold):
    """Return the row of `attack_table` for one attack on one model, without its costs."""
    forget = part[part.group == "forget"]
    mean = forget.groupby("step").hit.mean()
    step = mean.idxmax()
    at_peak = part[part.step == step]
    peak, low, high = mean_interval(at_peak[at_peak.group == "forget"])
    area = area_low = area_high = float("nan")
    if len(mean) > 1:
        area, area_low, area_high = mean_interval(picture_areas(forget), "area")
    curves = [one.groupby("step").hit.mean() for _, one in forget.groupby(["run", "attack_seed"])]
    relearned = [relearning_step(curve.index, curve, threshold) for curve in curves]
    return {
        "by words": bool(part.attack.eq("prompt").all()),
        "start": mean.iloc[0],
        "peak": peak,
        "low": low,
        "high": high,
        "step": step,
        "revived": median_relearning_step(relearned),
        "area": area,
        "area low": area_low,
        "area high": area_high,
        "related": at_peak[at_peak.group == "related"].hit.mean(),
        "unrelated": at_peak[at_peak.group == "unrelated"].hit.mean(),
    }


def attack_table(rows, budget, threshold=0.5, by="model"):
    """Return a table with one row per attack and model (by="run": and training).

    Every attack is evaluated at its own best step, since the attacker chooses when to stop.
    Columns: "by words", a prompt search; "start" and "peak", the concept's score before the attack
    and at that step ("step"), with the peak's `mean_interval` ("low", "high"); "revived", the
    Kaplan-Meier median, over trainings and seeds, of the first step with a score above the
    threshold (inf: fewer than half reach it); "area" under the curve, with its interval; "related"
    and "unrelated" scores at the peak (NaN: not drawn); and the costs until then, "images",
    "passes" and "seconds".
    """
    found, costs = [], ["images", "passes", "seconds"]
    for (name, model), part in rows.groupby(["name", by], sort=False):
        row = {"attack": name, by: model} | _peak_row(part, threshold)
        spent = budget[(budget.name == name) & (budget[by] == model) & (budget.step == row["step"])]
        found.append(row | spent[costs].mean().to_dict())
    return pd.DataFrame(found)


def gains(rows, a="unlearned", b="meta-unlearned"):
    """Return by how much the peak of each attack is lower on `b` than on `a`: "gain".

    Each model is evaluated at its own best step. The 95 % interval is paired by all factors that
    vary ("paired by"); with few trainings, it is at least as wide as Student's over them.
    Trainings with different numbers are not paired. Skips attacks on only one of the models.
    """
    found = []
    for name, part in rows[rows.group == "forget"].groupby("name", sort=False):
        if not {a, b} <= set(part.model):
            continue
        best = part.groupby(["model", "step"]).hit.mean().groupby("model").idxmax()
        peak = pd.concat([part[(part.model == m) & (part.step == best[m][1])] for m in (a, b)])
        by_training = peak.groupby(["training", "model"]).hit.mean().unstack("model")
        paired = by_training.notna().all(axis=None)
        over = [factor for factor in _varying(peak) if paired or factor != "training"]
        means = (by_training[a] - by_training[b]).tolist() if paired else []
        if over and not paired:
            peak = peak.groupby([*over, "model"], as_index=False).hit.mean()
        if over:
            difference = paired_interval(peak, a, b, over=over)
        else:
            of_a, of_b = (peak[peak.model == model].hit.mean() for model in (a, b))
            difference = of_a - of_b, float("nan"), float("nan")
        value, low, high = _widened(difference, means)
        low, high = np.clip([low, high], -1, 1)
        found.append([name, value, low, high, ", ".join(over)])
    return pd.DataFrame(found, columns=["attack", "gain", "low", "high", "paired by"])


def strongest(table):
    """Return the row of each model's strongest attack in an `attack_table`.

    It has the highest peak; ties go to the earlier relearning, then to the larger area.
    """
    columns, ascending = ["peak", "revived", "area"], [False, True, False]
    order = table.sort_values(columns, ascending=ascending, kind="stable")
    return order.groupby("model", sort=False).head(1).set_index("model")


def working(table, floor="random"):
    """Return attack → {model: peak} for the models on which the attack restores the concept.

    It does if the lower end of the peak's interval is above the model's score before any attack
    (the median over attacks, since some change the model before step 0) and, for a prompt search,
    above the peak of random prompts, the attack `floor`, which had as many evaluations. An attack
    that works on no model says nothing about any defence.
    """
    unattacked = table.groupby("model").start.median()
    random = table[table.attack == floor].set_index("model").peak
    found = {}
    for attack, part in table.groupby("attack", sort=False):
        found[attack] = {}
        for _, row in part.iterrows():
            by_chance = random.get(row.model, 0.0) if row["by words"] else 0.0
            if row.low > max(unattacked[row.model], by_chance):
                found[attack][row.model] = row.peak
    return found


def self_destruction(rows, clean, group="related", by="model"):
    """Return the loss of related concepts under each attack by training, beyond CLEAN's.

    One row per attack and model (by="run": and training), at the last step ("after") evaluated
    under both: the losses, and their difference image by image, the `self_destruct_index`, with
    its `mean_interval`.
    clean: rows of a CLEAN fine-tuning of the same models that trains as the attacks do (see
    `mu.measures.attack_results.trained_alike`).
    """
    losses = ["lost to the attack", "lost to CLEAN"]
    columns = ["attack", by, "after", *losses, "self-destruct index", "low", "high"]
    found = []
    attacked = rows[(rows.group == group) & (rows.attack != "prompt") & rows.hit.notna()]
    for (name, model), part in attacked.groupby(["name", by], sort=False):
        reference = clean[(clean[by] == model) & (clean.group == group) & clean.hit.notna()]
        common = sorted(set(part.step) & set(reference.step))
        if len(common) < 2 or common[0] != 0:
            continue
        scores = [
            table[table.step == step].groupby(["training", "asked", "seed"]).hit.mean()
            for table in (part, reference)
            for step in (0, common[-1])
        ]
        lost, lost_anyway = scores[0] - scores[1], scores[2] - scores[3]
        paired = pd.concat(scores, axis=1, join="inner")
        index = self_destruct_index(*(paired.iloc[:, i] for i in range(4)))
        mean = mean_interval(index.rename("index").reset_index(), "index", signed=True)
        found.append([name, model, common[-1], lost.mean(), lost_anyway.mean(), *mean])
    return pd.DataFrame(found, columns=columns)
