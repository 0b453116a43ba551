"""What is promised about installing holds together."""

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from itertools import product
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from mu.files import read_json
from mu.notebooks.book import overview
from mu.reports.caveats import caveats
from mu.reports.collect import deduplicate, read_results

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["dev"],
    *PROJECT["optional-dependencies"]["recipe"],
    *PROJECT["optional-dependencies"]["gpu"],
]
MEASURES = [
    *PROJECT["optional-dependencies"]["measures"],
    *PROJECT["optional-dependencies"]["nudenet"],
]


def test_environment_and_pyproject_name_the_same_ranges():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert sorted(pip["pip"]) == sorted([*REQUIRED, "-e ."])
    assert conda == ["python" + PROJECT["requires-python"], "pip"]


@pytest.mark.parametrize("line", REQUIRED)
def test_ranges_are_closed_and_hold_what_is_installed(line):
    requirement = Requirement(line)
    assert {s.operator for s in requirement.specifier} == {">=", "<"}
    if requirement.name not in ("resvg-py",):  # an extra
        assert requirement.specifier.contains(version(requirement.name)), version(requirement.name)


def test_makefile_installs_a_torch_of_the_range_first():
    makefile = (ROOT / "Makefile").read_text()
    pinned = re.search(r"torch==(\S+)", makefile)
    assert Requirement(
        next(line for line in REQUIRED if line.startswith("torch"))
    ).specifier.contains(pinned[1])
    assert pinned.start() < makefile.index('-e ".[dev,recipe,gpu,nudenet]"')


def test_what_the_measures_need_is_named_and_asked_for_only_when_used():
    """Each package that `extra` asks for is one of the two extras, the Makefile's pins lie in their ranges, and `mu` imports none of them by itself."""
    ranges = {Requirement(line).name: Requirement(line).specifier for line in MEASURES}
    assert all({s.operator for s in specifier} == {">=", "<"} for specifier in ranges.values())
    asked = [
        re.findall(r'extra\("(\w+)", "([\w-]+)"', file.read_text())
        for file in (ROOT / "mu").glob("*.py")
    ]
    assert {package for pairs in asked for _, package in pairs} == set(ranges)
    pins = re.search(r"--target .venv/measures (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert (
        all(
            ranges[name].contains(pin)
            for name, pin in (p.split("==") for p in pins)
            if name != "torchvision"
        )
        and "torchvision==0.28.0" in pins
    )
    assert ranges["nudenet"].contains(version("nudenet"))


def test_the_table_of_notebooks_is_theirs():
    text = (ROOT / "README.md").read_text()
    assert text.split("<!-- notebooks -->\n")[1].split("<!-- /notebooks -->")[0] == overview(
        ROOT / "notebooks"
    )


def test_the_figures_of_the_readme_are_those_of_the_committed_report():
    report, text = ROOT / "reports" / "pocket", (ROOT / "README.md").read_text()
    figures, targets = (
        text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
        for name in ("pocket", "pocket-targets")
    )
    assert (
        targets == (report / "tables" / "targets.md").read_text()
        and (report / "figures" / "headline.png").is_file()
    )
    table = pd.read_csv(report / "tables" / "attacks.csv").query(
        "method == 'esd-f-1' and attack == 'HRM-m' and lr == 6e-5 and step in (50, 100, 200, 300)"
    )
    for model, group in product(("unlearned", "meta-unlearned"), ("forget", "related")):
        part = table[(table.model == model) & (table.group == group)].sort_values("step")
        course = ", ".join(f"{score:.0%}" for score in part.score)
        assert (
            course.count("%") == 4
            and course in re.sub(r" \(\d+–\d+\)", "", figures)
            and all(
                f"({100 * row.low:.0f}–{100 * row.high:.0f})" in figures
                for row in part.itertuples()
            )
        ), f"{model}, {group}: {course} is not what the README says"


def test_the_answers_of_the_readme_are_those_of_the_ablations():
    said = (
        (ROOT / "README.md")
        .read_text()
        .split("<!-- pocket-ablations -->\n")[1]
        .split("<!-- /pocket-ablations -->")[0]
        .splitlines()
    )
    known = {
        f"- {entry['question']} {entry['answer']}"
        for entry in read_json(ROOT / "reports" / "pocket" / "ablations" / "answers.json")
    }
    assert len(said) == 2 and set(said) <= known


def test_what_the_readme_says_too_kindly_is_what_the_rows_say():
    report = ROOT / "reports" / "pocket"
    found = read_results(report / "raw", read_json(report / "raw" / "trainings.json"))
    said = (
        (ROOT / "README.md")
        .read_text()
        .split("<!-- pocket-caveats -->\n")[1]
        .split("<!-- /pocket-caveats -->")[0]
        .splitlines()
    )
    assert (
        said
        == [
            f"- {sentence}"
            for sentence in caveats(
                deduplicate(found), next(iter(found.cards.values())), "esd-f-1", 6e-5
            )
        ]
        and len(said) > 5
    )
    rows = found.rows  # and, by hand, the one that says most
    mine = rows[
        rows.panel.eq("")
        & rows.method.eq("esd-f-1")
        & rows.model.eq("meta-unlearned")
        & rows.attack.eq("HRM-m")
        & np.isclose(rows.lr, 6e-5)
        & rows.group.eq("related")
    ]
    score = 100 * mine.groupby(["training", "step"]).hit.mean().unstack("step")
    assert (
        ", ".join(f"{lost:.0f}" for lost in score[0] - score[200])
        in re.search(r"after 200 steps of the attack they have lost (.*?) points", "\n".join(said))[
            1
        ]
    )


@pytest.mark.parametrize(
    "page",
    [p for p in sorted((ROOT / "reports").glob("*/index.html")) if p.parent.name != "demo"],
    ids=lambda p: p.parent.name,
)
def test_every_link_of_a_committed_page_leads_somewhere(page):
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', page.read_text())
    assert len(links) >= 4 and not [
        link for link in links if not (page.parent / unquote(link)).exists()
    ]
    if page.parent.name == "pocket":
        assert (
            "notebooks/90_figures.html" in links
            and "ablations/notebooks/40_ablations.html" in links
        )


@pytest.mark.parametrize(
    "table",
    sorted((ROOT / "reports" / "pocket").glob("**/tables/*.csv")),
    ids=lambda p: f"{p.parent.parent.name}-{p.stem}",
)
def test_every_interval_of_the_committed_tables_holds_its_number(table):
    read = pd.read_csv(table)
    of = {
        "concept": "ours",
        "prompts": "score",
        "before": "score",
        "attacks": "score",
        "self-destruction": "self-destruct index",
        "gradients": "change",
    }
    names = [
        (value, f"{value}, low", f"{value}, high") for value in read if f"{value}, low" in read
    ] + ([(of[table.stem], "low", "high")] if "low" in read else [])
    assert names or table.stem in (
        "concept-as-published",
        "quality",
        "targets",
        "revival",
        "panels",
        "trainings",
    )
    for value, low, high in names:
        known = read[[value, low, high]].dropna()
        assert (known[low] <= known[value] + 1e-3).all() and (
            known[value] <= known[high] + 1e-3
        ).all(), (table, value)


@pytest.mark.parametrize("name", ["attacks-pocket", "attacks-pocket-sdxl"])
def test_the_readme_names_the_strongest_attack_as_its_table_does(name):
    text = (
        (ROOT / "README.md")
        .read_text()
        .split(f"<!-- {name} -->\n")[1]
        .split(f"<!-- /{name} -->")[0]
    )
    mine = (
        pd.read_csv(ROOT / "reports" / name / "tables" / "attacks.csv")
        .query("model == 'meta-unlearned'")
        .sort_values("peak", ascending=False)
    )
    lost, top = mine[mine.peak > 0.5], mine.iloc[0]
    assert (
        text.splitlines()[2].startswith(
            f"Meta-unlearning fails against {len(lost)} of {len(mine)} attacks"
        )
        and f"95 % interval {top.low:.0%} to {top.high:.0%}" in text
    )
    assert all(
        f"{row.attack} ({row.peak:.0%} after {row.step} steps)" in text for row in lost.itertuples()
    )


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert (
        os.access(script, os.X_OK)
        and "set -e" in script.read_text()
        and "make test" in script.read_text()
    )


def test_mu_imports_only_what_it_declares():
    """Also that no module is forgotten when `mu` is installed: the package is flat."""
    declared = {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in REQUIRED}
    of_module = packages_distributions()
    for file in (ROOT / "mu").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for top in (
                {name.split(".")[0] for name in names}
                - set(sys.stdlib_module_names)
                - {"mu", "resvg_py"}
            ):
                assert declared & {re.sub(r"[-_.]+", "-", d).lower() for d in of_module[top]}, (
                    f"{file.name} imports {top}, which pyproject.toml does not name"
                )
    assert not [p for p in (ROOT / "mu").iterdir() if p.is_dir() and p.name != "__pycache__"]
