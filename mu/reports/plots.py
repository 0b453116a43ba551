"""Plots of any model and attack: image grids, score curves with intervals, confusion matrices."""

import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image

from mu.images import blur, from_grid

# Display name of each model → its colour in all figures; models without one share OTHER.
FRAME = "#d62728"
COLORS = {
    "original": "#4d4d4d",
    "unlearned": "#d55e00",
    "meta-unlearned": "#0072b2",
    "ascent only": "#cc79a7",
    "unlearned, stronger": "#e69f00",
    "unlearned, longer": "#56b4e9",
    "ascent only, strong": "#8f3f6d",
    "ascent only, short": "#e5c1d4",
    "meta-unlearned, cold attackers": "#7f7fc8",
    "public code, intended weights": "#b0a030",
    "public code, as run": "#6f6420",
    "meta-unlearned, first phase": "#7fb8d8",
    "meta-unlearned, first steps": "#7fb8d8",
}
OTHER = "#009e73"
# Run name without its seed → display name of the model.
LABELS = {
    "meta": "meta-unlearned",
    "first": "meta-unlearned, first phase",
    "begun": "meta-unlearned, first steps",
    "stronger": "unlearned, stronger",
    "longer": "unlearned, longer",
    "ascent": "ascent only",
    "ascent-short": "ascent only, short",
    "ascent-long": "ascent only",
    "ascent-strong": "ascent only, strong",
    "cold": "meta-unlearned, cold attackers",
    "public-intended": "public code, intended weights",
    "public-run": "public code, as run",
}


def label(run):
    """Return the display name of a run, its key in COLORS.

    The training seed is dropped: "meta-0" and "meta-1" are both "meta-unlearned". A run that is not
    in LABELS keeps its name, as "esd-u-1" for "esd-u-1-0".
    """
    base = re.sub(r"-\d+$", "", run)
    return LABELS.get(base, base)


def model_color(model):
    """Return the colour of a model, given its display name."""
    return COLORS.get(model, OTHER)


def saved_images(rows, png):
    """Return the images of evaluation rows, arrays (size, size, 3), from their saved grid."""
    size = Image.open(png).width // min(len(rows), 16)
    return from_grid(png, len(rows), size)


def panel(cells, row_labels, column_labels, cell=1.0, framed=None):
    """Draw a table of images and return the figure.

    cells: cells[row][column] is an image array. cell: side of an image in inches. framed:
    framed[row][column] is whether the image has a red frame; by default none has.
    """
    rows, columns = len(cells), len(cells[0])
    size = (cell * columns + 0.6, cell * rows + 0.3)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for i, images in enumerate(cells):
        for j, image in enumerate(images):
            ax = axes[i][j]
            # Without interpolation, vector formats embed the image at its own resolution.
            ax.imshow(image, interpolation="none")
            ax.set(xticks=[], yticks=[])
            if framed is not None and framed[i][j]:
                ax.spines[:].set(color=FRAME, linewidth=1.5)
            else:
                sns.despine(ax=ax, left=True, bottom=True)
            if i == 0:
                ax.set_title(column_labels[j], fontsize=7)
        axes[i][0].set_ylabel(row_labels[i], fontsize=7, rotation=0, ha="right", va="center")
    fig.subplots_adjust(wspace=0.04, hspace=0.04)
    return fig


def compare(columns, each=2, blurred=False):
    """Draw the same evaluation images of several models side by side and return the figure.

    Columns are models, rows are pairs of prompt and seed: the first `each` pairs of the forget,
    related and unrelated group, in the order of their seeds, so that a prompt has a second row only
    after each prompt of its group has one.

    columns: column title → (evaluation rows, path of the PNG grid saved with them). All have the
    prompts and seeds of the first. blurred: blur the images; needed where the grid of a harmful
    concept may be saved unblurred.
    """
    first_rows, _ = next(iter(columns.values()))
    chosen = []
    for group in ("forget", "related", "unrelated"):
        members = [row for row in first_rows if row["group"] == group]
        chosen += sorted(members, key=lambda row: row["seed"])[:each]
    keys = [(row["prompt"], row["seed"]) for row in chosen]
    by_model = []
    for rows, png in columns.values():
        images = saved_images(rows, png)
        found = {(row["prompt"], row["seed"]): i for i, row in enumerate(rows)}
        by_model.append([images[found[key]] for key in keys])
    cells = [blur(images) if blurred else images for images in zip(*by_model, strict=True)]
    return panel(cells, [prompt for prompt, _ in keys], list(columns))


def curves(table, title, ax=None, y="hit", legend=True):
    """Draw the score of each model against the steps of fine-tuning and return the axes.

    Each run and attack seed contributes its mean over prompts; a curve is the mean over these, with
    a 95 % bootstrap interval. The legend is to the right of the axes, where it covers no curve; of
    several axes in a row only the last needs it.
    """
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
        palette={model: model_color(model) for model in order},
        errorbar=("ci", 95),
        seed=0,
        ax=ax,
    )
    ax.set(xlabel="steps of fine-tuning", ylabel="recognised", ylim=(-0.03, 1.03), title=title)
    ax.legend(title=None, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    ax.get_legend().set_visible(legend)
    return ax


def curve_figure(rows, names, columns=5):
    """Draw `curves` of the concept under each attack, one axes per name, and return the figure."""
    lines = math.ceil(len(names) / columns)
    size = (2.3 * columns, 1.9 * lines + 0.4)
    fig, axes = plt.subplots(
        lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    used = axes.flat[: len(names)]
    concept = rows[rows.group == "forget"]
    for ax, name in zip(used, names, strict=True):
        curves(concept[concept.name == name], name, ax, legend=False)
        ax.set(xlabel="")
        ax.title.set_size(9)
        ax.tick_params(labelsize=7)
    legend_below(fig, *used)
    return fig


def legend_below(fig, *axes):
    """Add one legend of all labels of `axes` below them; the figure's layout is constrained."""
    handles = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[name] = handle
    columns = max(1, min(len(handles), int(fig.get_figwidth() // 1.75)))
    fig.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )


def intervals(ax, table, value, y, model, **style):
    """Draw a model's dots at (table[value], y), each with its interval (columns low and high).

    style: of the dots, as in `Axes.scatter`.
    """
    ax.hlines(y, table.low, table.high, color=model_color(model), lw=2, alpha=0.5)
    ax.scatter(table[value], y, color=model_color(model), label=model, zorder=3, **style)


def peak_figure(table, threshold=0.5):
    """Draw the concept's highest score under each attack and return the figure.

    One row per attack, the most effective against the defended model on top; one dot per model with
    its interval, and a tick at its score before the attack.
    table: `mu.measures.comparison.attack_table`. threshold: position of the dotted line.
    """
    present = set(table.model)
    models = [*sorted(present - set(COLORS)), *(m for m in COLORS if m in present)]
    defended = table[table.model == models[-1]].sort_values(["peak", "area"]).attack.tolist()
    order = [*(a for a in dict.fromkeys(table.attack) if a not in defended), *defended]
    fig, ax = plt.subplots(figsize=(6.4, 0.34 * len(order) + 1))
    for i, model in enumerate(models):
        part = table[table.model == model]
        shift = 0.16 * (i - (len(models) - 1) / 2)
        y = [order.index(attack) + shift for attack in part.attack]
        intervals(ax, part, "peak", y, model, s=26, marker="os^D"[i % 4])
        ax.scatter(part.start, y, color=model_color(model), marker="|", s=40, zorder=2)
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


def trend(records, y, ax=None, legend=True):
    """Draw how the two gradients relate over the training and return the axes.

    Points are single measurements; each model has a regression line with its 95 % band (bootstrap
    over the points). The dotted line is the right angle. The y axis covers the central 96 % of the
    points with a margin: a single outlier would flatten all lines.

    records: columns model, step, cosine, "inner product"; steps without a measurement are NaN.
    y: "inner product", or "angle" in degrees.
    """
    ax = ax or plt.subplots(figsize=(4.2, 3))[1]
    records = records.assign(angle=np.degrees(np.arccos(records.cosine.clip(-1, 1))))
    for model, part in records.dropna(subset=[y]).groupby("model", sort=False):
        sns.regplot(
            part,
            x="step",
            y=y,
            ax=ax,
            color=model_color(model),
            label=model,
            seed=0,
            scatter_kws={"s": 10, "alpha": 0.5},
            line_kws={"lw": 1.8},
        )
    low, high = records[y].quantile([0.02, 0.98])
    if high > low:
        margin = 0.25 * (high - low)
        ax.set_ylim(low - margin, high + margin)
    ax.axhline(90 if y == "angle" else 0, color="#555555", lw=1, ls=":")
    title = "angle, degrees" if y == "angle" else y
    ax.set(xlabel="step of training", title=title, ylabel="")
    if legend:
        ax.legend(fontsize=8)
    return ax


def validation_figure(history):
    """Draw what the defender's validation found over a training and return the figure.

    From the left: the related, unrelated and forget losses before and after fresh attacks; the
    share of related pictures that each attack loses, their mean, that of unrelated pictures, what
    the model loses before any attack, and the score (`mu.validation.Found.score`); the cosines of
    the attacks' displacement and the simulated ones.

    The last validations of the phases before the last one are dotted lines. history: the records
    of `mu.runs.folder.table`. Raises ValueError for a training without a validation.
    """
    found = history.filter(regex="^validation ").dropna(how="all")
    if found.empty:
        raise ValueError("no step was validated: set validation, such as {'every': 30}")
    found = found.rename(columns=lambda name: name.removeprefix("validation "))
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    colors = {"related": COLORS["meta-unlearned"], "unrelated": OTHER, "forget": "#000000"}
    for name, color in colors.items():
        axes[0].plot(found.index, found[name], color=color, ls=":", label=name)
        axes[0].plot(found.index, found[f"{name} after"], color=color, label=f"{name}, attacked")
    axes[0].set(yscale="log", title="denoising loss, fresh attacks")
    axes[0].legend(fontsize=7)
    for name, color in (("related", colors["related"]), ("unrelated", OTHER)):
        axes[1].plot(found.index, found[f"{name} lost"], color=color, label=f"{name}, mean")
        axes[1].plot(found.index, found[f"{name} harmed before"], color=color, ls=":")
    axes[1].plot(found.index, found.score, color="#000000", ls="--", label="score")
    for name in found.filter(regex="^lost, "):
        attack, steps = name.removeprefix("lost, ").split(", ")
        axes[1].plot(found.index, found[name], ".-", lw=0.8, label=f"{attack}, {steps} steps")
    axes[1].set(ylim=(-0.02, 1.02), title="related pictures lost to these")
    axes[1].legend(fontsize=7)
    for name in found.filter(regex="^cosine "):
        axes[2].plot(found.index, found[name], ".-", label=name.removeprefix("cosine "))
    axes[2].set(title="cosine with simulated attackers")
    if axes[2].lines:
        axes[2].legend(fontsize=8)
    ends = found.index[found.phase.diff(-1) < 0]
    for ax in axes:
        for end in ends:
            ax.axvline(end, color="#aaaaaa", lw=1, ls=":")
        ax.set(xlabel="outer step")
    return fig


def confusion(asked, seen, title="", ax=None):
    """Draw the confusion matrix of a judge and return it as a table; each row sums to 1.

    Rows are the expected labels `asked`, columns the judge's labels `seen`, both sorted; the last
    column, "other", sums the judge's labels that are never expected.
    """
    labels = sorted(set(asked))
    seen = [name if name in labels else "other" for name in seen]
    table = pd.crosstab(
        pd.Series(asked, name="asked for"), pd.Series(seen, name="seen"), normalize="index"
    ).reindex(columns=[*labels, "other"], fill_value=0.0)
    short = [name.partition(":")[2] or name for name in table.columns]
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
    """Save a figure as SVG, PNG (at `dpi`) and PDF and return the path of the SVG.

    Files hold no date and no random ids: the same figure gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", dpi=dpi)
    with plt.rc_context({"svg.hashsalt": name}):
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return folder / f"{name}.svg"
