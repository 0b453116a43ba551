"""The tables of the paper (arXiv 2410.12777): its published numbers beside ours.

All are made from `mu.reports.collect`; no model is loaded. The measures differ: our score is the
percentage of images in which the pocket judge recognises the concept, the paper's the percentage of
142 I2P prompts for whose image NudeNet detects nudity. Each number states its source.
"""

import numpy as np
import pandas as pd

from mu.measures.comparison import mean_interval, self_destruction
from mu.measures.statistics import student_interval

VARIANTS = ("unlearned", "meta-unlearned")
MODELS = ("original", *VARIANTS)
SEARCH = "unlearn-diff-atk"  # the search reported as "adversarial prompts"
METHODS = ("original", "ESD-u", "ESD-f", "ESD", "SDD", "UCE", "RECE")  # prefixes, in paper order
ATTACKS = ("none", "HRM-s", "HRM-m", "CLEAN", "adversarial prompts")  # in paper order


def display_name(method):
    """Return the paper's spelling of a method: "ESD-u-3" for "esd-u-3", "original" for ""."""
    name, *rest = method.split("-")
    return "-".join([name.upper(), *rest]) or "original"


def concept_rows(rows, panel=""):
    """Return the rows of the concept (group "forget") of the variants and the original.

    panel: of this panel; "": of the experiment itself.
    """
    return rows[(rows.panel == panel) & (rows.group == "forget") & rows.model.isin(MODELS)]


def concept_table(rows, published):
    """Return the paper's table of the forgotten concept, one row per published or measured number.

    rows: of `mu.reports.collect.read_results`, at one learning rate of the attack. published:
    `data/paper_nudity.csv`. Columns: method, variant, attack, steps; published, ours, low, high
    (percent; ours with the 95 % interval of `mu.measures.comparison.mean_interval`); trainings,
    pictures, source. A missing number is NaN.
    """
    keys = ["method", "variant", "attack", "steps"]
    found = []
    for key, part in _concept_cells(rows).groupby(keys, sort=False):
        percent = (100 * value for value in mean_interval(part))
        found.append((*key, *percent, part.training.nunique(), len(part)))
    ours = pd.DataFrame(found, columns=[*keys, "ours", "low", "high", "trainings", "pictures"])
    theirs = published.rename(columns={"nudity_percent": "published"})
    theirs["method"] = theirs.method.replace({"SD-v1-4": "original"})
    table = ours.merge(theirs, on=keys, how="outer")
    table["source"] = [_source(row) for row in table.itertuples()]
    return sort_like_paper(table)


def _concept_cells(rows):
    """Return the rows of `concept_table` with its keys; `none` is each model before any attack."""
    rows = concept_rows(rows)
    rows = rows.assign(
        method=rows.method.map(display_name),
        variant=rows.model,
        attack=rows.attack.replace({SEARCH: "adversarial prompts"}),
    )
    # A search counts at its last step, which the table does not name.
    searched = rows.attack == "adversarial prompts"
    last = rows.step.where(searched).groupby(rows["name"]).transform("max")
    used = rows.attack.eq("none") | (rows.step.gt(0) & (~searched | rows.step.eq(last)))
    rows = rows.assign(steps=rows.step.mask(searched, 0).astype(int))
    return rows[used & rows.attack.isin(ATTACKS)]


def _source(row):
    """Return the sources of the numbers of a row of `concept_table`."""
    parts = [] if pd.isna(row.published) else ["published: SD-v1-4, arXiv 2410.12777"]
    if not pd.isna(row.ours):
        parts.append(f"ours: {_trainings(row.trainings)}, {row.pictures:.0f} pictures")
    return "; ".join(parts)


def _trainings(count):
    return f"{count:.0f} training{'s' if count > 1 else ''}"


def sort_like_paper(table):
    """Sort rows as the paper does: by method, variant (plain first), attack and steps."""
    known = {"variant": MODELS, "attack": ATTACKS}

    def place(column):
        if column.name == "method":
            return column.map(_method_place)
        values = known.get(column.name)
        if values is None:
            return column
        return column.map({value: i for i, value in enumerate(values)}).fillna(len(values))

    by = [column for column in ("method", "variant", "attack", "steps") if column in table]
    return table.sort_values(by, key=place, kind="stable", ignore_index=True)


def _method_place(name):
    """Return the sort key of a method: the first prefix in METHODS, then the name."""
    matches = (i for i, prefix in enumerate(METHODS) if name.startswith(prefix))
    return next(matches, len(METHODS)), name


def layout(table, ours="ours"):
    """Return `concept_table` in the paper's layout; a missing number is "".

    Two rows per model, the published one and ours (with the source `ours`); one column per attack
    and number of steps.
    """
    columns = [
        (attack, step)
        for attack in ATTACKS
        for step in sorted(table[table.attack == attack].steps.unique())
    ]
    lines = []
    for (method, variant), part in table.groupby(["method", "variant"], sort=False):
        cells = part.set_index(["attack", "steps"]).reindex(columns)
        published = cells.published.map("{:.2f}".format, na_action="ignore").fillna("")
        own = [_with_interval(cell.ours, cell.low, cell.high) for cell in cells.itertuples()]
        lines.append([method, variant, "published, SD-v1-4", *published])
        lines.append([method, variant, ours, *own])
    names = [
        attack if attack in ("none", "adversarial prompts") else f"{attack}, {step} steps"
        for attack, step in columns
    ]
    return pd.DataFrame(lines, columns=["method", "variant", "source", *names])


def _with_interval(value, low, high, digits=1, interval_digits=0):
    """Return "value (low–high)", the value alone without an interval, and "" for NaN."""
    if pd.isna(value):
        return ""
    text = f"{value:.{digits}f}"
    if pd.isna(low):
        return text
    return f"{text} ({low:.{interval_digits}f}–{high:.{interval_digits}f})"


def quality_table(rows, numbers, published):
    """Return the paper's table of quality before any attack, one row per model and source.

    FID and CLIP score as published and as computed by 50_evaluate; for the pocket models also JFD,
    the distance in the judge's features (not an FID), and the percentage of related and unrelated
    concepts still recognised. Means over trainings with 95 % intervals; missing numbers are "".

    rows: of `mu.reports.collect.deduplicate`, which counts a model without a training seed once.
    numbers: of `mu.reports.collect.read_results`. published: `data/paper_quality.csv`.
    """
    scores = {"fid": "FID", "CLIP score": "CLIP score", "jfd": "JFD"}
    rows = rows[(rows.panel == "") & rows.attack.eq("none") & rows.model.isin(MODELS)]
    rows = rows[rows.group != "forget"]
    rows = rows.assign(method=rows.method.map(display_name), variant=rows.model)
    measured = _by_model(rows, numbers)
    ours = []
    for key, part in rows.groupby(["method", "variant"], sort=False):
        source = f"ours, {_trainings(part.training.nunique())}"
        line = {"method": key[0], "variant": key[1], "source": source}
        for group, pictures in part.groupby("group"):
            line[f"{group} kept"] = _with_interval(*(100 * x for x in mean_interval(pictures)))
        for name, column in scores.items():
            values = [found[name] for found in measured.get(key, ()) if name in found]
            line[column] = _mean_text(values)
        ours.append(line)
    theirs = published.rename(columns={"fid": "FID", "clip_score": "CLIP score"})
    for column in ("FID", "CLIP score"):
        theirs[column] = theirs[column].map("{:.2f}".format, na_action="ignore")
    theirs["method"] = theirs.method.replace({"SD-v1-4": "original"})
    theirs["source"] = "published, SD-v1-4"
    table = sort_like_paper(pd.concat([theirs, pd.DataFrame(ours)], ignore_index=True))
    columns = ["method", "variant", "source", *scores.values(), "related kept", "unrelated kept"]
    return table.reindex(columns=columns).fillna("")


def _by_model(rows, numbers):
    """Return (method, variant) → numbers of 50_evaluate, one dict per evaluated run."""
    runs = rows.drop_duplicates(["folder", "run"]).itertuples()
    model = {(run.folder, run.run): (run.method, run.variant) for run in runs}
    found = {}
    for folder, places in numbers.items():
        for place in places.values():
            for run, values in place["numbers"].items():
                if (folder, run) in model:
                    found.setdefault(model[folder, run], []).append(values)
    return found


def _mean_text(values):
    """Return the mean of non-negative values with Student's 95 % interval, if they differ."""
    if not values:
        return ""
    low = high = np.nan
    if len(set(values)) > 1:
        low, high = np.clip(student_interval(values)[1:], 0, None)
    return _with_interval(np.mean(values), low, high, 2, 2)


def search_table(rows, searches=("random", SEARCH)):
    """Return the concept's score after each prompt search (shares, with 95 % intervals).

    Columns: method, variant, search, score, low, high, trainings, pictures.
    """
    rows = concept_rows(rows)
    rows = rows[rows.attack.isin(searches)]
    found = []
    for (method, model, search), part in rows.groupby(["method", "model", "attack"], sort=False):
        end = part[part.step == part.step.max()]
        counts = (end.training.nunique(), len(end))
        found.append((display_name(method), model, search, *mean_interval(end), *counts))
    names = ["method", "variant", "search", "score", "low", "high", "trainings", "pictures"]
    return sort_like_paper(pd.DataFrame(found, columns=names))


def destruction_table(rows):
    """Return the self-destruct index of each method under HRM-s and HRM-m, less that of CLEAN.

    Shares in −1…1, see `mu.measures.comparison.self_destruction`. Columns: method, variant, attack,
    after, lost to the attack, lost to CLEAN, self-destruct index, low, high.
    """
    keys, found = ["method", "variant", "attack"], []
    rows = rows[(rows.panel == "") & rows.model.isin(VARIANTS)]
    for method, part in rows.groupby("method", sort=False):
        clean = part[part.attack == "CLEAN"]
        attacked = part[part.attack.isin(["HRM-s", "HRM-m"])]
        if len(clean):
            index = self_destruction(attacked.assign(name=attacked.attack), clean)
            found.append(index.assign(method=display_name(method)))
    if not found:
        return pd.DataFrame(columns=keys)
    table = pd.concat(found, ignore_index=True).rename(columns={"model": "variant"})
    return sort_like_paper(table[[*keys, *table.columns.difference(keys, sort=False)]])


def panel_table(rows):
    """Return the scores of the panels before and after HRM-m (percent, with 95 % intervals).

    One row per panel, variant and group.
    """
    rows = rows[rows.panel.ne("") & rows.model.isin(VARIANTS)]
    rows = rows[rows.attack.eq("HRM-m") & rows.hit.notna()]
    found = []
    for (panel, model, group), part in rows.groupby(["panel", "model", "group"], sort=False):
        line = {"panel": panel, "variant": model, "group": group}
        first, last = part.step.min(), part.step.max()
        for name, step in (("before", first), (f"after {last:g} steps", last)):
            percent = (100 * x for x in mean_interval(part[part.step == step]))
            line[name] = _with_interval(*percent, digits=0)
        found.append(line)
    return pd.DataFrame(found)
