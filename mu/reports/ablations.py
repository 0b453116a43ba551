"""What each part of the method does: runs that differ from a base in one thing, or attacks that do, beside each other, with a sentence of answer."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MultipleLocator

from mu.measures.comparison import mean_interval, picture_areas
from mu.reports.figures import legend_below
from mu.reports.plots import COLORS

PAIRED = ["training", "asked", "seed"]


def under_attack(rows, run, name):
    """Per picture of one run under the attack `name`: the height of its relearning curve ("area", group forget), and what the last step cost the related concepts ("lost"). Two tables.

    Raises ValueError where that run was not attacked so."""
    part = rows[(rows.run == run) & (rows.name == name) & rows.hit.notna()]
    if part.empty:
        raise ValueError(
            f"{run} was not attacked as {name}; there are: {', '.join(sorted(set(rows[rows.run == run].name)))}"
        )
    forget, related = part[part.group == "forget"], part[part.group == "related"]

    def at(step):
        return related[related.step == step].groupby(PAIRED).hit.mean()

    return picture_areas(forget)[[*PAIRED, "area"]], (
        at(part.step.min()) - at(part.step.max())
    ).rename("lost").reset_index()


def attacked_runs(entry):
    """Choice → (run, attack) of a question: runs under the attack that has their name, or the run `base` under several attacks."""
    if "attacks" in entry:
        return {choice: ("base", attack) for choice, attack in entry["attacks"].items()}
    return {choice: (run, run) for choice, run in entry["runs"].items()}


def base_choice(entry):
    """The choice that the others are compared with: `base` by name, else the one that stands for the run or attack "base". Raises ValueError where there is none."""
    choices = entry.get("runs", entry.get("attacks"))
    found = entry.get("base") or next(
        (choice for choice, name in choices.items() if name == "base"), None
    )
    if found not in choices:
        raise ValueError(
            f"{entry.get('question', 'a question')}: there is no choice {found!r} to compare with; there are: {', '.join(choices)}: name one of them as `base`"
            if found
            else f"{entry.get('question', 'a question')}: none of {', '.join(choices)} is the run base: name one of them as `base`"
        )
    return found


def plain_runs(entry):
    """Choice → (run, attack) of the plainly unlearned model: under the same attack where a question is about attacks, else under the usual one, which is named after that run."""
    return {
        choice: ("plain", attack if "attacks" in entry and attack != "base" else "plain")
        for choice, (_, attack) in attacked_runs(entry).items()
    }


def choices_table(rows, records, entry):
    """A line a choice: concept under attack (mean height of its relearning curve), related concepts lost at the last step, both with 95 % intervals and of the plainly unlearned model
    (`plain_runs`); what was recognised before the attack, by group; UNet passes and seconds a step of training; and differences of the first two, paired by training, prompt and seed: from
    the base's (`base_choice`), or, where a question is about attacks, from the plainly unlearned model's under the same attack."""
    found, plainly, first = [], plain_runs(entry), attacked_runs(entry)[base_choice(entry)]
    for choice, (run, attack) in attacked_runs(entry).items():
        line = {"choice": choice}
        compared = plainly[choice] if "attacks" in entry else first
        for which, (words, value) in enumerate(
            (("concept under attack", "area"), ("related lost", "lost"))
        ):
            own, plain, reference = (
                under_attack(rows, *key)[which]
                for key in ((run, attack), plainly[choice], compared)
            )
            both = own.merge(reference, on=PAIRED, suffixes=("", " reference"))
            both["difference"] = both[value] - both[f"{value} reference"]
            between = (
                mean_interval(both, "difference", signed=True)
                if compared != (run, attack)
                else (0.0, float("nan"), float("nan"))
            )  # from itself it differs by nothing
            line |= dict(
                zip(
                    (words, f"{words}, low", f"{words}, high"),
                    mean_interval(own, value, signed=value == "lost"),
                    strict=False,
                )
            ) | {f"{words}: plain": plain[value].mean()}
            line |= dict(
                zip(
                    (
                        f"{words}: difference",
                        f"{words}: difference, low",
                        f"{words}: difference, high",
                    ),
                    between,
                    strict=False,
                )
            )
        start = rows[(rows.run == run) & (rows.name == attack) & (rows.step == 0)]
        line |= {f"{group} before": part.hit.mean() for group, part in start.groupby("group")}
        found.append(
            line
            | records[records.run == run][["passes", "seconds"]]
            .mean()
            .add_suffix(" a step")
            .to_dict()
            | {"trainings": start.training.nunique()}
        )
    return pd.DataFrame(found)


def answer(table, entry):
    """The differences of a `choices_table` in words, in points of percent with 95 % intervals: first of how much comes back, then of what is destroyed. Those whose interval excludes 0 are
    clearly different, and come first; where no difference was seen at all, the sentence says how far the widest interval reaches. And which choices draw, before any attack, more than 3
    points less of the related or unrelated concepts than the base: their protection is bought."""
    said, first = [], base_choice(entry)
    base = table.set_index("choice").loc[first]
    of_runs = {
        "concept under attack": "of the concept, {} % comes back with “{}” (mean over the attack)",
        "related lost": "of the related concepts, {} % are lost to it",
    }
    of_attacks = {
        "concept under attack": "of the concept, against what comes back to the plainly unlearned model under the same attack (means over it)",
        "related lost": "of the related concepts, against what that model loses",
    }
    for name, words in (of_attacks if "attacks" in entry else of_runs).items():
        value, low, high = (f"{name}: difference{end}" for end in ("", ", low", ", high"))

        def points(r):
            return f"“{r['choice']}” {100 * r[value]:+.0f} ({100 * r[low]:+.0f} to {100 * r[high]:+.0f})"

        others = [r for r in table.to_dict("records") if "attacks" in entry or r["choice"] != first]
        parts = {
            "clearly more with": [r for r in others if r[low] > 0],
            "clearly less with": [r for r in others if r[high] < 0],
            "not clearly different with": [r for r in others if r[low] <= 0 <= r[high]],
        }
        told = {verdict: ", ".join(map(points, found)) for verdict, found in parts.items() if found}
        if (rest := parts["not clearly different with"]) and all(r[value] == 0 for r in rest):
            told["not clearly different with"] = (
                f"{'the others' if len(told) > 1 else 'any'}, 0 (within ±{100 * max(r[high] for r in rest):.0f})"
            )
        said.append(
            words.format(f"{100 * base[name]:.0f}", first)
            + ": "
            + "; ".join(f"{verdict} {found}" for verdict, found in told.items())
        )
    harmed = [
        f"{r['choice']} (related {100 * r['related before']:.0f} %, unrelated {100 * r['unrelated before']:.0f} %)"
        for r in table.to_dict("records")
        if any(
            r[f"{group} before"] < base[f"{group} before"] - 0.03
            for group in ("related", "unrelated")
        )
    ]
    said += [f"of less quality even before the attack: {', '.join(harmed)}"] if harmed else []
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]


def choices_figure(table, factor):
    """Figure of `choices_table`: concept under attack and related concepts lost, with intervals and the plainly unlearned model beside them, and what was recognised before."""
    y = range(len(table))[::-1]
    fig, axes = plt.subplots(
        1, 3, figsize=(7.2, 0.27 * len(table) + 1.2), sharey=True, layout="constrained"
    )
    for ax, name in zip(axes, ("concept under attack", "related lost"), strict=False):
        ax.hlines(
            y,
            table[f"{name}, low"],
            table[f"{name}, high"],
            color=COLORS["meta-unlearned"],
            lw=2,
            alpha=0.5,
            label="its 95 % interval",
        )
        ax.scatter(
            table[name], y, color=COLORS["meta-unlearned"], s=22, zorder=3, label="trained as said"
        )
        ax.scatter(
            table[f"{name}: plain"],
            y,
            color=COLORS["unlearned"],
            marker="|",
            s=110,
            lw=1.6,
            zorder=2,
            label="plainly unlearned",
        )
        ax.set(
            xlim=(table[[f"{name}, low", f"{name}: plain"]].min().clip(upper=0).min() - 0.04, 1.04)
        )
    for shift, group, marker, color in (
        (-0.2, "forget", "x", "#000000"),
        (0.0, "related", "o", "#009e73"),
        (0.2, "unrelated", "s", "#e69f00"),
    ):
        if f"{group} before" in table:
            axes[2].scatter(
                table[f"{group} before"],
                [at + shift for at in y],
                marker=marker,
                color=color,
                s=18,
                label=group,
            )
    for ax, words in zip(
        axes,
        ("concept under attack", "related lost", "recognised, before the attack"),
        strict=False,
    ):
        ax.set_xlabel(words, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MultipleLocator(0.5))
    axes[0].set(yticks=list(y), yticklabels=table.choice, ylim=(-0.5, len(table) - 0.5))
    axes[0].set_title(factor, loc="left", fontsize=9)
    axes[2].set_xlim(-0.04, 1.04)
    legend_below(fig, *axes)
    return fig
