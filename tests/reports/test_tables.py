"""The committed page of `make paper MODEL=pocket` is what its committed rows say: a cell, a table and a figure are made again from them, and compared."""

import os
import re
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mu.files import read_json
from mu.notebooks.run import execute
from mu.reports import figures
from mu.reports import tables as paper
from mu.reports.collect import deduplicate, read_results
from mu.reports.page import save_table
from mu.reports.plots import save_figure

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "reports" / "pocket"


@pytest.fixture(scope="module")
def results():
    return read_results(REPORT / "raw", read_json(REPORT / "raw" / "trainings.json"))


@pytest.fixture(scope="module")
def at_lr(results):
    rows = deduplicate(results)
    main = rows[rows.panel == ""]
    return main[
        main.lr.isna() | np.isclose(main.lr, 6e-5) | ~main.attack.isin(["HRM-s", "HRM-m", "CLEAN"])
    ]


def test_a_cell_of_the_table_is_the_share_of_its_pictures(results):
    """By hand, without the code that made the table."""
    table = pd.read_csv(REPORT / "tables" / "concept.csv").set_index(
        ["method", "variant", "attack", "steps"]
    )
    rows = results.rows
    for method, variant, steps, folders in (
        ("esd-f-1", "unlearned", 100, "012"),
        ("esd-f-1", "meta-unlearned", 100, "012"),
        ("uce", "meta-unlearned", 300, "012"),
        ("uce", "unlearned", 300, "0"),
    ):  # the last has no seed
        hits = [
            hit
            for folder, panel, m, v, attack, lr, step, group, hit in zip(
                *(
                    rows[c]
                    for c in (
                        "folder",
                        "panel",
                        "method",
                        "model",
                        "attack",
                        "lr",
                        "step",
                        "group",
                        "hit",
                    )
                ),
                strict=False,
            )
            if (panel, m, v, attack, step, group) == ("", method, variant, "HRM-m", steps, "forget")
            and abs(lr - 6e-5) < 1e-9
            and folder in folders
        ]
        cell = table.loc[(paper.display_name(method), variant, "HRM-m", steps)]
        assert (
            cell.ours == pytest.approx(100 * sum(hits) / len(hits), abs=0.01)
            and cell.pictures == len(hits)
            and cell.low <= cell.ours <= cell.high
        )


def test_the_table_of_the_concept_is_made_again(at_lr, tmp_path):
    again = save_table(
        paper.concept_table(at_lr, pd.read_csv(ROOT / "data" / "paper_nudity.csv")),
        tmp_path,
        "concept",
    )
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "tables" / "concept.csv"),
        pd.read_csv(REPORT / "tables" / "concept.csv"),
    )
    published = again.dropna(subset=["published"])
    assert (
        len(published) == len(pd.read_csv(ROOT / "data" / "paper_nudity.csv"))
        and again.ours.notna().sum() > 80
    )


def curves(svg):
    """The drawn lines of a matplotlib SVG: arrays of points."""
    paths = re.findall(
        r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: none; stroke: #(?:d55e00|0072b2)', svg
    )
    return [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float) for path in paths]


def test_the_figure_of_relearning_is_drawn_again(at_lr, tmp_path):
    kept = (REPORT / "figures" / "relearning.svg").read_text()
    with matplotlib.rc_context():
        again = save_figure(
            figures.by_method(at_lr, ["HRM-m", "HRM-s"]), tmp_path, "relearning"
        ).read_text()
    plt.close("all")
    mine, theirs = curves(again), curves(kept)
    assert len(mine) == len(theirs) >= 20
    for a, b in zip(mine, theirs, strict=False):
        np.testing.assert_allclose(
            a, b, atol=0.5
        )  # points of 1/72 inch: another version of matplotlib sets its labels a little otherwise
    if f"Matplotlib v{matplotlib.__version__}" in kept:
        assert again == kept


def test_the_page_shows_every_figure_and_the_opening_is_what_the_rows_say(results):
    page = (REPORT / "index.html").read_text()
    for name in ("headline", "relearning", "self-destruction", "gradients", "prompts"):
        assert f"figures/{name}.svg" in page and all(
            (REPORT / "figures" / f"{name}.{kind}").stat().st_size for kind in ("svg", "png", "pdf")
        )
    rows = results.rows
    mine = rows[
        (rows.panel == "")
        & (rows.method == "esd-f-1")
        & (rows.attack == "HRM-m")
        & np.isclose(rows.lr, 6e-5)
        & (rows.group == "forget")
        & (rows.step > 0)
    ]
    readme = (
        (ROOT / "README.md").read_text().split("<!-- pocket -->")[1].split("<!-- /pocket -->")[0]
    )
    for model in ("unlearned", "meta-unlearned"):
        course = ", ".join(f"{x:.0%}" for x in mine[mine.model == model].groupby("step").hit.mean())
        assert all(course in re.sub(r" \(\d+–\d+\)", "", text) for text in (page, readme))
    assert all((REPORT / course["sheet"]).is_file() for course in results.courses)


def test_the_whole_page_is_made_again_from_the_rows_alone(tmp_path, monkeypatch):
    """90_figures without any run: the same tables, the same figures, and pages of the same words."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    report = tmp_path / "pocket"
    for part in ("raw", "explorer", "ablations"):
        if (REPORT / part).is_dir():
            shutil.copytree(REPORT / part, report / part)
    execute(
        ROOT / "notebooks" / "90_figures.ipynb",
        report / "notebooks" / "90_figures.ipynb",
        {
            "out": "",
            "report": str(report),
            "published": str(ROOT / "data"),
            "seeds": " ".join(read_json(REPORT / "raw" / "trainings.json")),
        },
    )
    for file in sorted((REPORT / "tables").iterdir()):
        assert (report / "tables" / file.name).read_text() == file.read_text(), file.name
    assert {f.name for f in (report / "figures").iterdir()} == {
        f.name for f in (REPORT / "figures").iterdir()
    }

    def shown(page):
        return page.read_text().split('<h2 id="notebooks">')[0].split("<footer>")[0]

    assert shown(report / "index.html") == shown(REPORT / "index.html"), (
        "words, captions, tables, and what the slider is told"
    )
