"""The committed report of the pocket model is what its committed rows give."""

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
from mu.notebooks.setup import setup
from mu.reports import figures, tables
from mu.reports.collect import deduplicate, read_results
from mu.reports.page import save_table
from mu.reports.plots import save_figure

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "reports" / "pocket"
SEEDS = read_json(REPORT / "raw" / "trainings.json")


@pytest.fixture(scope="module")
def results():
    return read_results(REPORT / "raw", SEEDS)


@pytest.fixture(scope="module")
def at_lr(results):
    """Rows of the tables: at the main learning rate of the attack."""
    rows = deduplicate(results)
    rows = rows[rows.panel == ""]
    fine_tuned = rows.attack.isin(["HRM-s", "HRM-m", "CLEAN"])
    return rows[rows.lr.isna() | np.isclose(rows.lr, 6e-5) | ~fine_tuned]


@pytest.mark.parametrize(
    "method, variant, steps, seeds",
    [
        ("esd-f-1", "unlearned", 100, "345"),
        ("esd-f-1", "meta-unlearned", 100, "345"),
        ("uce", "meta-unlearned", 300, "3"),
        ("rece", "meta-unlearned", 300, "012"),
        ("rece", "unlearned", 300, "0"),  # a closed form has no seed
    ],
)
def test_a_cell_is_the_share_of_its_images(results, method, variant, steps, seeds):
    """By hand, without the code that makes the table."""
    facts = ("", method, variant, "HRM-m", steps, "forget")
    names = ["panel", "method", "model", "attack", "step", "group", "lr", "folder", "hit"]
    hits = [
        hit
        for *own, lr, folder, hit in results.rows[names].itertuples(index=False)
        if tuple(own) == facts and abs(lr - 6e-5) < 1e-9 and folder in seeds
    ]
    table = pd.read_csv(REPORT / "tables" / "concept.csv")
    table = table.set_index(["method", "variant", "attack", "steps"])
    cell = table.loc[(tables.display_name(method), variant, "HRM-m", steps)]
    assert cell.ours == pytest.approx(100 * sum(hits) / len(hits), abs=0.01)
    assert cell.pictures == len(hits)
    assert cell.low <= cell.ours <= cell.high


def test_the_concept_table_is_reproduced(at_lr, tmp_path):
    published = pd.read_csv(ROOT / "data" / "paper_nudity.csv")
    table = save_table(tables.concept_table(at_lr, published), tmp_path, "concept")
    again, committed = (
        pd.read_csv(folder / "tables" / "concept.csv") for folder in (tmp_path, REPORT)
    )
    pd.testing.assert_frame_equal(again, committed)
    assert table.published.notna().sum() == len(published)
    assert table.ours.notna().sum() > 80


def curves(svg):
    """Return the lines drawn in a matplotlib SVG, as arrays of points."""
    style = "fill: none; stroke: #(?:d55e00|0072b2)"
    paths = re.findall(rf'<path d="(M [^"]*)" clip-path="[^"]*" style="{style}', svg)
    return [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), float) for path in paths]


def test_the_relearning_figure_is_reproduced(at_lr, tmp_path):
    committed = (REPORT / "figures" / "relearning.svg").read_text()
    with matplotlib.rc_context():
        setup()  # the theme of the notebooks
        figure = figures.score_figure(at_lr, ["HRM-m", "HRM-s"])
        again = save_figure(figure, tmp_path, "relearning").read_text()
    plt.close("all")
    assert len(curves(committed)) >= 20
    for a, b in zip(curves(again), curves(committed), strict=True):
        # In points of 1/72 inch: the layout depends on the version of matplotlib.
        np.testing.assert_allclose(a, b, atol=0.5)
    if f"Matplotlib v{matplotlib.__version__}" in committed:
        assert again == committed


def test_the_page_shows_every_figure(results):
    page = (REPORT / "index.html").read_text()
    for name in ("headline", "relearning", "self-destruction", "gradients", "prompts"):
        assert f"figures/{name}.svg" in page
        for kind in ("svg", "png", "pdf"):
            assert (REPORT / "figures" / f"{name}.{kind}").stat().st_size
    assert all((REPORT / course["sheet"]).is_file() for course in results.courses)


def test_page_and_readme_open_with_the_scores_of_the_rows(results):
    page = (REPORT / "index.html").read_text()
    readme = (ROOT / "README.md").read_text()
    readme = readme.split("<!-- pocket -->")[1].split("<!-- /pocket -->")[0]
    rows = results.rows
    rows = rows[(rows.panel == "") & (rows.method == "esd-f-1") & (rows.attack == "HRM-m")]
    rows = rows[np.isclose(rows.lr, 6e-5) & (rows.group == "forget") & (rows.step > 0)]
    for model in ("unlearned", "meta-unlearned"):
        scores = rows[rows.model == model].groupby("step").hit.mean()
        text = ", ".join(f"{score:.0%}" for score in scores)
        for place in (page, readme):
            assert text in re.sub(r" \(\d+–\d+\)", "", place)


def test_the_whole_page_is_reproduced_from_the_rows(tmp_path, monkeypatch):
    """90_figures without any run gives the same tables, figures and text."""
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
            "seeds": " ".join(SEEDS),
        },
    )
    for file in sorted((REPORT / "tables").iterdir()):
        assert (report / "tables" / file.name).read_text() == file.read_text(), file.name
    assert {f.name for f in (report / "figures").iterdir()} == {
        f.name for f in (REPORT / "figures").iterdir()
    }

    def content(page):
        return page.read_text().split('<h2 id="notebooks">')[0].split("<footer>")[0]

    assert content(report / "index.html") == content(REPORT / "index.html")
