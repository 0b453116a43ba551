"""The README and the committed pages agree with the notebooks and the committed tables."""

import re
from itertools import product
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from mu.files import read_json
from mu.notebooks.book import overview
from mu.reports.caveats import caveats
from mu.reports.collect import deduplicate, read_results

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "reports" / "pocket"
PAGES = [p for p in sorted((ROOT / "reports").glob("*/index.html")) if p.parent.name != "demo"]
ESTIMATES = {
    "concept": "ours",
    "prompts": "score",
    "before": "score",
    "attacks": "score",
    "self-destruction": "self-destruct index",
    "gradients": "change",
}
WITHOUT_INTERVALS = [
    "concept-as-published",
    "effect",
    "quality",
    "targets",
    "revival",
    "panels",
    "trainings",
]


def block(name):
    """Return the generated block of the README with this name."""
    text = (ROOT / "README.md").read_text()
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def test_the_table_of_notebooks_is_current():
    assert block("notebooks") == overview(ROOT / "notebooks")


@pytest.mark.parametrize("name", ["targets", "effect"])
def test_the_targets_are_those_of_the_committed_report(name):
    assert block(f"pocket-{name}") == (POCKET / "tables" / f"{name}.md").read_text()
    assert (POCKET / "figures" / "headline.png").is_file()


@pytest.mark.parametrize(
    "model, group", [*product(("unlearned", "meta-unlearned"), ("forget", "related"))]
)
def test_the_scores_are_those_of_the_committed_report(model, group):
    query = "method == 'esd-f-1' and attack == 'HRM-m' and lr == 6e-5 and model == @model"
    table = pd.read_csv(POCKET / "tables" / "attacks.csv").query(query)
    rows = table[(table.group == group) & table.step.isin([50, 100, 200, 300])]
    rows = rows.sort_values("step")
    scores = ", ".join(f"{score:.0%}" for score in rows.score)
    assert scores.count("%") == 4
    assert scores in re.sub(r" \(\d+–\d+\)", "", block("pocket"))
    for row in rows.itertuples():
        assert f"({100 * row.low:.0f}–{100 * row.high:.0f})" in block("pocket")


def test_the_answers_are_those_of_the_ablations():
    lines = block("pocket-ablations").splitlines()
    entries = read_json(POCKET / "ablations" / "answers.json")
    known = {f"- {entry['question']} {entry['answer']}" for entry in entries}
    assert len(lines) == 2
    assert set(lines) <= known


def test_the_caveats_agree_with_the_rows():
    lines = block("pocket-caveats").splitlines()
    results = read_results(POCKET / "raw", read_json(POCKET / "raw" / "trainings.json"))
    expected = caveats(deduplicate(results), results.first_cards, "esd-f-1", 6e-5)
    assert lines == [f"- {sentence}" for sentence in expected]
    assert len(lines) > 5

    # The loss of related concepts, computed independently.
    rows = results.rows
    rows = rows[rows.panel.eq("") & rows.method.eq("esd-f-1") & rows.model.eq("meta-unlearned")]
    rows = rows[rows.attack.eq("HRM-m") & np.isclose(rows.lr, 6e-5) & rows.group.eq("related")]
    score = 100 * rows.groupby(["training", "step"]).hit.mean().unstack("step")
    losses = ", ".join(f"{lost:.0f}" for lost in score[0] - score[200])
    sentence = r"after 200 steps of the attack they have lost (.*?) points"
    assert losses in re.search(sentence, "\n".join(lines))[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_links_of_a_committed_page_have_targets(page):
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', page.read_text())
    assert len(links) >= 4
    assert not [link for link in links if not (page.parent / unquote(link)).exists()]
    if page.parent.name == "pocket":
        assert "notebooks/90_figures.html" in links
        assert "ablations/notebooks/40_ablations.html" in links


@pytest.mark.parametrize(
    "file",
    sorted(POCKET.glob("**/tables/*.csv")),
    ids=lambda p: f"{p.parent.parent.name}-{p.stem}",
)
def test_intervals_of_the_committed_tables_contain_their_estimate(file):
    table = pd.read_csv(file)
    names = [name for name in table if f"{name}, low" in table]
    columns = [[name, f"{name}, low", f"{name}, high"] for name in names]
    if "low" in table:
        columns.append([ESTIMATES[file.stem], "low", "high"])
    assert columns or file.stem in WITHOUT_INTERVALS
    for names in columns:
        value, low, high = table[names].dropna().to_numpy().T
        assert (low <= value + 1e-3).all(), names
        assert (value <= high + 1e-3).all(), names


@pytest.mark.parametrize("name", ["attacks-pocket", "attacks-pocket-sdxl"])
def test_the_strongest_attack_is_that_of_the_table(name):
    table = pd.read_csv(ROOT / "reports" / name / "tables" / "attacks.csv")
    table = table[table.model == "meta-unlearned"].sort_values("peak", ascending=False)
    relearned, top = table[table.peak > 0.5], table.iloc[0]
    start = f"Meta-unlearning fails against {len(relearned)} of {len(table)} attacks"
    assert block(name).splitlines()[2].startswith(start)
    assert f"95 % interval {top.low:.0%} to {top.high:.0%}" in block(name)
    for row in relearned.itertuples():
        assert f"{row.attack} ({row.peak:.0%} after {row.step} steps)" in block(name)
