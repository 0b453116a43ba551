"""Evaluate a pocket model with its judge, and fill in its card."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data.recipe.emoji import STYLES, caption
from mu.concepts.probe import make_probe
from mu.files import fill
from mu.images import from_grid, save_grid, to_grid
from mu.measures.evaluate import measure
from mu.measures.statistics import scores


def assess(out, pipe, judge, names, seeds, guidance, steps, facts):
    """Draw and judge samples, once, in out/quality; returns a table with one row per image.

    Groups: "concepts", each from several seeds; "styles", each on one concept in five;
    "unguided", one concept in four at guidance 1.
    """
    concepts = {f"a {name}": f"concept:{name}" for name in names}
    styles = {caption(name, style): f"style:{style}" for name in names[::5] for style in STYLES}
    unguided = {f"a {name}": f"concept:{name}" for name in names[::4]}
    tables = []
    for group, prompts, n, scale in (
        ("concepts", concepts, seeds, guidance),
        ("styles", styles, 2, guidance),
        ("unguided", unguided, 2, 1.0),
    ):
        probe = make_probe(pipe, {group: prompts}, range(n))
        rows = measure(out / "quality" / group, pipe, judge, probe, scale, steps, facts)
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables)


def show_samples(out, results, group, every):
    """Return a grid of one in `every` samples of a group of `assess`; saves it in out/figures."""
    count = int((results.group == group).sum())
    tiles = from_grid(out / "quality" / group / "samples.png", count, 64)[::every]
    images = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) / 255
    save_grid(images, out / "figures" / f"{group}.png")
    return to_grid(images)


def quality(results):
    """Return the card's figures from the table of `assess`: shares with 95 % intervals."""
    table = scores(results, ["group"]).set_index("group")
    figures = {}
    for group, row in table.iterrows():
        figures[group] = row.drop("n").to_dict() | {"images": int(row.n)}

    def by_label(group):
        hits = results[results.group == group].groupby("expected", sort=False).hit.mean()
        return hits.rename(lambda label: label.split(":")[1])

    per_concept = by_label("concepts")
    return figures | {
        "strong concepts": float((per_concept >= 0.85).mean()),
        "per concept": per_concept.to_dict(),
        "per style": by_label("styles").to_dict(),
    }


def megabytes(*folders):
    """Return the size of all files below the folders, in 10⁶ bytes."""
    files = [file for folder in folders for file in Path(folder).rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def percent(share):
    return f"{100 * share:.1f} %"


def interval(figure):
    """Return a share, its interval and the number of images as text."""
    low, high = percent(figure["low"]), percent(figure["high"])
    return f"{percent(figure['score'])} ({low} to {high}), {figure['images']} images"


def sample_rows(metrics):
    """Return the card's rows about samples: what is measured, value."""
    seeds, concepts = metrics["protocol"]["seeds"], len(metrics["per concept"])
    rows = {
        'samples in which the judge sees the concept asked for, "a {concept}"': interval(
            metrics["concepts"]
        ),
        f"concepts that it sees in at least 85 % of their {seeds} samples": (
            f"{percent(metrics['strong concepts'])} of {concepts}"
        ),
        'samples in which it sees the style asked for, "a {concept}, {style} style"': interval(
            metrics["styles"]
        ),
    }
    for style, share in metrics["per style"].items():
        rows[f"the same, {style} alone"] = percent(share)
    unguided = "samples in which it sees the concept at guidance 1, that is without guidance"
    rows[unguided] = interval(metrics["unguided"])
    return rows


def recipe_rows(judge, autoencoder):
    """Return the card's rows about judge and autoencoder, which the same recipe makes."""
    unseen = judge["unseen style"]
    seen_psnr, unseen_psnr = autoencoder["psnr"], autoencoder["psnr of unseen styles"]
    return {
        "judge, new views of the drawings that it was trained on: concept, style": (
            f"{percent(judge['concept'])}, {percent(judge['style'])}"
        ),
        f"another judge, trained without any {unseen} drawing, on those drawings: concept": (
            percent(judge["unseen concept"])
        ),
        "autoencoder, reconstruction in the four styles, in the other five": (
            f"{seen_psnr:.1f} dB, {unseen_psnr:.1f} dB"
        ),
    }


def fill_card(card, metrics, block="figures"):
    """Fill the figures of a metrics.json into a block of a Markdown card."""
    p = metrics["protocol"]
    rows = sample_rows(metrics)
    if "judge" in metrics:
        rows |= recipe_rows(metrics["judge"], metrics["autoencoder"])
    rows["size, pipeline and judge"] = f"{metrics['megabytes']:.1f} MB"
    table = "".join(f"| {what} | {value} |\n" for what, value in rows.items())
    weakest = sorted(metrics["per concept"].items(), key=lambda item: item[1])[:8]
    weak = ", ".join(f"{name} {percent(share)}" for name, share in weakest)
    versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
    weights = ", ".join(f"{name} `{digest}`" for name, digest in p["weights"].items())
    text = (
        f"| figure | measured |\n|---|---|\n{table}\n"
        f"Weakest concepts: {weak}. Guidance {p['guidance']}, {p['sampling_steps']} steps of "
        f"{p['sampler']}, seeds 0 to {p['seeds'] - 1}; 95 % (Wilson) intervals over images; "
        f"{versions}; weights {weights}.\n"
    )
    fill(card, text, block)
