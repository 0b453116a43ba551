"""What each part of the method does: runs that differ from a base in one thing, or attacks that do, beside each other, with a sentence of answer."""

import matplotlib.pyplot as plt
import pandas as pd

from mu.comparison import mean_interval, picture_areas
from mu.plots import COLORS

PAIRED = ["training", "asked", "seed"]


def under_attack(rows, run, name):
    """Per picture of one run under the attack `name`: the height of its relearning curve ("area", group forget), and what the last step cost the related concepts ("lost"). Two tables.

    Raises ValueError where that run was not attacked so."""
    part = rows[(rows.run == run) & (rows.name == name) & rows.hit.notna()]
    if part.empty:
        raise ValueError(f"{run} was not attacked as {name}; there are: {', '.join(sorted(set(rows[rows.run == run].name)))}")
    forget, related = part[part.group == "forget"], part[part.group == "related"]
    at = lambda step: related[related.step == step].groupby(PAIRED).hit.mean()
    return picture_areas(forget)[[*PAIRED, "area"]], (at(part.step.min()) - at(part.step.max())).rename("lost").reset_index()


def pairs(entry):
    """Choice → (run, attack) of a question: runs under the attack that has their name, or the run `base` under several attacks."""
    if "attacks" in entry:
        return {choice: ("base", attack) for choice, attack in entry["attacks"].items()}
    return {choice: (run, run) for choice, run in entry["runs"].items()}


def base_of(entry):
    """The choice that the others are compared with: `base` by name, else the one that stands for the run or attack "base"."""
    return entry.get("base") or next(choice for choice, name in entry.get("runs", entry.get("attacks")).items() if name == "base")


def choices_table(rows, records, entry):
    """A line a choice: concept under attack (mean height of its relearning curve), related concepts lost at the last step, both with 95 % intervals; what was recognised before the
    attack, by group; UNet passes a step of training; and the differences of the first two from the base's, paired by training, prompt and seed."""
    found, chosen, first = [], pairs(entry), base_of(entry)
    measured = {choice: under_attack(rows, *key) for choice, key in chosen.items()}
    for choice, (run, attack) in chosen.items():
        line = {"choice": choice}
        for words, value, table, reference in zip(("concept under attack", "related lost"), ("area", "lost"), measured[choice], measured[first]):
            line |= dict(zip((words, f"{words}, low", f"{words}, high"), mean_interval(table, value)))
            both = table.merge(reference, on=PAIRED, suffixes=("", " base"))
            both["difference"] = both[value] - both[f"{value} base"]
            between = mean_interval(both, "difference", signed=True) if choice != first else (0.0, float("nan"), float("nan"))  # from itself it differs by nothing
            line |= dict(zip((f"{words}: difference", f"{words}: difference, low", f"{words}: difference, high"), between))
        start = rows[(rows.run == run) & (rows.name == attack) & (rows.step == 0)]
        line |= {f"{group} before": part.hit.mean() for group, part in start.groupby("group")}
        line |= {"passes a step": records[records.run == run].passes.mean(), "trainings": start.training.nunique()}
        found.append(line)
    return pd.DataFrame(found)


def answer(table, first):
    """What the other choices change against the base, in points with 95 % intervals: first of how much comes back, then of what is destroyed. Those whose interval excludes 0 come first; where none
    does, the sentence says so, and how far the widest reaches. And which of them draw, before any attack, more than 3 points less of the related or unrelated concepts than the base:
    their protection is bought."""
    said, base = [], table.set_index("choice").loc[first]
    points = lambda r, name: f"“{r['choice']}” {100 * r[f'{name}: difference']:+.0f} ({100 * r[f'{name}: difference, low']:+.0f} to {100 * r[f'{name}: difference, high']:+.0f})"
    for words, name in (("concept coming back (mean over the attack)", "concept under attack"), ("related concepts lost to it", "related lost")):
        others = [r for r in table.to_dict("records") if r["choice"] != first]
        clear = [r for r in others if r[f"{name}: difference, low"] > 0 or r[f"{name}: difference, high"] < 0]
        rest = [r for r in others if r not in clear]
        not_clearly = ", ".join(points(r, name) for r in rest)
        if rest and all(r[f"{name}: difference"] == 0 for r in rest):
            not_clearly = f"all others, 0 (within ±{100 * max(r[f'{name}: difference, high'] for r in rest):.0f})"
        said.append(f"{words}: {100 * base[name]:.0f} % with “{first}”; clearly different, in points: {', '.join(points(r, name) for r in clear) or 'none'}" + (f"; not clearly: {not_clearly}" if rest else ""))
    harmed = [f"{r['choice']} (related {100 * r['related before']:.0f} %, unrelated {100 * r['unrelated before']:.0f} %)" for r in table.to_dict("records")
              if any(r[f"{group} before"] < base[f"{group} before"] - 0.03 for group in ("related", "unrelated"))]
    said += [f"not of the base's quality even before the attack: {', '.join(harmed)}"] if harmed else []
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]


def choices_figure(table, factor, plain=None):
    """Figure of `choices_table`: concept under attack, related concepts lost, both with intervals, and what was recognised before. plain: the plainly unlearned model's line (a dict of these
    two), drawn as a dotted one."""
    y = range(len(table))[::-1]
    fig, axes = plt.subplots(1, 3, figsize=(10, 0.36 * len(table) + 1.2), sharey=True)
    for ax, name in zip(axes, ("concept under attack", "related lost")):
        ax.hlines(y, table[f"{name}, low"], table[f"{name}, high"], color=COLORS["meta-unlearned"], lw=2, alpha=0.5)
        ax.scatter(table[name], y, color=COLORS["meta-unlearned"], s=28, zorder=3)
        if plain:
            ax.axvline(plain[name], color=COLORS["unlearned"], ls=":", lw=1.2, label="plainly unlearned")
        ax.set(xlabel=name, xlim=(-0.38, 1.03) if name == "related lost" else (-0.03, 1.03))
    for shift, group, marker, color in ((-0.2, "forget", "x", "#000000"), (0.0, "related", "o", "#009e73"), (0.2, "unrelated", "s", "#e69f00")):
        if f"{group} before" in table:
            axes[2].scatter(table[f"{group} before"], [at + shift for at in y], marker=marker, color=color, s=26, label=group)
    axes[0].set(yticks=list(y), yticklabels=table.choice)
    axes[0].set_title(factor, loc="left", fontsize=11)
    axes[2].set(xlim=(-0.03, 1.03), xlabel="recognised, before the attack")
    axes[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    if plain:
        axes[0].legend(fontsize=7, loc="lower right")
    return fig
