"""A grid as data: what its texts become, what it refuses, the paper's; and how Snakemake runs one, with toy notebooks."""

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from test_run_notebooks import write_notebook

from mu.notebooks.forecast import forecast
from mu.notebooks.gpus import one_gpu, visible
from mu.notebooks.grid import expand, read_experiment
from mu.notebooks.run import check_parameters, effective

ROOT = Path(__file__).parents[2]
FILES = {
    file.stem: yaml.safe_load(file.read_text())
    for file in sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
}
GRIDS = {name: grid for name, grid in FILES.items() if "models" in grid}
GRID = {
    "runs": "runs/{model}",
    "report": "reports/{model}",
    "models": {
        "small": {
            "sets": "data/cat",
            "methods": {"esd": {"meta": {"eta": 3.0, "steps": 9}}, "uce": None},
            "quiet": False,
        },
        "large": {"gpu": True, "methods": ["sdd"], "sets": "data/dog"},
    },
    "axes": {"method": "model.methods", "attack": ["hrm", "clean"]},
    "experiment": {
        "10_prepare": {"leaves": ["runs/{model}/{seed}"]},
        "20_{method}-{seed}": {
            "notebook": "20_unlearn",
            "after": ["10_prepare"],
            "gpu": True,
            "threads": 2,
            "parameters": [
                {"steps": 1, "sets": "{model.sets}"},
                "method.meta",
                {"name": "{method}", "seed": "{seed}", "out": "runs/{model}/{seed}"},
            ],
        },
        "30_{method}-{attack}": {
            "notebook": "30_attack",
            "after": ["20_{method}-{seed}"],
            "parameters": {
                "runs": "{method},{method}-meta",
                "models": "{method}-{seed}",
                "seeds": "{seed}",
            },
        },
        "90_figures": {"after": ["30_{method}-{attack}"]},
    },
}


def changed(**parts):
    grid = copy.deepcopy(GRID)
    for name, part in parts.items():
        grid[name].update(part)
    return grid


# --- what the texts become


def test_a_pattern_is_there_once_for_each_combination_and_its_texts_are_filled():
    experiment = expand(GRID, "small", "1 0")
    assert list(experiment) == [
        "10_prepare",
        *(f"20_{m}-{s}" for m in ("esd", "uce") for s in (0, 1)),
        *(f"30_{m}-{a}" for m in ("esd", "uce") for a in ("hrm", "clean")),
        "90_figures",
    ]
    assert (
        experiment["20_esd-1"]["notebook"] == "20_unlearn"
        and experiment["10_prepare"]["notebook"] == "10_prepare"
        and experiment["20_esd-1"]["threads"] == 2
    )
    assert experiment["20_uce-0"]["parameters"] == {
        "steps": 1,
        "sets": "data/cat",
        "name": "uce",
        "seed": 0,
        "out": "runs/small/0",
    }


def test_a_text_that_is_one_place_keeps_the_type_of_its_value():
    parameters = expand(
        changed(
            experiment={
                "10_prepare": {
                    "parameters": {"quiet": "{model.quiet}", "facts": "{model.methods.esd.meta}"}
                }
            }
        ),
        "small",
        0,
    )["10_prepare"]["parameters"]
    assert parameters == {"quiet": False, "facts": {"eta": 3.0, "steps": 9}}
    assert expand(GRID, "small", "4")["20_esd-4"]["parameters"]["seed"] == 4, "a number, no text"


def test_later_parameters_win_and_an_axis_that_says_nothing_adds_nothing():
    experiment = expand(GRID, "small", 0)
    assert (
        experiment["20_esd-0"]["parameters"]["steps"] == 9
        and experiment["20_esd-0"]["parameters"]["eta"] == 3.0
    )
    assert (
        "eta" not in experiment["20_uce-0"]["parameters"]
        and "eta" not in expand(GRID, "large", 0)["20_sdd-0"]["parameters"]
    )


def test_an_axis_that_is_not_chosen_stands_for_all_its_values():
    experiment = expand(GRID, "small", "0 1")
    assert experiment["30_esd-hrm"]["after"] == ["20_esd-0", "20_esd-1"] and experiment[
        "10_prepare"
    ]["leaves"] == ["runs/small/0", "runs/small/1"]
    assert experiment["90_figures"]["after"] == [
        "30_esd-hrm",
        "30_esd-clean",
        "30_uce-hrm",
        "30_uce-clean",
    ]
    assert experiment["30_esd-hrm"]["parameters"] == {
        "runs": "esd,esd-meta",
        "models": "esd-0,esd-1",
        "seeds": "0,1",
    }, "with commas"
    assert expand(GRID, "small", 7)["30_esd-hrm"]["parameters"]["seeds"] == "7", (
        "and a list of one is a text, too"
    )


@pytest.mark.parametrize("seeds", [0, "0", "1 0 1", "0,1", " 1, 0 "])
def test_seeds_are_numbers_with_spaces_or_commas(seeds):
    assert {name[-1] for name in expand(GRID, "small", seeds) if name.startswith("20_esd")} == set(
        str(seeds)
    ) & {"0", "1"}


def test_a_gpu_is_for_a_step_that_takes_one_of_a_model_that_needs_one():
    assert [step["gpu"] for step in expand(GRID, "small", 0).values()] == [0] * 8
    assert {name: step["gpu"] for name, step in expand(GRID, "large", 0).items()} == {
        "10_prepare": 0,
        "20_sdd-0": 1,
        "30_sdd-hrm": 0,
        "30_sdd-clean": 0,
        "90_figures": 0,
    }


def test_a_walk_that_is_written_out_stays_as_it_is():
    assert read_experiment(
        {"experiment": {"10_a": {"threads": 2}, "b": {"notebook": "20_b", "parameters": {"n": 1}}}}
    ) == (
        "pocket",
        {
            "10_a": {"notebook": "10_a", "parameters": {}, "threads": 2},
            "b": {"notebook": "20_b", "parameters": {"n": 1}},
        },
    )
    assert (
        read_experiment(GRID | {"model": "large", "seeds": "3"})[0] == "large"
        and "20_sdd-3" in read_experiment(GRID | {"model": "large", "seeds": "3"})[1]
    )


# --- what is refused, and with what words


@pytest.mark.parametrize(
    "grid, model, seeds, words",
    [
        (GRID, "lage", 0, "unknown model 'lage': allowed are small, large"),
        (GRID, "small", "", r'seeds must be whole numbers with spaces, as in "0 1 2"; got '),
        (GRID, "small", "0 one", "got '0 one'"),
        (GRID, "small", "-1", "got '-1'"),
        (GRID, "small", None, "got None"),
        (
            changed(experiment={"40_{colour}": {}}),
            "small",
            0,
            r"40_\{colour\}: there is no axis 'colour'; there are: model, seed, method, attack",
        ),
        (
            changed(experiment={"40_x": {"after": ["20_{colour}"]}}),
            "small",
            0,
            "40_x: there is no axis 'colour'",
        ),
        (
            changed(experiment={"40_x": {"parameters": {"runs": "{colour.name}"}}}),
            "small",
            0,
            "40_x: there is no axis 'colour'",
        ),
        (
            changed(experiment={"40_x": {"parameters": ["method.meta"]}}),
            "small",
            0,
            "method.meta: no value of 'method' is chosen here, only of model",
        ),
        (
            changed(experiment={"40_x": {"after": ["21_{method}"]}}),
            "small",
            0,
            "40_x waits for 21_esd, which is no step of this experiment",
        ),
    ],
)
def test_what_cannot_be_is_refused(grid, model, seeds, words):
    with pytest.raises(ValueError, match=words):
        expand(grid, model, seeds)


# --- those of the repository, the paper's among them


@pytest.mark.parametrize(
    "name, model", [(name, model) for name, grid in GRIDS.items() for model in grid["models"]]
)
def test_a_grid_fits_its_notebooks(name, model):
    """Parameters are known ones of the right type, everything waited for is there, and no two cells write into one place."""
    assert "pocket" in GRIDS["paper"]["models"]
    grid = GRIDS[name]
    _, experiment = read_experiment(grid | {"model": model, "seeds": "0 1 2"})
    written, left = [], []
    for name, step in experiment.items():
        notebook = ROOT / "notebooks" / f"{step['notebook']}.ipynb"
        check_parameters(notebook, step["parameters"])
        assert set(step) <= {
            "notebook",
            "after",
            "threads",
            "priority",
            "gpu",
            "runtime",
            "shows",
            "leaves",
            "parameters",
        } and set(step["after"]) <= set(experiment)
        assert all(
            file.startswith((grid["runs"].format(model=model), grid["report"].format(model=model)))
            and "{" not in file
            for file in step["leaves"]
        ), step["leaves"]
        left += step["leaves"]
        p = effective(notebook, changes=step["parameters"])
        place = {
            "20": ("", ["name"]),
            "21": ("", ["name"]),
            "30": ("attack", ["name"]),
            "31": ("attack/searches", ["name"]),
            "50": ("", ["place"]),
        }.get(name[:2])
        written += [(p["out"], place[0], *(p[part] for part in place[1]))] if place else []
        assert (
            not place
            or all(p[part] for part in place[1])
            and p["out"].startswith(grid["runs"].format(model=model))
        ), "a place of its own"

    def twice(places):
        return [place for place, n in Counter(places).items() if n > 1]

    assert not twice(left) and not twice(written), twice(left) + twice(written)
    for step in experiment.values():
        if step["notebook"] == "90_figures":
            main = {
                effective(
                    ROOT / "notebooks" / "30_attack_finetune.ipynb",
                    changes=experiment[other]["parameters"],
                )["lr"]
                for other in step["after"]
                if other.endswith(("-hrm-m-0", "-clean-0"))
            }
            assert main == {
                effective(ROOT / "notebooks" / "90_figures.ipynb", changes=step["parameters"])["lr"]
            }, "the page shows another learning rate than the attacks have"
    one, three = (
        Counter(
            step["notebook"]
            for step in read_experiment(grid | {"model": model, "seeds": seeds})[1].values()
        )
        for seeds in ("0", "0 1 2")
    )
    assert (
        all(three[kind] in (n, 3 * n) for kind, n in one.items())
        and three["21_meta_unlearn"] == 3 * one["21_meta_unlearn"]
    )


@pytest.mark.parametrize(
    "machine, cores, gpus", [("laptop", 2, 1), ("gpus", None, 4), ("slurm", None, None)]
)
def test_a_machine_is_a_profile_of_snakemake(machine, cores, gpus):
    said = yaml.safe_load((ROOT / "notebooks" / "machines" / machine / "config.yaml").read_text())
    if machine == "slurm":  # the plugin is an extra, without which Snakemake does not know the word
        assert (
            said["executor"] == "slurm"
            and said["jobs"]
            and {line.split("=")[0] for line in said["default-resources"]} == {"runtime", "mem_mb"}
        )
        return
    from snakemake.cli import parse_args

    asked = parse_args(["--profile", str(ROOT / "notebooks" / "machines" / machine)])[1]
    assert (
        asked.cores == (cores or len(os.sched_getaffinity(0)))
        and asked.resources["gpu"].value == gpus
        and asked.executor is None
    )


# --- a GPU for each


def test_each_takes_a_gpu_of_its_own_and_gives_it_back(tmp_path):
    with one_gpu(tmp_path, ["0", "MIG-1/0"]) as first:
        with one_gpu(tmp_path, ["0", "MIG-1/0"]) as second:
            assert (first, second) == ("0", "MIG-1/0")
            with (
                pytest.raises(
                    RuntimeError,
                    match=r"all GPUs \(0, MIG-1/0\) are taken by other notebooks.*gpu=2",
                ),
                one_gpu(tmp_path, ["0", "MIG-1/0"]),
            ):
                raise AssertionError("a third of two")
        with contextlib.suppress(KeyError), one_gpu(tmp_path, ["0", "MIG-1/0"]) as again:
            assert again == "MIG-1/0"
            raise KeyError("a notebook that failed")
        with one_gpu(tmp_path, ["0", "MIG-1/0"]) as again:
            assert again == "MIG-1/0"
    with one_gpu(tmp_path, ["0", "MIG-1/0"]) as again:
        assert again == "0"


def test_a_gpu_of_another_process_is_not_taken_and_is_free_when_that_is_killed(tmp_path):
    script = "import sys, time\nfrom mu.notebooks.gpus import one_gpu\nwith one_gpu(sys.argv[1], ['0', '1']) as name:\n    print(name, flush=True)\n    time.sleep(600)"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"0\n"
        with one_gpu(tmp_path, ["0", "1"]) as mine:
            assert mine == "1"
    finally:
        holder.kill()
        holder.wait()
    with one_gpu(tmp_path, ["0", "1"]) as mine:
        assert mine == "0"


def test_what_a_scheduler_has_given_is_what_there_is(monkeypatch):
    for said, names in (("3", ["3"]), ("GPU-ab, GPU-cd", ["GPU-ab", "GPU-cd"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert visible() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible() == ["0", "1"]


# --- Snakemake, with the Snakefile of the repository and toy notebooks


def toy(folder, grid, **notebooks):
    """A folder with a grid and its notebooks (name → code), and a command line of Snakemake for it."""
    shutil.copy(ROOT / "Snakefile", folder)
    for name, code in notebooks.items():
        write_notebook(
            folder / "notebooks" / f"{name}.ipynb",
            code,
            parameters='name: str = ""  # a word\nseed: int = 0  # a number',
        )
    shutil.copy(ROOT / "notebooks" / "run.py", folder / "notebooks")
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return [
        str(Path(sys.executable).parent / "snakemake"),
        "--cores",
        "2",
        "--nolock",
        "--rerun-incomplete",
        "--rerun-triggers",
        "mtime",
        "params",
        "input",
        "--quiet",
        "host",
        "progress",
        "reason",
        "rules",
        "--keep-going",
        "--configfile",
        "grid.yaml",
    ]


def run(folder, command, **environment):
    """(code, all that was said) of a command in a folder."""
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    return done.returncode, done.stdout + done.stderr


TOY = {
    "runs": "runs/{model}",
    "report": "reports/{model}",
    "axes": {"branch": ["good", "bad"]},
    "models": {"toy": None, "big": {"gpu": True}},
    "experiment": {
        "10_{branch}-{seed}": {
            "notebook": "10_a",
            "gpu": True,
            "leaves": ["runs/{model}/{branch}-{seed}"],
            "parameters": {"name": "runs/{model}/{branch}-{seed}", "seed": "{seed}"},
        }
    },
}
NEXT = {
    "20_{branch}-{seed}": {
        "notebook": "20_b",
        "after": ["10_{branch}-{seed}"],
        "parameters": {"name": "{branch}"},
    }
}


def tree(folder):
    return {
        file: file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file() and ".snakemake" not in file.parts
    }


def test_a_failed_cell_stops_its_branch_only_and_dry_runs_nothing(tmp_path, monkeypatch):
    code = "import os\nassert not name.endswith('bad-0'), 'asked to fail'\nos.makedirs(os.path.dirname(name), exist_ok=True)\nopen(name, 'w').write(str(seed))"
    command = toy(
        tmp_path,
        TOY | {"experiment": TOY["experiment"] | NEXT},
        **{"10_a": code, "20_b": "print(name)"},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def dry(seeds):
        return str(forecast([*command, "--config", "model=toy", f"seeds={seeds}"]))

    before = tree(tmp_path)
    code, said = run(
        tmp_path,
        [
            sys.executable,
            "-m",
            "mu.notebooks.forecast",
            *command,
            "--config",
            "model=toy",
            "seeds=0",
        ],
    )
    assert (
        code == 0
        and "4 notebooks, about 1 minutes on" in said
        and "with 2 at a time" in said
        and tree(tmp_path) == before
    ), said
    assert "8 notebooks" in dry("0 1") and tree(tmp_path) == before, "twice as many seeds"
    with pytest.raises(ValueError, match="seeds must be whole numbers.*got 'none'"):
        dry("none")

    code, said = run(tmp_path, [*command, "--config", "model=toy", "seeds=0"])
    made = {file.stem for file in (tmp_path / "reports/toy/notebooks").glob("*.html")}
    assert (
        code
        and made == {"10_good-0", "20_good-0"}
        and "AssertionError: asked to fail" in said
        and "as far as it came: reports/toy/notebooks/10_bad-0.unfinished.ipynb" in said
    ), said
    before = tree(tmp_path)
    assert "2 notebooks" in dry("0") and tree(tmp_path) == before, "only what is missing"


def test_notebooks_side_by_side_have_a_gpu_each(tmp_path):
    code = (
        "import os, pathlib, time\nplace = pathlib.Path(name)\nplace.parent.mkdir(parents=True, exist_ok=True)\nplace.write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "began = time.time()\nwhile len(list(place.parent.glob('*-0'))) < 2 and time.time() < began + 200: time.sleep(0.1)"
    )
    command = toy(tmp_path, TOY, **{"10_a": code})
    code, said = run(
        tmp_path,
        [*command, "--resources", "gpu=2", "--config", "model=big", "seeds=0"],
        CUDA_VISIBLE_DEVICES="7,9",
    )
    assert code == 0 and {file.read_text() for file in (tmp_path / "runs/big").glob("*-0")} == {
        "7",
        "9",
    }, said


# --- make paper


def test_make_paper_hands_over_words_as_they_are(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("snakemake", "python"):
        (tmp_path / "bin" / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([*sys.argv, os.environ.get('HF_HUB_OFFLINE')]))\n"
        )
        (tmp_path / "bin" / name).chmod(0o755)
    outside = {
        name: value
        for name, value in os.environ.items()
        if name
        not in (
            "HF_HUB_OFFLINE",
            "CORES",
            "MODEL",
            "SEEDS",
            "MACHINE",
            "DRY",
            "MAKEFLAGS",
            "MAKEOVERRIDES",
            "MAKELEVEL",
            "MFLAGS",
        )
    }

    def make(*words):
        done = subprocess.run(
            [
                "make",
                "-C",
                ROOT,
                "--no-print-directory",
                "-o",
                ".venv/installed",
                "-o",
                ".venv/with-measures",
                "-o",
                ".venv/with-slurm",
                "paper",
                f"BIN={tmp_path}/bin",
                *words,
            ],
            capture_output=True,
            text=True,
            env=outside,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[0]), done.stdout.splitlines()[1:]

    (program, *words, offline), rest = make()
    assert (
        program.endswith("snakemake")
        and "--cores" not in words
        and offline == "1"
        and rest == [f"The report: file://{ROOT}/reports/pocket/index.html"]
    )
    assert {
        "--keep-going",
        "model=pocket",
        "seeds=0 1 2",
        "notebooks/machines/laptop",
        "notebooks/profiles/paper.yaml",
        "mtime",
        "params",
        "input",
    } <= set(words)
    wild = f"""0 1 2"; touch {tmp_path}/a; '$(touch {tmp_path}/b)`touch {tmp_path}/c`$(shell touch {tmp_path}/d)"""
    (_, *words, offline), rest = make(f"SEEDS={wild}", "MODEL=sdxl", "MACHINE=gpus", "CORES=8")
    assert (
        f"seeds={wild}" in words
        and "model=sdxl" in words
        and "notebooks/machines/gpus" in words
        and words[words.index("--cores") + 1] == "8"
        and offline is None
    )
    assert [file.name for file in tmp_path.iterdir()] == ["bin"] and rest == [
        f"The report: file://{ROOT}/reports/sdxl/index.html"
    ]
    assert "seeds=0" in make("MODEL=sdxl")[0]
    (program, *words, _), rest = make("SEEDS=1 3", "DRY=1")
    assert (
        program.endswith("python")
        and words[:2] == ["-m", "mu.notebooks.forecast"]
        and words[2].endswith("snakemake")
        and "seeds=1 3" in words
        and not rest
    )


@pytest.mark.parametrize(
    "said, installs",
    [
        (["MODEL=sd-v1-4"], [".[measures]"]),
        (["MODEL=sdxl", "MACHINE=slurm"], [".[measures]", ".[slurm]"]),
        (["MODEL=pocket"], []),
        (["MODEL=sdxl", "DRY=1"], []),
    ],
)
def test_large_models_and_clusters_get_what_only_they_need(said, installs):
    outside = {
        name: value
        for name, value in os.environ.items()
        if name
        not in (
            "MODEL",
            "SEEDS",
            "MACHINE",
            "DRY",
            "MAKEFLAGS",
            "MAKEOVERRIDES",
            "MAKELEVEL",
            "MFLAGS",
        )
    }
    told = subprocess.run(
        ["make", "-C", ROOT, "-n", "-o", ".venv/installed", "paper", *said],
        capture_output=True,
        text=True,
        env=outside,
    ).stdout
    assert sorted(re.findall(r'pip install -qq -e "([^"]*)"', told)) == installs
