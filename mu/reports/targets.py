"""Acceptance targets of an experiment and their results; missed targets are shown as well."""

from dataclasses import dataclass
from itertools import groupby, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from mu.measures.statistics import relearning_steps
from mu.reports.plots import COLORS, LABELS, OTHER
from mu.reports.tables import VARIANTS

PLAIN, META = VARIANTS
RATIO = "meta-unlearned ÷ unlearned"
LEAD = (
    "under attack at learning rate {:g} (mean of all steps), "
    "meta-unlearned − best control of its quality"
)
LONGER = "longer plain unlearning does not help"


@dataclass(frozen=True)
class Target:
    """A lower or an upper bound on one quantity."""

    text: str  # "{:g}" is replaced by the step or learning rate of `each`
    quantity: str  # method of `Scores`
    arguments: tuple = ()  # of that method
    each: str = ""  # repeat for each "rate", "step" (of the attack) or "clean step"
    at_least: float = -np.inf
    at_most: float = np.inf

    def claim(self, scores, *value):
        """Return (text, measured, least, most), as `check_targets` takes it."""
        lower = np.isfinite(self.at_least)
        bound = self.at_least if lower else self.at_most
        words = f"{'at least' if lower else 'at most'} {bound:{'.2f' if bound < 1 else 'g'}}"
        measured = getattr(scores, self.quantity)(*self.arguments, *value)
        return f"{self.text.format(*value)}, {words}", measured, self.at_least, self.at_most


# In the order of the table; `targets_table` repeats those with `each`.
TARGETS = (
    Target("original: concept recognised", "before", ("original", "forget"), at_least=0.95),
    Target("unlearned: concept recognised", "before", (PLAIN, "forget"), at_most=0.05),
    Target("unlearned: related lost", "lost", ("original", PLAIN, "related"), at_most=0.1),
    Target("unlearned: unrelated lost", "lost", ("original", PLAIN, "unrelated"), at_most=0.03),
    Target("meta-unlearned: concept recognised", "before", (META, "forget"), at_most=0.05),
    Target(f"{META}: related lost against {PLAIN}", "lost", (PLAIN, META, "related"), at_most=0.05),
    Target(
        f"{META}: unrelated lost against {PLAIN}", "lost", (PLAIN, META, "unrelated"), at_most=0.03
    ),
    Target(f"concept after {{:g}} steps, {RATIO}", "relative", (META,), each="step", at_most=0.15),
    Target(
        f"steps to revival at learning rate {{:g}}, {RATIO}",
        "relearning_ratio",
        each="rate",
        at_least=4,
    ),
    Target(
        "related lost in {:g} steps of attack, meta-unlearned − unlearned",
        "self_destruction",
        each="step",
        at_least=0.5,
    ),
    Target(
        "unrelated lost in {:g} steps of attack, meta-unlearned",
        "lost_to_attack",
        ("unrelated",),
        each="step",
        at_most=0.1,
    ),
    Target(f"concept missing {LEAD}", "lead", ("missing",), each="rate", at_least=0.01),
    Target(f"related lost {LEAD}", "lead", ("lost",), each="rate", at_least=0.15),
    Target(
        f"{LONGER}: concept at the attack's best step, longer ÷ unlearned",
        "relative_peak",
        ("unlearned, longer",),
        at_least=0.8,
    ),
    Target(
        f"{LONGER}: concept after 100 steps, longer ÷ unlearned",
        "relative",
        ("unlearned, longer", 100),
        at_least=0.8,
    ),
    Target(
        f"{LONGER}: concept after 200 steps, longer ÷ unlearned",
        "relative",
        ("unlearned, longer", 200),
        at_least=0.8,
    ),
    Target(
        "meta-unlearned: concept after {:g} steps of CLEAN",
        "after_clean",
        each="clean step",
        at_most=0.05,
    ),
    Target(
        "meta-unlearned: related lost in {:g} steps of CLEAN",
        "lost_to_clean",
        ("related",),
        each="clean step",
        at_most=0.05,
    ),
    Target(
        "meta-unlearned: unrelated lost in {:g} steps of CLEAN",
        "lost_to_clean",
        ("unrelated",),
        each="clean step",
        at_most=0.05,
    ),
)


class Scores:
    """The quantities that targets bound, of one method with its controls and the original model.

    before, attacked, cleaned: judged rows before any attack, under fine-tuning on the concept (at
    one or several learning rates) and under CLEAN; columns of `mu.reports.collect`. lr: learning
    rate of the quantities that name none. A quantity that was not measured is NaN.
    """

    def __init__(self, before, attacked, cleaned, lr, threshold=0.5):
        main = attacked[np.isclose(attacked.lr, lr)]
        clean = cleaned[np.isclose(cleaned.lr, lr)]
        key = ["model", "group", "step"]
        self.attacked, self.start = attacked, before.groupby(["model", "group"]).hit.mean()
        self.under_attack = main.groupby(key).hit.mean()
        self.under_clean = clean.groupby(key).hit.mean()
        self.first, self.first_clean = main.step.min(), cleaned.step.min()
        self.relearning = relearning_table(attacked, threshold)
        self.controls = comparable_controls(protection(main)[2])
        self.axes = {  # values of `Target.each`, as further arguments of the quantity
            "": [()],
            "rate": [(rate,) for rate in sorted(attacked.lr.unique())],
            "step": [(step,) for step in sorted({50, 100, 200, main.step.max()})],
            "clean step": [(step,) for step in sorted(cleaned.step.unique())[1:]],
        }

    def before(self, model, group):
        """Return the share recognised before any attack."""
        return self.start.get((model, group), np.nan)

    def lost(self, reference, model, group):
        """Return the share by which `model` is below `reference` before any attack."""
        return self.before(reference, group) - self.before(model, group)

    def relative(self, model, step):
        """Return the concept's score after `step` steps, relative to the unlearned model's."""
        plain = self.under_attack.get((PLAIN, "forget", step), np.nan)
        return self.under_attack.get((model, "forget", step), np.nan) / (plain or np.nan)

    def relative_peak(self, model):
        """Return the concept's highest score, relative to the unlearned model's."""
        peak = self.under_attack.xs("forget", level="group").groupby("model").max()
        return peak.get(model, np.nan) / (peak.get(PLAIN, np.nan) or np.nan)

    def relearning_ratio(self, rate):
        """Return the relearning steps of the meta-unlearned model ÷ those of the unlearned one.

        Censored relearning steps count as the last evaluated step, which gives a lower bound: a
        pair (bound, text) if it meets the target of 4, else a text, which is inconclusive.
        """
        at = self.relearning[np.isclose(self.relearning.lr, rate)].set_index("model")
        steps = at.revived.clip(upper=at.last_step)
        if np.isinf(at.revived.get(PLAIN, np.nan)):
            return f"unlearned: not revived in {steps[PLAIN]:g}"
        ratio = steps.get(META, np.nan) / (steps.get(PLAIN, 0) or np.nan)
        if not np.isinf(at.revived.get(META, np.nan)):
            return ratio
        text = f"{ratio:.3g} at least: not back in {steps[META]:g}"
        return text if ratio < 4 else (ratio, text)

    def self_destruction(self, step):
        """Return the related concepts lost to the attack, meta-unlearned minus unlearned."""
        scores = self.under_attack
        plain, meta = (_lost(scores, m, "related", self.first, step) for m in (PLAIN, META))
        return meta - plain

    def lost_to_attack(self, group, step):
        """Return the concepts of a group that the meta-unlearned model loses to the attack."""
        return _lost(self.under_attack, META, group, self.first, step)

    def lead(self, quantity, rate):
        """Return the lead of the meta-unlearned model over the best comparable control.

        quantity: "missing" (the concept) or "lost" (related concepts), the mean over all steps.
        """
        missing, lost, _ = protection(self.attacked[np.isclose(self.attacked.lr, rate)])
        values = missing if quantity == "missing" else lost
        by_model = values.groupby("model").mean()
        return by_model.get(META, np.nan) - by_model.reindex(self.controls).max()

    def after_clean(self, step):
        """Return the concept's score of the meta-unlearned model after CLEAN."""
        return self.under_clean.get((META, "forget", step), np.nan)

    def lost_to_clean(self, group, step):
        """Return the concepts of a group that the meta-unlearned model loses to CLEAN."""
        return _lost(self.under_clean, META, group, self.first_clean, step)


def _lost(scores, model, group, first, step):
    """Return the share of a group's concepts lost from the first step to `step`."""
    start = scores.get((model, group, first), np.nan)
    return start - scores.get((model, group, step), np.nan)


def check_targets(*claims):
    """Compare measured values with their targets; a short run may miss some.

    claims: (text, measured, least, most). measured: a number; a text, which makes the result
    inconclusive; or a pair (number, text to display). Returns a table with the columns target,
    result and met ("✓", "✗", or "?" if inconclusive).
    """
    rows = []
    for text, measured, least, most in claims:
        value, result = measured if isinstance(measured, tuple) else (measured, measured)
        met = "?"
        if not isinstance(value, str):
            met = "✓" if least <= value <= most else "✗"
        rows.append({"target": text, "result": result, "met": met})
    return pd.DataFrame(rows)


def targets_table(before, attacked, cleaned, lr, threshold=0.5):
    """Return the table of `check_targets` of all `TARGETS`; arguments as for `Scores`.

    A target without a measured value (a run or a step that is absent) is left out.
    """
    scores = Scores(before, attacked, cleaned, lr, threshold)
    claims = []
    for (each, _), block in groupby(TARGETS, key=lambda target: (target.each, target.quantity)):
        repeated = product(scores.axes[each], list(block))
        claims += [target.claim(scores, *value) for value, target in repeated]
    return check_targets(*claims).dropna()


def targets_by_seed(before, attacked, cleaned, lr, threshold=0.5):
    """Return `targets_table` and how many trainings meet each target on their own.

    The mean over trainings may be carried by a single one.
    """
    table = targets_table(before, attacked, cleaned, lr, threshold)
    single = []
    for training in sorted(attacked[attacked.model == META].training.unique()):
        rows = (part[part.training == training] for part in (before, attacked, cleaned))
        single.append(targets_table(*rows, lr, threshold))
    single = pd.concat(single)
    met = single.met.eq("✓").groupby(single.target).agg(["sum", "size"])
    met = met.reindex(table.target, fill_value=0).astype(str)
    return table.assign(**{"met by single trainings": (met["sum"] + " of " + met["size"]).values})


def relearning_table(attacked, threshold=0.5):
    """Return the relearning steps of each model and learning rate.

    Columns: revived, the median over trainings and attack seeds (inf: not relearned); attacks and
    relearned, the number of attacks and of those that brought the concept back; last_step, the last
    evaluated step; "steps to revival", the median as text.
    """
    runs = attacked.run + "/" + attacked.training.astype(str)
    steps = relearning_steps(attacked.assign(run=runs), threshold)
    by_model = steps.groupby(["model", "lr"], sort=False)
    table = by_model.agg(
        revived=("revived", "median"),
        attacks=("revived", "size"),
        relearned=("revived", lambda steps: np.isfinite(steps).sum()),
        last_step=("last", "max"),
    ).reset_index()
    order = model_order(attacked).index
    table = table.sort_values(
        ["lr", "model"], key=lambda c: c.map(order) if c.name == "model" else c, ignore_index=True
    )
    table["steps to revival"] = [
        f"> {last:g}" if np.isinf(step) else f"{step:g}"
        for step, last in zip(table.revived, table.last_step, strict=True)
    ]
    return table


def protection(attacked):
    """Return (concept missing, related lost, start) of each run under one attack.

    The first two are means over all steps after the first; `start` has the share recognised before
    the attack, a column per group.
    """
    first = attacked.step.min()
    by_run = attacked.groupby(["model", "run", "training", "group", "step"], sort=False)
    scores = by_run.hit.mean().unstack("step")
    start = scores[first].unstack("group")
    under = scores.drop(columns=first).mean(axis=1).unstack("group")
    return 1 - under.forget, start.related - under.related, start


def comparable_controls(quality, defended=META, plain=PLAIN):
    """Return the controls whose quality before the attack matches the defended model's.

    quality: `start` of `protection`. A control may recognise up to 3 points less of the related and
    of the unrelated concepts: a model of lower quality is also harder to attack.
    """
    means = quality.groupby("model", sort=False)[["related", "unrelated"]].mean()
    if defended not in means.index:
        return []
    controls = means.drop(index=["original", plain, defended], errors="ignore")
    return list(controls.index[(controls >= means.loc[defended] - 0.03).all(axis=1)])


def model_order(rows):
    """Return the models of rows: unlearned, the controls, meta-unlearned; not the original."""
    order = [PLAIN, *LABELS.values()]

    def place(model):
        known = order.index(model) if model in order else len(order)
        return model == META, known, model

    return sorted(set(rows.model) - {"original"}, key=place)


def cost_figure(attacked):
    """Draw the quality of each model before the attack and its protection under it.

    One row per model: related and unrelated concepts recognised before, the concept missing and the
    related concepts lost under the attack (means over its steps). Dots are means over trainings,
    rings single trainings. attacked: rows of one attack.
    """
    missing, lost, quality = protection(attacked)
    columns = {
        "related recognised,\nbefore": quality.related,
        "unrelated recognised,\nbefore": quality.unrelated,
        "concept missing\nunder attack": missing,
        "related lost\nunder attack": lost,
    }
    names = model_order(attacked)[::-1]
    size = (7.2, 0.27 * len(names) + 0.8)
    fig, axes = plt.subplots(1, 4, figsize=size, sharey=True, layout="constrained")
    for ax, (title, values) in zip(axes, columns.items(), strict=True):
        for y, model in enumerate(names):
            each = values[values.index.get_level_values("model") == model]
            color = COLORS.get(model, OTHER)
            ax.scatter(each, [y] * len(each), s=20, facecolors="none", edgecolors=color, lw=0.9)
            ax.scatter(each.mean(), y, s=30, color=color, zorder=3)
        left = min(0.0, values.min()) - 0.06
        ax.set(xlim=(left, 1.06), yticks=range(len(names)), yticklabels=names)
        ax.set_xlabel(title, fontsize=8)
        ax.tick_params(labelsize=7)
    return fig
