"""Make targets and the machines that they choose."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakemake.cli import parse_args
from toys import ROOT

MACHINES = ROOT / "notebooks" / "machines"
VARIABLES = {"HF_HUB_OFFLINE", "CORES", "MODEL", "SEEDS", "MACHINE", "DRY"}
VARIABLES |= {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in VARIABLES}
INSTALLED = ["-o", ".venv/installed"]  # do not remake
EXTRAS = ["-o", ".venv/with-measures", "-o", ".venv/with-slurm"]
ECHO = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([*sys.argv, os.environ.get('HF_HUB_OFFLINE')]))
"""


def make(*arguments):
    """Run make without variables from outside; returns its output."""
    command = ["make", "-C", ROOT, "--no-print-directory", *INSTALLED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("machine, cores, gpus", [("laptop", 2, 1), ("gpus", None, 4)])
def test_a_machine_is_a_profile_of_snakemake(machine, cores, gpus):
    options = parse_args(["--profile", str(MACHINES / machine)])[1]
    assert options.cores == (cores or len(os.sched_getaffinity(0)))
    assert options.resources["gpu"].value == gpus
    assert options.executor is None


def test_slurm_is_a_machine():  # an extra: without its plugin Snakemake refuses the profile
    profile = yaml.safe_load((MACHINES / "slurm" / "config.yaml").read_text())
    assert profile["executor"] == "slurm"
    assert profile["jobs"]
    resources = {line.split("=")[0] for line in profile["default-resources"]}
    assert resources == {"runtime", "mem_mb"}


@pytest.fixture
def paper(tmp_path):
    """A function that runs `make paper` with programs that print their arguments.

    It returns program, arguments, HF_HUB_OFFLINE, and all further lines of output.
    """
    (tmp_path / "bin").mkdir()
    for name in ("snakemake", "python"):
        (tmp_path / "bin" / name).write_text(ECHO)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*variables, target="paper"):
        output = make(*EXTRAS, target, f"BIN={tmp_path}/bin", *variables)
        first, *rest = output.splitlines()
        program, *arguments, offline = json.loads(first)
        return program, arguments, offline, rest

    return run


def test_make_paper_starts_the_grid_of_the_pocket_model(paper):
    program, arguments, offline, rest = paper()
    assert program.endswith("snakemake")
    assert "--cores" not in arguments
    assert offline == "1"
    assert rest == [f"The report: file://{ROOT}/reports/pocket/index.html"]
    expected = {"--keep-going", "model=pocket", "seeds=11 12 13", "notebooks/machines/laptop"}
    expected |= {"notebooks/profiles/paper.yaml", "mtime", "params", "input"}
    assert expected <= set(arguments)


@pytest.mark.parametrize(
    "target, report",
    [("attacks", "attacks-pocket-sdxl"), ("ablations", "pocket-sdxl/ablations")],
)
def test_other_grids_name_their_report(paper, target, report):
    _, arguments, _, rest = paper("MODEL=pocket-sdxl", target=target)
    assert f"notebooks/profiles/{target}.yaml" in arguments
    assert "model=pocket-sdxl" in arguments
    assert rest == [f"The report: file://{ROOT}/reports/{report}/index.html"]


def test_make_methods_is_a_part_of_the_grid_of_make_paper(paper):
    _, arguments, _, rest = paper("SEEDS=11", target="methods")
    part = "25_compare_methods"
    assert part in arguments
    assert "notebooks/profiles/paper.yaml" in arguments
    assert rest == [f"The report: file://{ROOT}/reports/methods-pocket/index.html"]
    grid = yaml.safe_load((ROOT / "notebooks" / "profiles" / "paper.yaml").read_text())
    assert part in grid["experiment"]


def test_make_paper_passes_variables_as_literal_text(paper, tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    wild = f"""0 1 2"; touch {a}; '$(touch {b})`touch {c}`$(shell touch {d})"""
    variables = [f"SEEDS={wild}", "MODEL=sdxl", "MACHINE=gpus", "CORES=8"]
    _, arguments, offline, rest = paper(*variables)
    assert f"seeds={wild}" in arguments
    assert "model=sdxl" in arguments
    assert "notebooks/machines/gpus" in arguments
    assert arguments[arguments.index("--cores") + 1] == "8"
    assert offline is None
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]
    assert rest == [f"The report: file://{ROOT}/reports/sdxl/index.html"]


def test_a_large_model_has_one_seed(paper):
    assert "seeds=0" in paper("MODEL=sdxl")[1]


def test_a_dry_run_forecasts(paper):
    program, arguments, _, rest = paper("SEEDS=1 3", "DRY=1")
    assert program.endswith("python")
    assert arguments[:2] == ["-m", "mu.notebooks.forecast"]
    assert arguments[2].endswith("snakemake")
    assert "seeds=1 3" in arguments
    assert not rest


@pytest.mark.parametrize("has_uv", [True, False])
def test_uv_installs_where_it_is_there(tmp_path, has_uv):
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755 if has_uv else 0o644)
    paths = [path for path in os.environ["PATH"].split(":") if not (Path(path) / "uv").exists()]
    environment = ENVIRONMENT | {"PATH": ":".join([str(tmp_path), *paths])}
    command = ["make", "-C", ROOT, "-n", "-B", ".venv/installed"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.count("uv pip install -q") == (3 if has_uv else 0)
    assert done.stdout.count("python -m pip install") == (0 if has_uv else 3)
    assert done.stdout.count("-c constraints.txt") == 2


@pytest.mark.parametrize(
    "variables, installed",
    [
        (["MODEL=sd-v1-4"], [".[measures]"]),
        (["MODEL=sdxl", "MACHINE=slurm"], [".[measures]", ".[slurm]"]),
        (["MODEL=pocket"], []),
        (["MODEL=sdxl", "DRY=1"], []),
    ],
)
def test_large_models_and_clusters_get_their_extras(variables, installed):
    commands = make("-n", "paper", *variables)
    assert sorted(re.findall(r'pip install .* -e "([^"]*)"', commands)) == installed
