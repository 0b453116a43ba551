"""Pictures: grids of samples, what hides them, curves with intervals."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from mu.images import blur, from_grid

COLORS = {
    "original": "#4d4d4d",
    "unlearned": "#d55e00",
    "meta-unlearned": "#0072b2",
    "ascent only": "#cc79a7",
    "unlearned, stronger": "#e69f00",
    "unlearned, longer": "#56b4e9",
    "ascent only, weak": "#e5c1d4",
    "ascent only, strong": "#8f3f6d",
    "meta-unlearned, first phase": "#7fb8d8",
}
OTHER = "#009e73"  # of a model that has no colour of its own


def panel(cells, row_labels, column_labels, cell=1.0):
    """A table of pictures: cells[row][column] is an image array. Returns the figure."""
    fig, axes = plt.subplots(
        len(cells),
        len(cells[0]),
        figsize=(cell * len(cells[0]) + 0.6, cell * len(cells) + 0.3),
        squeeze=False,
    )
    for i, line in enumerate(cells):
        for j, image in enumerate(line):
            axes[i][j].imshow(
                image, interpolation="none"
            )  # vector formats then keep the picture itself, not an enlarged copy
            axes[i][j].set(xticks=[], yticks=[])
            sns.despine(ax=axes[i][j], left=True, bottom=True)
            if i == 0:
                axes[i][j].set_title(column_labels[j], fontsize=7)
        axes[i][0].set_ylabel(row_labels[i], fontsize=7, rotation=0, ha="right", va="center")
    fig.subplots_adjust(wspace=0.04, hspace=0.04)
    return fig


def curves(table, title, ax=None, y="hit", legend=True):
    """Score against steps of fine-tuning, a line a model; the mean over prompts of each run and attack seed, then mean and 95 % bootstrap
    interval over these. The legend stands to the right, where it hides no line: of several pictures in a row, the last one needs it."""
    ax = ax or plt.subplots(figsize=(4.2, 3))[1]
    by_seed = table.groupby(["model", "run", "step", "attack_seed"], as_index=False)[y].mean()
    known = set(by_seed["model"])
    order = [*(m for m in COLORS if m in known), *sorted(known - set(COLORS))]
    sns.lineplot(
        by_seed,
        x="step",
        y=y,
        hue="model",
        style="model",
        hue_order=order,
        style_order=order,
        markers=True,
        dashes=False,
        palette={m: COLORS.get(m, OTHER) for m in order},
        errorbar=("ci", 95),
        seed=0,
        ax=ax,
    )
    ax.set(xlabel="steps of fine-tuning", ylabel="recognised", ylim=(-0.03, 1.03), title=title)
    ax.legend(title=None, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    ax.get_legend().set_visible(legend)
    return ax


def trend(records, y, ax=None, legend=True):
    """`y` ("inner product" of the two gradients, or their "angle" in degrees, from the recorded cosine) against the step of training, where it was recorded: a point a measurement, and
    for each model a regression line with its 95 % band (bootstrap over the points). The dotted line is the right angle; of the outermost
    2 % on each side some may lie outside the axes. Returns the axes."""
    ax = ax or plt.subplots(figsize=(4.2, 3))[1]
    records = records.assign(angle=np.degrees(np.arccos(records.cosine.clip(-1, 1))))
    for model, part in records.dropna(subset=[y]).groupby("model", sort=False):
        sns.regplot(
            part,
            x="step",
            y=y,
            ax=ax,
            color=COLORS.get(model, OTHER),
            label=model,
            seed=0,
            scatter_kws={"s": 10, "alpha": 0.5},
            line_kws={"lw": 1.8},
        )
    low, high = records[y].quantile([0.02, 0.98])  # a single large one would flatten all others
    ax.set_ylim(low - 0.25 * (high - low), high + 0.25 * (high - low)) if high > low else None
    ax.axhline(90 if y == "angle" else 0, color="#555555", lw=1, ls=":")
    ax.set(xlabel="step of training", title=f"{y}, degrees" if y == "angle" else y, ylabel="")
    if legend:
        ax.legend(fontsize=8)
    return ax


def confusion(asked, seen, title="", ax=None):
    """Picture of a judge's answers: a line what was asked for (or is there), a column what it saw, each line sums to 1. All labels that nobody asked for are one column, "other".

    Returns the table, lines and columns in alphabetical order."""
    labels = sorted(set(asked))
    seen = [label if label in labels else "other" for label in seen]
    table = pd.crosstab(
        pd.Series(asked, name="asked for"), pd.Series(seen, name="seen"), normalize="index"
    ).reindex(columns=[*labels, "other"], fill_value=0.0)
    short = [label.split(":")[-1] for label in table.columns]
    side = min(1.4 + 0.2 * len(labels), 10)
    ax = ax or plt.subplots(figsize=(side, side))[1]
    sns.heatmap(
        table.set_axis(short, axis=1).set_axis(short[:-1]),
        vmin=0,
        vmax=1,
        cmap="Blues",
        square=True,
        cbar=False,
        linewidths=0.3 if len(labels) < 50 else 0,
        xticklabels=1,
        yticklabels=1,
        ax=ax,
    )
    ax.tick_params(labelsize=min(6, 50 * side / len(table.columns)))
    ax.set(title=title, xlabel="seen", ylabel="asked for")
    return table


def save_figure(fig, folder, name, dpi=160):
    """SVG, PNG (so many dots an inch) and PDF of a figure, the same bytes each time that it is the same; returns the path of the SVG."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", dpi=dpi)
    with plt.rc_context({"svg.hashsalt": name}):
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return folder / f"{name}.svg"


def dots(table, threshold=0.5):
    """Figure: a line an attack, the strongest against the defended model on top; a dot a model at its peak, with its interval, and a tick where it began."""
    models = sorted(set(table.model) - set(COLORS)) + [
        m for m in COLORS if m in set(table.model)
    ]  # the defended one is the last
    order = table[table.model == models[-1]].sort_values(["peak", "area"]).attack.tolist()
    order = [*(a for a in dict.fromkeys(table.attack) if a not in order), *order]
    fig, ax = plt.subplots(figsize=(6.4, 0.34 * len(order) + 1))
    for i, model in enumerate(models):
        part = table[table.model == model]
        y = [order.index(a) + 0.16 * (i - (len(models) - 1) / 2) for a in part.attack]
        color = COLORS.get(model, OTHER)
        ax.hlines(y, part.low, part.high, color=color, lw=2, alpha=0.5)
        ax.scatter(part.peak, y, color=color, label=model, zorder=3, s=26, marker="os^D"[i % 4])
        ax.scatter(part.start, y, color=color, marker="|", s=40, zorder=2)
    ax.axvline(threshold, color="#999999", lw=0.8, ls=":")
    ax.set(
        yticks=range(len(order)),
        yticklabels=order,
        xlim=(-0.03, 1.03),
        xlabel="concept recognised at the attack's best step (tick: before it)",
    )
    ax.legend(
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.4, 1.0 + 1.1 / len(order)),
        ncols=len(models),
        frameon=False,
    )
    return fig


def every_curve(rows, order, columns=5):
    """Figure: how often the concept is recognised, step by step, a panel an attack in the given order: also of those that do nothing."""
    lines = -(-len(order) // columns)
    fig, axes = plt.subplots(
        lines, columns, figsize=(2.3 * columns, 1.9 * lines + 0.4), sharey=True, squeeze=False
    )
    for ax in axes.flat[len(order) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, order, strict=False):
        curves(rows[(rows.name == name) & (rows.group == "forget")], name, ax, legend=False)
        ax.set(xlabel="")
        ax.title.set_size(9)
        ax.tick_params(labelsize=7)
    handles = {
        label: line
        for ax in axes.flat[: len(order)]
        for line, label in zip(*ax.get_legend_handles_labels(), strict=False)
    }
    fig.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )
    fig.tight_layout(rect=(0, 0.6 / (1.9 * lines + 0.4) * 0.5, 1, 1))
    return fig


LABELS = {
    "meta": "meta-unlearned",
    "first": "meta-unlearned, first phase",
    "stronger": "unlearned, stronger",
    "longer": "unlearned, longer",
    "ascent": "ascent only",
    "ascent-weak": "ascent only, weak",
    "ascent-strong": "ascent only, strong",
}


def label(run):
    """What a run is called in figures: other words for some, and "meta-0", "meta-1", … are one model, trained with several seeds."""
    base = re.sub(r"-\d+$", "", run)
    return LABELS.get(base, base)


def compare(columns, each=2, blurred=False):
    """Figure: `each` pictures of each group, first one of each prompt, then with further seeds, side by side.

    columns: title → (rows, the PNG saved with them). blurred: hide them, for pictures that may have been saved as they are."""
    rows = next(iter(columns.values()))[0]
    shown = [
        (r["prompt"], r["seed"])
        for g in ("forget", "related", "unrelated")
        for r in sorted((r for r in rows if r["group"] == g), key=lambda r: r["seed"])[:each]
    ]

    def place(rows, item):
        return next(i for i, row in enumerate(rows) if (row["prompt"], row["seed"]) == item)

    tiles = [
        (rows, from_grid(png, len(rows), Image.open(png).width // min(len(rows), 16)))
        for rows, png in columns.values()
    ]
    shade = blur if blurred else lambda images: images
    return panel(
        [shade([images[place(rows, item)] for rows, images in tiles]) for item in shown],
        [prompt for prompt, _ in shown],
        list(columns),
    )
