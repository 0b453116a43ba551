"""The figures of the paper: relearning and self-destruction, gradients, prompt searches, images.

They are drawn from `mu.reports.collect` and `mu.reports.explorer.AttackProgress` and are no wider
than a page.
"""

import math
import textwrap
from collections import Counter

import matplotlib.pyplot as plt
import pandas as pd

from mu.measures.comparison import mean_interval
from mu.reports.plots import COLORS, intervals, legend_below, panel, trend
from mu.reports.tables import VARIANTS, display_name, sort_like_paper
from mu.reports.training_tables import angle_change

MARKERS = dict(zip(VARIANTS, "os", strict=True))


def draw_scores(rows, ax, legend=False):
    """Draw the score of each variant against the steps of fine-tuning and return the axes.

    Bands are the 95 % intervals of `mu.measures.comparison.mean_interval`.
    """
    for model in VARIANTS:
        by_step = rows[rows.model == model].groupby("step")
        points = [(step, *mean_interval(part)) for step, part in by_step]
        if points:
            step, value, low, high = zip(*points, strict=True)
            color = COLORS[model]
            ax.plot(step, value, color=color, label=model, marker=MARKERS[model], ms=4)
            ax.fill_between(step, low, high, color=color, alpha=0.15, lw=0)
    ax.set(ylim=(-0.03, 1.03))
    if legend:
        ax.legend(fontsize=8)
    return ax


def method_grid(methods, quantities, xlabel, width=7.2, columns=4):
    """Create a grid of axes, one row per quantity and one column per method.

    More than `columns` methods take several rows per quantity. width: inches of four columns.
    Returns (figure, {(quantity, method): axes}).
    """
    rows, columns = math.ceil(len(methods) / columns), min(columns, len(methods))
    size = (width * max(columns, 2) / 4, 1.55 * rows * len(quantities) + 0.5)
    fig, grid = plt.subplots(
        rows * len(quantities), columns, figsize=size, squeeze=False, layout="constrained"
    )
    axes = {}
    for i, quantity in enumerate(quantities):
        for j, method in enumerate(methods):
            ax = axes[quantity, method] = grid[i * rows + j // columns][j % columns]
            ax.set_title(method, fontsize=9)
            ax.tick_params(labelsize=7)
            ax.set_ylabel(quantity if j % columns == 0 else "", fontsize=8)
    for method in methods[-columns:]:  # the lowest axes of each column
        axes[quantities[-1], method].set_xlabel(xlabel, fontsize=8)
    for ax in {*grid.flat} - {*axes.values()}:
        ax.remove()
    return fig, axes


def _methods(rows):
    """Return the display names of the methods of rows, in the paper's order."""
    names = pd.DataFrame({"method": rows.method.map(display_name).unique()})
    return list(sort_like_paper(names).method)


def score_figure(rows, attacks, group="forget"):
    """Draw the scores of one group of concepts, one axes per attack and method.

    rows: of `mu.reports.collect.deduplicate`, at one learning rate of each attack.
    """
    rows = rows[(rows.panel == "") & (rows.group == group) & rows.attack.isin(attacks)]
    rows = rows.assign(method=rows.method.map(display_name))
    methods = _methods(rows)
    quantities = [f"recognised, {attack}" for attack in attacks]
    fig, axes = method_grid(methods, quantities, "steps of fine-tuning")
    last = rows.step.max()
    for quantity, attack in zip(quantities, attacks, strict=True):
        for method in methods:
            part = rows[(rows.attack == attack) & (rows.method == method)]
            draw_scores(part, axes[quantity, method]).set_xlim(-0.04 * last, 1.04 * last)
    legend_below(fig, axes[quantities[0], methods[0]])
    return fig


def angle_figure(records):
    """Draw inner product and angle of the two gradients over the training, one axes per method.

    The gradients are those of the loss of the concept and of the related loss, see `trend`.
    Returns (figure, table of `angle_change`).
    """
    records = records[records.panel.eq("")].dropna(subset=["cosine"])
    records = records[records.model.isin(VARIANTS)]
    methods = _methods(records)
    fig, axes = method_grid(methods, ["inner product", "angle, degrees"], "step of training")
    names = records.method.map(display_name)
    for (quantity, method), ax in axes.items():
        part = records[names == method]
        # The plain variant is drawn first, below the other one.
        part = part.assign(model=pd.Categorical(part.model, VARIANTS)).sort_values("model")
        labels = {"title": method, "xlabel": ax.get_xlabel(), "ylabel": ax.get_ylabel()}
        trend(part.astype({"model": str}), quantity.split(",")[0], ax, legend=False)
        ax.set(**labels)  # instead of those of `trend`
        ax.title.set_fontsize(9)
    legend_below(fig, axes["inner product", methods[0]])
    return fig, angle_change(records)


def search_figure(table):
    """Draw `mu.reports.tables.search_table`: a dot with its interval per method and variant."""
    searches = list(dict.fromkeys(table.search))
    methods = list(dict.fromkeys(table.method))[::-1]
    size = (3.2 * len(searches), 0.3 * len(methods) + 1.3)
    fig, axes = plt.subplots(1, len(searches), figsize=size, sharey=True, squeeze=False)
    for ax, search in zip(axes[0], searches, strict=True):
        for model, shift in zip(VARIANTS, (0.18, -0.18), strict=True):
            part = table[(table.search == search) & (table.variant == model)]
            y = [methods.index(method) + shift for method in part.method]
            intervals(ax, part, "score", y, model, s=24, marker=MARKERS[model])
        ax.set(
            yticks=range(len(methods)),
            yticklabels=methods,
            xlim=(-0.03, 1.03),
            xlabel="concept recognised",
            title=search,
        )
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    return fig


def attack_images(progress, step=None, prompts=(2, 2, 1)):
    """Draw images of the original, then of each model before and after an attack.

    progress: a `mu.reports.explorer.AttackProgress` whose first model is the original.
    step: steps of the attack, by default all. prompts: number of rows of the forget, related and
    unrelated group. Raises ValueError for a step without images.
    """
    if step is None:
        step = progress.steps[-1]
    if step not in progress.steps:
        steps = ", ".join(map(str, progress.steps))
        raise ValueError(f"no images of {progress.name} after {step} steps: choose from {steps}")
    items = []
    for group, count in zip(("forget", "related", "unrelated"), prompts, strict=True):
        items += _first_of_each_prompt(progress.items, group, count)
    columns, titles = [], []
    for model, images in zip(progress.models, progress.pictures, strict=True):
        columns.append(images[0])
        titles.append(model)
        if model != "original":
            columns.append(images[progress.steps.index(step)])
            titles.append(f"{model}\n+ {step} steps")
    cells = [[images[i] for images in columns] for i in items]
    return panel(cells, [progress.items[i]["prompt"] for i in items], titles)


def _first_of_each_prompt(items, group, count):
    """Return the indices of `count` items of a group: each prompt once before a second seed."""
    seeds, ranked = Counter(), []
    for i, item in enumerate(items):
        if item["group"] == group:
            ranked.append((seeds[item["prompt"]], i))
            seeds[item["prompt"]] += 1
    return [i for _, i in sorted(ranked)[:count]]


def claim_images(attack, clean=None, step=None, counts=(3, 9, 4)):
    """Draw one row per model before and after an attack, one column per prompt.

    Images in which the judge does not recognise what the prompt names have a red frame.

    attack, clean: `mu.reports.explorer.AttackProgress` of the same models, the original first;
    CLEAN adds a row for the last model. step: steps of both, by default the last that
    they share. counts: number of columns of the forget, related and unrelated group.
    Raises ValueError if they share no step, model or image.
    """
    steps = set(attack.steps) & set(clean.steps if clean else attack.steps) - {0}
    step = max(steps, default=0) if step is None else step
    if step not in steps or (
        clean and (clean.models, clean.items) != (attack.models, attack.items)
    ):
        raise ValueError(
            f"{attack.name} and {clean.name if clean else 'CLEAN'} share no images of the same "
            f"models after {step} steps: run both on the same models for the same number of steps"
        )
    shown = []
    for group, count in zip(("forget", "related", "unrelated"), counts, strict=True):
        shown += _first_of_each_prompt(attack.items, group, count)
    rows = []
    for m, model in enumerate(attack.models):
        rows.append((model, attack, m, 0))
        if model != "original":
            rows.append((f"{model}\n+ {step} steps", attack, m, step))
    if clean:
        rows.append((f"{model}\n+ {step} steps of CLEAN", clean, m, step))
    at = [(progress, m, progress.steps.index(n)) for _, progress, m, n in rows]
    cells = [[progress.pictures[m, n, i] for i in shown] for progress, m, n in at]
    lost = [[progress.hits[m, n, i] == 0 for i in shown] for progress, m, n in at]
    prompts = [textwrap.fill(attack.items[i]["prompt"].removeprefix("a "), 10) for i in shown]
    return panel(cells, [label for label, *_ in rows], prompts, cell=0.6, framed=lost)
