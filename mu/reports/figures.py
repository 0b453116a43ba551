"""The paper's figures: relearning and self-destruction, the two gradients, searches for words, panels of pictures. Of `mu.reports.collect` and of `mu.reports.explorer.Course`s, no wider than a page."""

from itertools import product

import matplotlib.pyplot as plt
import pandas as pd

from mu.measures.comparison import mean_interval
from mu.reports.plots import COLORS, panel, trend
from mu.reports.tables import VARIANTS, display_name, sort_like_paper
from mu.reports.training_tables import angle_change, merge_phases


def lines(rows, ax, legend=False):
    """Score against steps, a line a variant, with the 95 % interval of each point (`mu.measures.comparison.mean_interval`)."""
    for model in VARIANTS:
        points = [
            (step, *mean_interval(part)) for step, part in rows[rows.model == model].groupby("step")
        ]
        if points:
            step, value, low, high = zip(*points, strict=False)
            ax.plot(
                step,
                value,
                color=COLORS[model],
                label=model,
                marker="os"[VARIANTS.index(model)],
                ms=4,
            )
            ax.fill_between(step, low, high, color=COLORS[model], alpha=0.15, lw=0)
    ax.set(ylim=(-0.03, 1.03))
    if legend:
        ax.legend(fontsize=8)
    return ax


def facets(methods, whats, xlabel, width=7.2, columns=4):
    """A figure of panels, a row a `what` and a column a method, no wider than a page: of more than `columns` methods each `what` has several rows. Returns (figure, {(what, method): axes})."""
    deep, columns = -(-len(methods) // columns), min(columns, len(methods))
    fig, axes = plt.subplots(
        deep * len(whats),
        columns,
        figsize=(width * max(columns, 2) / 4, 1.55 * deep * len(whats) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    place = {
        (what, method): axes[i * deep + j // columns][j % columns]
        for i, what in enumerate(whats)
        for j, method in enumerate(methods)
    }
    for (what, method), ax in place.items():
        ax.set_title(method, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.set_ylabel(what if ax in axes[:, 0] else "", fontsize=8)
    for method in methods[-columns:]:  # the lowest of each column
        place[whats[-1], method].set_xlabel(xlabel, fontsize=8)
    for ax in {*axes.flat} - {*place.values()}:
        ax.remove()
    return fig, place


def legend_below(fig, *axes):
    """The lines and marks of these panels, each name once, below all of them."""
    named = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=False)
    }
    fig.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=min(len(named), 4) or 1,
        fontsize=8,
        frameon=False,
    )


def by_method(rows, attacks, group="forget"):
    """Figure: `lines` of one group of concepts, a block an attack, a panel a method."""
    rows = rows[(rows.panel == "") & (rows.group == group) & rows.attack.isin(attacks)]
    methods = list(
        sort_like_paper(pd.DataFrame({"method": rows.method.map(display_name).unique()})).method
    )
    fig, place = facets(
        methods, [f"recognised, {attack}" for attack in attacks], "steps of fine-tuning"
    )
    for attack, method in product(attacks, methods):
        ax = place[f"recognised, {attack}", method]
        lines(
            rows[(rows.attack == attack) & (rows.method.map(display_name) == method)], ax
        ).set_xlim(-0.04 * rows.step.max(), 1.04 * rows.step.max())
    legend_below(fig, place[f"recognised, {attacks[0]}", methods[0]])
    return fig


def angles(records):
    """Figure: inner product and angle of the gradients of the concept's and the related loss over training, with regression lines, a panel a method. Returns (figure, table of `angle_change`)."""
    records = merge_phases(records[records.panel.eq("")]).dropna(subset=["cosine"])
    records = records[records.model.isin(VARIANTS)]
    methods = list(
        sort_like_paper(pd.DataFrame({"method": records.method.map(display_name).unique()})).method
    )
    fig, place = facets(methods, ["inner product", "angle, degrees"], "step of training")
    for (what, method), ax in place.items():
        part, words = (
            records[records.method.map(display_name) == method],
            {"title": method, "xlabel": ax.get_xlabel(), "ylabel": ax.get_ylabel()},
        )
        part = part.assign(model=pd.Categorical(part.model, VARIANTS)).sort_values("model")
        trend(part.assign(model=part.model.astype(str)), what.split(",")[0], ax, legend=False)
        ax.set(**words)  # trend has its own
        ax.title.set_fontsize(9)
    legend_below(fig, place["inner product", methods[0]])
    return fig, angle_change(records)


def search_figure(table):
    """Figure of `search_table`: a dot a method, variant and search, with its interval."""
    searches = list(dict.fromkeys(table.search))
    fig, axes = plt.subplots(
        1,
        len(searches),
        figsize=(3.2 * len(searches), 0.3 * table.method.nunique() + 1.3),
        sharey=True,
        squeeze=False,
    )
    methods = list(dict.fromkeys(table.method))[::-1]
    for ax, search in zip(axes[0], searches, strict=False):
        for k, model in enumerate(VARIANTS):
            part = table[(table.search == search) & (table.variant == model)]
            y = [methods.index(m) + 0.18 * (0.5 - k) * 2 for m in part.method]
            ax.hlines(y, part.low, part.high, color=COLORS[model], lw=2, alpha=0.5)
            ax.scatter(
                part.score, y, color=COLORS[model], label=model, s=24, marker="os"[k], zorder=3
            )
        ax.set(
            yticks=range(len(methods)),
            yticklabels=methods,
            xlim=(-0.03, 1.03),
            xlabel="concept recognised",
            title=search,
        )
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    return fig


def panels(course, step=None, prompts=(2, 2, 1)):
    """Figure of one course, as the paper's panels: the original, then each model before and after `step` steps of the attack (the last by default).

    course: a `mu.reports.explorer.Course` that begins with the original. prompts: how many lines of the concept, of related and of unrelated concepts.
    Raises ValueError for a step that was not drawn."""
    if step not in (None, *course.steps):
        raise ValueError(
            f"{course.name} was not drawn after {step} steps; there are: {', '.join(map(str, course.steps))}"
        )
    at, chosen = course.steps.index(step) if step is not None else -1, []
    for group, most in zip(("forget", "related", "unrelated"), prompts, strict=False):
        mine = [i for i, item in enumerate(course.items) if item["group"] == group]
        chosen += sorted(
            mine,
            key=lambda i: [course.items[k]["prompt"] for k in mine if k < i].count(
                course.items[i]["prompt"]
            ),
        )[:most]  # each prompt once before a second seed
    columns = [
        (m, s)
        for m in range(len(course.models))
        for s in ([0] if course.models[m] == "original" else [0, at])
    ]
    cells = [[course.pictures[m, s, i] for m, s in columns] for i in chosen]
    titles = [course.models[m] + (f"\n+ {course.steps[at]} steps" if s else "") for m, s in columns]
    return panel(cells, [course.items[i]["prompt"] for i in chosen], titles)


def destruction_panel(attack, clean):
    """Figure: related concepts as each model draws them before, after the attack, and after CLEAN, at the last step that both have.

    attack, clean: `mu.reports.explorer.Course`s of the same models. Raises ValueError where they share no related picture or no step of fine-tuning."""
    step = max(set(attack.steps) & set(clean.steps), default=0)
    place = {
        course.name: {
            (item["prompt"], item["seed"]): i
            for i, item in enumerate(course.items)
            if item["group"] == "related"
        }
        for course in (attack, clean)
    }
    shared = [key for key in place[attack.name] if key in place[clean.name]]
    if not step or not shared or attack.models != clean.models:
        raise ValueError(
            f"{attack.name} and {clean.name} have no related picture of the same models and step in common"
        )
    columns = [
        (attack, m, s, words)
        for m, model in enumerate(attack.models)
        for s, words in ((0, model), (step, f"{model}\n+ {step} steps\nHRM"))
        if model != "original" or not s
    ]
    after = [
        (clean, m, step, f"{model}\n+ {step} steps\nCLEAN")
        for m, model in enumerate(clean.models)
        if model != "original"
    ]
    columns = sorted([*columns, *after], key=lambda column: column[1])  # each model's together
    cells = [
        [
            course.pictures[m, course.steps.index(s), place[course.name][key]]
            for course, m, s, _ in columns
        ]
        for key in shared
    ]
    return panel(cells, [prompt for prompt, _ in shared], [words for *_, words in columns])
