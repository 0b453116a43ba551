"""Ablations: runs, or attacks, that differ from a base in one respect, compared in one table."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MultipleLocator

from mu.measures.comparison import mean_interval, picture_areas
from mu.reports.plots import COLORS, legend_below

PAIRED = ["training", "asked", "seed"]
ENDS = ("", ", low", ", high")  # of a column: the value and its 95 % interval
MEASURES = ("concept under attack", "related lost")
UNCLEAR = "not clearly different with"
# How `answer` introduces the differences of each measure.
RUN_WORDS = {
    "concept under attack": "of the concept, {} % comes back with “{}” (mean over the attack)",
    "related lost": "of the related concepts, {} % are lost to it",
}
ATTACK_WORDS = {
    "concept under attack": (
        "of the concept, against what comes back to the plainly unlearned model "
        "under the same attack (means over it)"
    ),
    "related lost": "of the related concepts, against what that model loses",
}


def under_attack(rows, run, name):
    """Return measure → table with the "value" of each image of a run under the attack `name`.

    "concept under attack": mean height of the relearning curve. "related lost": related concepts
    recognised before the attack, less those at its last step. Raises ValueError if the run did not
    meet the attack.
    """
    part = rows[(rows.run == run) & (rows.name == name) & rows.hit.notna()]
    if part.empty:
        known = sorted(set(rows[rows.run == run].name))
        raise ValueError(f"{run} has no attack {name}; available: {', '.join(known)}")
    areas = picture_areas(part[part.group == "forget"]).rename(columns={"area": "value"})
    hits = part[part.group == "related"].groupby([*PAIRED, "step"]).hit.mean().unstack("step")
    lost = hits[part.step.min()] - hits[part.step.max()]
    tables = (areas[[*PAIRED, "value"]], lost.rename("value").reset_index())
    return dict(zip(MEASURES, tables, strict=True))


def attacked_runs(entry):
    """Return choice → (run, attack) of a question.

    Either runs under the attack of the same name, or the run `base` under several attacks.
    """
    if "attacks" in entry:
        return {choice: ("base", attack) for choice, attack in entry["attacks"].items()}
    return {choice: (run, run) for choice, run in entry["runs"].items()}


def plain_runs(entry):
    """Return choice → (run, attack) of the plainly unlearned model.

    Under the same attack if the question compares attacks, else under its default attack "plain".
    """
    if "attacks" not in entry:
        return dict.fromkeys(entry["runs"], ("plain", "plain"))
    attacks = entry["attacks"].items()
    return {choice: ("plain", "plain" if name == "base" else name) for choice, name in attacks}


def base_choice(entry):
    """Return the choice to compare with: the entry's `base`, else the run or attack "base".

    Raises ValueError if there is none.
    """
    choices = entry.get("runs", entry.get("attacks"))
    named = [choice for choice, name in choices.items() if name == "base"]
    base = entry.get("base") or next(iter(named), None)
    if base not in choices:
        problem = f"unknown base {base!r}" if base else "no base"
        raise ValueError(
            f"{entry.get('question', 'question')}: {problem}; choices: {', '.join(choices)}. "
            "Name one of them as `base`."
        )
    return base


def choices_table(rows, records, entry):
    """Return a table with one row per choice of a question.

    The concept under attack and the related concepts lost (see `under_attack`), with 95 %
    intervals, the plainly unlearned model's values and differences paired by training, prompt and
    seed: from the base choice or, if the question compares attacks, from the plainly unlearned
    model under the same attack. Then the share recognised before the attack by group, UNet passes
    and seconds per training step, and the number of trainings.
    """
    base, plain_keys = attacked_runs(entry)[base_choice(entry)], plain_runs(entry)
    lines = []
    for choice, key in attacked_runs(entry).items():
        reference_key = plain_keys[choice] if "attacks" in entry else base
        own, plain = under_attack(rows, *key), under_attack(rows, *plain_keys[choice])
        reference = under_attack(rows, *reference_key)
        line = {"choice": choice}
        for name in MEASURES:
            line |= _compare(name, own[name], plain[name])
            difference = (0.0, np.nan, np.nan)
            if reference_key != key:
                difference = _paired_difference(own[name], reference[name])
            line |= _columns(f"{name}: difference", difference)
        run, attack = key
        start = rows[(rows.run == run) & (rows.name == attack) & (rows.step == 0)]
        line |= {f"{group} before": part.hit.mean() for group, part in start.groupby("group")}
        cost = records[records.run == run][["passes", "seconds"]].mean()
        line |= cost.add_suffix(" a step").to_dict()
        lines.append(line | {"trainings": start.training.nunique()})
    return pd.DataFrame(lines)


def _compare(name, own, plain):
    """Return the columns of a measure: its mean with interval, and the plain model's mean."""
    value = mean_interval(own, "value", signed=name == "related lost")
    return _columns(name, value) | {f"{name}: plain": plain.value.mean()}


def _paired_difference(own, reference):
    """Return the mean paired difference with its 95 % interval."""
    both = own.merge(reference, on=PAIRED, suffixes=("", " reference"))
    both["difference"] = both["value"] - both["value reference"]
    return mean_interval(both, "difference", signed=True)


def _columns(name, value):
    """Return the columns of a value with its interval."""
    return {f"{name}{end}": number for end, number in zip(ENDS, value, strict=True)}


def answer(table, entry):
    """Return the differences of a `choices_table` in words, in percentage points.

    Differences whose 95 % interval excludes 0 are clear and come first. If no difference was
    observed, the sentence gives the widest interval. The last part names choices that recognise,
    before any attack, over 3 points less of the related or unrelated concepts than the base.
    """
    first = base_choice(entry)
    base = table.set_index("choice").loc[first]
    choices = table.to_dict("records")
    compares_attacks = "attacks" in entry
    others = [c for c in choices if compares_attacks or c["choice"] != first]
    parts = []
    for name, template in (ATTACK_WORDS if compares_attacks else RUN_WORDS).items():
        start = template.format(f"{100 * base[name]:.0f}", first)
        parts.append(f"{start}: {_differences(name, others)}")
    lower = [_quality(c) for c in choices if _is_lower(c, base)]
    if lower:
        parts.append(f"of less quality even before the attack: {', '.join(lower)}")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _differences(name, choices):
    """Return the differences of one measure in words, grouped by verdict."""
    value, low, high = (f"{name}: difference{end}" for end in ENDS)
    verdicts = {
        "clearly more with": [c for c in choices if c[low] > 0],
        "clearly less with": [c for c in choices if c[high] < 0],
        UNCLEAR: [c for c in choices if c[low] <= 0 <= c[high]],
    }
    texts = {}
    for verdict, found in verdicts.items():
        points = [(c["choice"], *(100 * c[column] for column in (value, low, high))) for c in found]
        if points:
            texts[verdict] = ", ".join(
                "“{}” {:+.0f} ({:+.0f} to {:+.0f})".format(*p) for p in points
            )
    unclear = verdicts[UNCLEAR]
    if unclear and all(c[value] == 0 for c in unclear):
        widest = 100 * max(c[high] for c in unclear)
        texts[UNCLEAR] = f"{'the others' if len(texts) > 1 else 'any'}, 0 (within ±{widest:.0f})"
    return "; ".join(f"{verdict} {text}" for verdict, text in texts.items())


def _is_lower(choice, base):
    """Return whether a choice has a lower quality than the base before the attack."""
    groups = ("related before", "unrelated before")
    return any(choice[group] < base[group] - 0.03 for group in groups)


def _quality(choice):
    related, unrelated = (100 * choice[f"{group} before"] for group in ("related", "unrelated"))
    return f"{choice['choice']} (related {related:.0f} %, unrelated {unrelated:.0f} %)"


def choices_figure(table, factor):
    """Draw a `choices_table`, one row per choice; `factor` is the title.

    Left and middle: concept under attack and related concepts lost, with 95 % intervals and the
    plainly unlearned model. Right: share recognised before the attack.
    """
    size = (7.2, 0.27 * len(table) + 1.2)
    fig, axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    y = range(len(table))[::-1]
    for ax, name in zip(axes[:2], MEASURES, strict=True):
        _draw_measure(ax, table, name, y)
    _draw_start(axes[2], table, y)
    for ax, text in zip(axes, (*MEASURES, "recognised, before the attack"), strict=True):
        ax.set_xlabel(text, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MultipleLocator(0.5))
    axes[0].set(yticks=list(y), yticklabels=table.choice, ylim=(-0.5, len(table) - 0.5))
    axes[0].set_title(factor, loc="left", fontsize=9)
    legend_below(fig, *axes)
    return fig


def _draw_measure(ax, table, name, y):
    """Draw one measure with its intervals beside the plainly unlearned model."""
    color, plain = COLORS["meta-unlearned"], table[f"{name}: plain"]
    low, high = table[f"{name}, low"], table[f"{name}, high"]
    ax.hlines(y, low, high, color=color, lw=2, alpha=0.5, label="its 95 % interval")
    ax.scatter(table[name], y, color=color, s=22, zorder=3, label="trained as said")
    style = {"marker": "|", "s": 110, "lw": 1.6, "zorder": 2}
    ax.scatter(plain, y, color=COLORS["unlearned"], label="plainly unlearned", **style)
    ax.set_xlim(min(0, low.min(), plain.min()) - 0.04, 1.04)


def _draw_start(ax, table, y):
    """Draw the share recognised before the attack, by group."""
    for shift, group, marker, color in (
        (-0.2, "forget", "x", "#000000"),
        (0.0, "related", "o", "#009e73"),
        (0.2, "unrelated", "s", "#e69f00"),
    ):
        if f"{group} before" in table:
            at = [row + shift for row in y]
            ax.scatter(table[f"{group} before"], at, marker=marker, color=color, s=18, label=group)
    ax.set_xlim(-0.04, 1.04)
