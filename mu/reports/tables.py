"""The paper's tables (arXiv 2410.12777), its published figures beside ours, and what is said of them. Everything is made from `mu.reports.collect`; no model is loaded.

Ours are not the paper's measure: on the pocket models the score is the share of pictures in which the pocket judge recognises the concept; in the paper it is the share of 142 prompts
of I2P in whose picture NudeNet flags nudity. Both are in percent, so that they can stand in one layout, and every number says where it comes from."""

import numpy as np
import pandas as pd

from mu.measures.comparison import mean_interval, self_destruction
from mu.measures.statistics import student_interval

VARIANTS = ("unlearned", "meta-unlearned")
ATTACKS = (
    "none",
    "HRM-s",
    "HRM-m",
    "CLEAN",
    "adversarial prompts",
)  # columns of the table, in the paper's order
SEARCH = "unlearn-diff-atk"  # the search for words that stands for "adversarial prompts"


def display_name(method):
    """ "esd-u-3" as the paper writes it, "ESD-u-3"; "sdd" is "SDD"."""
    name, *rest = method.split("-")
    return "-".join([name.upper(), *rest])


def concept_rows(rows, panel=""):
    """Rows of the concept (group "forget") of the two variants and the original, of the experiment itself (panel "") or of a panel."""
    return rows[
        (rows.panel == panel) & (rows.group == "forget") & rows.model.isin([*VARIANTS, "original"])
    ]


def _cells(rows):
    """(method, variant, attack, steps) → rows of one cell of the table; `none` is every model before any attack."""
    rows = rows.assign(attack=rows.attack.replace({SEARCH: "adversarial prompts"}))
    words = rows.attack.eq("adversarial prompts")
    last = rows[words].groupby("name").step.transform("max")  # a search is judged at its end
    rows = rows[~words | rows.step.eq(last.reindex(rows.index))]
    for (method, model, attack, step), part in rows.groupby(
        ["method", "model", "attack", "step"], sort=False
    ):
        if attack in ATTACKS and (attack == "none" or step > 0):
            yield (
                (
                    display_name(method) if method else "original",
                    "original" if model == "original" else model,
                    attack,
                    0 if attack == "adversarial prompts" else int(step),
                ),
                part,
            )


def concept_table(rows, published):
    """The paper's table of the forgotten concept, long: a line a number that was published or that we have.

    rows: of `mu.reports.collect.read_results`, all of one learning rate of the attack. published: `data/paper_nudity.csv`. Columns: method, variant, attack, steps, published, ours, low, high (all percent; ours with its
    95 % interval over trainings, prompts and pictures, `mu.measures.comparison.mean_interval`), trainings, pictures, source. What nobody ran or published is NaN."""
    found = []
    for key, part in _cells(concept_rows(rows)):
        value, low, high = (100 * x for x in mean_interval(part))
        found.append((*key, value, low, high, part.training.nunique(), len(part)))
    keys = ["method", "variant", "attack", "steps"]
    ours = pd.DataFrame(found, columns=[*keys, "ours", "low", "high", "trainings", "pictures"])
    theirs = published.rename(columns={"nudity_percent": "published"}).assign(
        method=lambda t: t.method.replace({"SD-v1-4": "original"})
    )
    table = ours.merge(theirs, on=keys, how="outer")
    return sort_like_paper(table.assign(source=[source(row) for row in table.to_dict("records")]))


def source(row):
    """Where the numbers of a line come from, in words."""
    parts = [] if pd.isna(row["published"]) else ["published: SD-v1-4, arXiv 2410.12777"]
    if not pd.isna(row["ours"]):
        parts.append(
            f"ours: {row['trainings']:.0f} training{'s' * (row['trainings'] > 1)}, {row['pictures']:.0f} pictures"
        )
    return "; ".join(parts)


def sort_like_paper(table):
    """Lines in the paper's order: the original, then ESD, SDD, UCE, RECE; unlearned before meta-unlearned; attacks as in ATTACKS, by steps; what nobody knows comes last."""

    def kind(name):
        return next(
            (
                i
                for i, start in enumerate(
                    ("original", "ESD-u", "ESD-f", "ESD", "SDD", "UCE", "RECE")
                )
                if name.startswith(start)
            ),
            9,
        )

    def known(*names):
        return lambda name: names.index(name) if name in names else len(names)

    place = {
        "method": lambda c: c.map(lambda name: (kind(name), name)),
        "variant": lambda c: c.map(known("original", *VARIANTS)),
        "attack": lambda c: c.map(known(*ATTACKS)),
    }
    by = [column for column in ("method", "variant", "attack", "steps") if column in table]
    return table.sort_values(
        by, key=lambda c: place.get(c.name, lambda c: c)(c), kind="stable", ignore_index=True
    )


def layout(table, ours="ours"):
    """The long table as the paper prints it: two lines a model, the published one and ours, a column an attack and number of steps; "" where there is no number."""
    columns = [(a, s) for a in ATTACKS for s in sorted(table[table.attack == a].steps.unique())]
    lines = []
    for (method, variant), part in table.groupby(["method", "variant"], sort=False):
        at = part.set_index(["attack", "steps"])
        for words, value in (("published, SD-v1-4", "published"), (ours, "ours")):
            cells = [at[value].get(key, np.nan) for key in columns]

            def with_interval(key, x):
                return (
                    f"{x:.2f}"
                    if value == "published"
                    else f"{x:.1f}"
                    + (
                        f" ({at.low[key]:.0f}–{at.high[key]:.0f})"
                        if not pd.isna(at.low[key])
                        else ""
                    )
                )

            lines.append(
                [
                    method,
                    variant,
                    words,
                    *(
                        "" if pd.isna(x) else with_interval(key, x)
                        for key, x in zip(columns, cells, strict=False)
                    ),
                ]
            )
    named = [a if a in ("none", "adversarial prompts") else f"{a}, {s} steps" for a, s in columns]
    return pd.DataFrame(lines, columns=["method", "variant", "source", *named])


def quality_table(rows, numbers, published):
    """The paper's table of quality: FID and CLIP score as published, ours where 50_evaluate computed them; and, of the pocket models, the distance in the judge's own features (JFD, which
    is no FID) and the percent of related and unrelated concepts that are still recognised, with 95 % intervals. A line a model and source.

    rows: of `mu.reports.collect.deduplicate`, or a model without a seed would be several. numbers: of `mu.reports.collect.read_results`. Means over the trainings; a column that nobody measured stays empty."""
    keys = ["method", "variant"]
    theirs = published.assign(
        method=published.method.replace({"SD-v1-4": "original"}), source="published, SD-v1-4"
    ).rename(columns={"fid": "FID", "clip_score": "CLIP score"})
    before = rows[
        (rows.panel == "") & rows.attack.eq("none") & rows.model.isin([*VARIANTS, "original"])
    ]
    kept, of_run = (
        {},
        before.drop_duplicates(["folder", "run"]).set_index(["folder", "run"])[["method", "model"]],
    )
    for (method, model, group), part in before[before.group != "forget"].groupby(
        ["method", "model", "group"], sort=False
    ):
        value, low, high = (100 * x for x in mean_interval(part))
        line = kept.setdefault(
            (display_name(method) if method else "original", model),
            {"trainings": part.training.nunique()},
        )
        line[f"{group} kept"] = f"{value:.1f} ({low:.0f}–{high:.0f})"
    measured = [
        (of_run.loc[folder, run], found[run])
        for folder, places in numbers.items()
        for found in (place["numbers"] for place in places.values())
        for run in found
        if (folder, run) in of_run.index
    ]
    names = {"fid": "FID", "CLIP score": "CLIP score", "jfd": "JFD"}
    for (method, model), line in kept.items():
        mine = [
            found
            for who, found in measured
            if (display_name(who.method) if who.method else "original", who.model)
            == (method, model)
        ]
        for name, column in names.items():
            values = [found[name] for found in mine if name in found]
            low, high = (
                np.clip(student_interval(values)[1:], 0, None) if len(set(values)) > 1 else (0, 0)
            )
            line |= (
                {column: f"{np.mean(values):.2f}" + (f" ({low:.2f}–{high:.2f})" if high else "")}
                if values
                else {}
            )
    ours = pd.DataFrame(
        [
            dict(zip(keys, key, strict=False))
            | line
            | {"source": f"ours, {line['trainings']} training{'s' * (line['trainings'] > 1)}"}
            for key, line in kept.items()
        ]
    )
    table = sort_like_paper(
        pd.concat([theirs, ours.drop(columns="trainings", errors="ignore")], ignore_index=True)
    )
    columns = [*keys, "source", *names.values(), "related kept", "unrelated kept"]

    def text(value):
        return "" if pd.isna(value) else value if isinstance(value, str) else f"{value:.2f}"

    table = table.reindex(columns=columns)
    return table.assign(**{column: table[column].map(text) for column in columns[3:]})


def search_table(rows, searches=("random", SEARCH)):
    """Share of the concept's pictures that each search for words brings back at its end, with 95 % intervals: method, variant, search, score, low, high, trainings, pictures."""
    part = concept_rows(rows)
    part, found = part[part.attack.isin(searches)], []
    for (method, model, search), one in part.groupby(["method", "model", "attack"], sort=False):
        one = one[one.step == one.step.max()]
        found.append(
            (
                display_name(method),
                model,
                search,
                *mean_interval(one),
                one.training.nunique(),
                len(one),
            )
        )
    table = pd.DataFrame(
        found,
        columns=["method", "variant", "search", "score", "low", "high", "trainings", "pictures"],
    )
    return sort_like_paper(table)


def destruction_table(rows):
    """Self-destruct index of every method under HRM-s and HRM-m (`mu.measures.comparison.self_destruction`, CLEAN taken off; shares, −1…1): method, variant, attack, after, lost to the attack, lost to CLEAN, index, low, high."""
    part = rows[(rows.panel == "") & rows.model.isin(VARIANTS)]
    found = []
    for method, one in part.groupby("method", sort=False):
        attacked, clean = (
            one[one.attack.isin(["HRM-s", "HRM-m"])].assign(name=lambda t: t.attack),
            one[one.attack == "CLEAN"],
        )
        if len(clean):
            found.append(self_destruction(attacked, clean).assign(method=display_name(method)))
    table = (
        pd.concat(found, ignore_index=True).rename(columns={"model": "variant"})
        if found
        else pd.DataFrame(columns=["method", "variant", "attack"])
    )
    first = ["method", "variant", "attack"]
    return sort_like_paper(table[[*first, *(c for c in table if c not in first)]])


def panel_table(rows):
    """Scores of the panels, percent with 95 % intervals: a line a panel, variant and group, columns before, and after the last step of the attack."""
    found = []
    part = rows[
        rows.panel.ne("") & rows.model.isin(VARIANTS) & rows.attack.eq("HRM-m") & rows.hit.notna()
    ]
    for (panel_, model, group), one in part.groupby(["panel", "model", "group"], sort=False):
        line = {"panel": panel_, "variant": model, "group": group}
        for words, step in (
            ("before", one.step.min()),
            (f"after {one.step.max():g} steps", one.step.max()),
        ):
            value, low, high = (100 * x for x in mean_interval(one[one.step == step]))
            line[words] = f"{value:.0f} ({low:.0f}–{high:.0f})"
        found.append(line)
    return pd.DataFrame(found)
