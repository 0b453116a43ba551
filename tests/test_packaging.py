"""What is promised about installing holds together."""

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from mu.book import overview
from mu.marks import protection
from mu.results import read_results
from mu.runs import read_json

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], *PROJECT["optional-dependencies"]["recipe"], *PROJECT["optional-dependencies"]["gpu"]]
MEASURES = [*PROJECT["optional-dependencies"]["measures"], *PROJECT["optional-dependencies"]["nudenet"]]


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
    assert Requirement(next(line for line in REQUIRED if line.startswith("torch"))).specifier.contains(pinned[1])
    assert pinned.start() < makefile.index('-e ".[dev,recipe,gpu,nudenet]"')


def test_what_the_measures_need_is_named_and_asked_for_only_when_used():
    """Each package that `extra` asks for is one of the two extras, the Makefile's pins lie in their ranges, and `mu` imports none of them by itself."""
    ranges = {Requirement(line).name: Requirement(line).specifier for line in MEASURES}
    assert all({s.operator for s in specifier} == {">=", "<"} for specifier in ranges.values())
    asked = [re.findall(r'extra\("(\w+)", "([\w-]+)"', file.read_text()) for file in (ROOT / "mu").glob("*.py")]
    assert {package for pairs in asked for _, package in pairs} == set(ranges)
    pins = re.search(r"--target .venv/measures (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert all(ranges[name].contains(pin) for name, pin in (p.split("==") for p in pins) if name != "torchvision") and "torchvision==0.28.0" in pins
    assert ranges["nudenet"].contains(version("nudenet"))


def test_the_table_of_notebooks_is_theirs():
    text = (ROOT / "README.md").read_text()
    assert text.split("<!-- notebooks -->\n")[1].split("<!-- /notebooks -->")[0] == overview(ROOT / "notebooks")


def test_the_figures_of_the_readme_are_those_of_the_committed_report():
    report, text = ROOT / "reports" / "pocket", (ROOT / "README.md").read_text()
    figures, marks = (text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0] for name in ("pocket", "pocket-marks"))
    assert marks == (report / "tables" / "marks.md").read_text() and (report / "figures" / "headline.png").is_file()
    table = pd.read_csv(report / "tables" / "attacks.csv").query("method == 'esd-f-1' and attack == 'HRM-m' and lr == 6e-5 and step in (50, 100, 200, 300)")
    for model, group in product(("unlearned", "meta-unlearned"), ("forget", "related")):
        course = ", ".join(f"{score:.0%}" for score in table[(table.model == model) & (table.group == group)].sort_values("step").score)
        assert course.count("%") == 4 and course in figures, f"{model}, {group}: {course} is not what the README says"


def test_the_answers_of_the_readme_are_those_of_the_ablations():
    said = (ROOT / "README.md").read_text().split("<!-- pocket-ablations -->\n")[1].split("<!-- /pocket-ablations -->")[0].splitlines()
    known = {f"- {entry['question']} {entry['answer']}" for entry in read_json(ROOT / "reports" / "pocket" / "ablations" / "answers.json")}
    assert len(said) == 2 and set(said) <= known


def test_what_the_readme_says_of_self_destruction_is_in_the_rows():
    text, rows = (ROOT / "README.md").read_text(), read_results(ROOT / "reports" / "pocket" / "raw").rows
    mine = rows[rows.panel.eq("") & rows.method.eq("esd-f-1") & rows.model.eq("meta-unlearned") & rows.attack.eq("HRM-m") & np.isclose(rows.lr, 6e-5)]
    score = 100 * mine.groupby(["group", "training", "step"]).hit.mean().unstack("step")
    said = re.search(r"have lost (\d+), (\d+) and (\d+) points of their related.*?in one training up to (\d+) points", text, re.S).groups()
    lost = score.loc["related"][0] - score.loc["related"][200]
    harm = (score.loc["unrelated"][0] - score.loc["unrelated"].min(axis=1)).max()
    assert [f"{x:.0f}" for x in [*lost, harm]] == list(said)


def test_what_the_readme_says_of_controls_rates_and_a_single_prompt_is_in_the_table():
    text = " ".join((ROOT / "README.md").read_text().split())
    table = pd.read_csv(ROOT / "reports" / "pocket" / "tables" / "attacks.csv").query("group == 'forget'")
    score = table.set_index(["method", "attack", "lr", "model", "step"]).score
    at = lambda model, lr, step: f"{score['esd-f-1', 'HRM-m', lr, model, step]:.0%}"
    ascents = ("ascent only, weak", "ascent only", "ascent only, strong")
    usual = re.search(r"is recognised in (\d+%), where it is (\d+%) after the usual 72 steps; after 300 steps it is (\d+%) against (\d+%)\. .*?leaves (\d+%), (\d+%) and (\d+%) after 200 steps, "
                      r"meta-unlearning (\d+%)\.", text).groups()
    assert list(usual) == [*(at(model, 6e-5, n) for n in (200, 300) for model in ("unlearned, longer", "unlearned")), *(at(model, 6e-5, 200) for model in (*ascents, "meta-unlearned"))]
    fast = re.search(r"brings (\d+%) back in 200 steps, against (\d+%) from plain unlearning and (\d+%), (\d+%) and (\d+%) from ascent alone; one who trains three times as slowly, (\d+%) in 800", text).groups()
    assert list(fast) == [*(at(model, 1.8e-4, 200) for model in ("meta-unlearned", "unlearned", *ascents)), at("meta-unlearned", 2e-5, 800)]
    rows = read_results(ROOT / "reports" / "pocket" / "raw").rows
    attacked = rows[rows.panel.eq("") & rows.method.eq("esd-f-1") & rows.attack.eq("HRM-m")]
    usual_lr = attacked[np.isclose(attacked.lr, 6e-5) & attacked.group.eq("related")].groupby(["model", "step"]).hit.mean().unstack("step")
    lost = 100 * usual_lr.rsub(usual_lr[0], axis=0).max(axis=1)
    assert lost[["unlearned, longer", *ascents]].max() <= int(re.search(r"None of these controls loses more than (\d+) points", text)[1])
    said = re.search(r"draws (\d+) points fewer .*? would be (\d+) points instead of (\d+), and (\d+) at the highest learning rate instead of (\d+)\.", text).groups()
    found = [100 * (usual_lr[0]["meta-unlearned"] - usual_lr[0]["ascent only, strong"])]
    for lr in (6e-5, 1.8e-4):
        missing = 100 * protection(attacked[np.isclose(attacked.lr, lr)])[0].groupby("model").mean()
        found += [missing["meta-unlearned"] - missing["ascent only, strong"], missing["meta-unlearned"] - missing[["ascent only, weak", "ascent only"]].max()]
    assert [f"{x:.0f}" for x in found] == list(said)
    single = score.xs("HRM-s", level="attack").xs(6e-5, level="lr").unstack("model")
    fewer = (single["meta-unlearned"] < single["unlearned"]).unstack("step")
    said = re.search(r"after 50 steps less for (\d) of (\d) methods\), but after 300 steps as much or more is back for (\d) of (\d)", text).groups()
    assert [int(n) for n in said] == [fewer[50].sum(), len(fewer), (~fewer[300]).sum(), len(fewer)]


@pytest.mark.parametrize("name", ["attacks-pocket", "attacks-pocket-sdxl"])
def test_the_readme_names_the_strongest_attack_as_its_table_does(name):
    text = (ROOT / "README.md").read_text().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
    mine = pd.read_csv(ROOT / "reports" / name / "tables" / "attacks.csv").query("model == 'meta-unlearned'").sort_values("peak", ascending=False)
    lost, top = mine[mine.peak > 0.5], mine.iloc[0]
    assert text.splitlines()[2].startswith(f"Meta-unlearning fails against {len(lost)} of {len(mine)} attacks") and f"95 % interval {top.low:.0%} to {top.high:.0%}" in text
    assert all(f"{row.attack} ({row.peak:.0%} after {row.step} steps)" in text for row in lost.itertuples())


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "set -e" in script.read_text() and "make test" in script.read_text()


def test_mu_imports_only_what_it_declares():
    """Also that no module is forgotten when `mu` is installed: the package is flat."""
    declared = {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in REQUIRED}
    of_module = packages_distributions()
    for file in (ROOT / "mu").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"mu", "resvg_py"}:
                assert declared & {re.sub(r"[-_.]+", "-", d).lower() for d in of_module[top]}, f"{file.name} imports {top}, which pyproject.toml does not name"
    assert not [p for p in (ROOT / "mu").iterdir() if p.is_dir() and p.name != "__pycache__"]
