"""The runner, on toy notebooks; and what every notebook of the repository has to look like."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from mu.notebooks.book import faults
from mu.notebooks.run import (
    check_parameters,
    effective,
    execute,
    fits,
    main,
    origin,
    origin_of,
    read_parameters,
    read_profile,
)

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = """steps: int = 3  # steps of nothing
lr: float = 1e-3  # learning rate
name: str = "toy"  # a word
names: list[str] = ["a", "b"]  # words
weights: dict[str, float] = {"a": 1.0}  # weights
fail: bool = False  # stop in the middle"""


def write_notebook(
    path, *code, parameters=PARAMETERS, text="# What is it?\n\nInline $\\theta - \\tau$ and `$5`."
):
    cells = [
        nbformat.v4.new_markdown_cell(text),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(source) for source in code),
    ]
    metadata = {
        "kernelspec": {
            "name": "a-kernel-of-somebody-else",
            "display_name": "x",
            "language": "python",
        },
        "language_info": {"name": "python"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def text_of(path):
    return "".join(
        o.get("text", "")
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "code"
        for o in c.outputs
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_notebook(
        tmp_path_factory.mktemp("toy") / "toy.ipynb",
        "print('steps', steps, type(lr).__name__, name)",
        "# a comment first\nassert not fail, 'asked to fail'",
        "print('end')",
    )


@pytest.fixture(scope="module")
def ran(toy, tmp_path_factory):
    """The toy, run once: (output, parameters)."""
    output, parameters = (
        tmp_path_factory.mktemp("ran") / "deep" / "toy.ipynb",
        {"steps": 4, "name": 'it\'s $(echo no) "quoted"'},
    )
    assert execute(toy, output, parameters) is True
    return output, parameters


def test_runs_whole_files_in_this_python(ran):
    output, _ = ran
    assert sorted(p.name for p in output.parent.iterdir()) == ["toy.html", "toy.ipynb"]
    assert text_of(output).splitlines() == ['steps 4 float it\'s $(echo no) "quoted"', "end"]
    assert all(c.execution_count for c in nbformat.read(output, 4).cells if c.cell_type == "code")


def test_page_loads_nothing_and_draws_formulas(ran):
    page = ran[0].with_suffix(".html").read_text()
    assert "<math" in page and "<title>What is it?</title>" in page and "<code>$5</code>" in page
    for word in (
        'src="http',
        "src='http",
        'href="http',
        "<script src",
        "cdnjs",
        "unpkg",
        "url(http",
        "@import",
    ):
        assert word not in page, word


def test_nothing_done_is_repeated(toy, ran, tmp_path):
    output, parameters = ran
    before = output.stat().st_mtime_ns
    assert execute(toy, output, parameters) is False and output.stat().st_mtime_ns == before
    shutil.copytree(output.parent, tmp_path / "copy")
    assert execute(toy, tmp_path / "copy" / "toy.ipynb", {"steps": 5}) is True, "other parameters"
    assert text_of(tmp_path / "copy" / "toy.ipynb").startswith("steps 5 float toy")
    assert (
        origin(toy, {"steps": 5})
        == origin_of(tmp_path / "copy" / "toy.ipynb")
        != origin(toy, {"steps": 6})
    )
    other = write_notebook(tmp_path / "toy.ipynb", "print('another source')")
    assert (
        origin(other, {})["asked"] != origin(toy, {})["asked"]
        and origin_of(tmp_path / "nowhere.ipynb") == {}
    )


def test_failure_says_which_cell_to_open_and_keeps_what_was(toy, ran, tmp_path):
    shutil.copytree(ran[0].parent, tmp_path / "out")
    output = tmp_path / "out" / "toy.ipynb"
    before = output.read_bytes(), output.with_suffix(".html").read_bytes()
    with pytest.raises(RuntimeError) as caught:
        execute(toy, output, {"fail": True})
    unfinished = output.with_name("toy.unfinished.ipynb")
    for words in (
        str(toy),
        "cell [4] `# a comment first`",
        "AssertionError: asked to fail",
        f"open {unfinished}",
    ):
        assert words in str(caught.value)
    assert (output.read_bytes(), output.with_suffix(".html").read_bytes()) == before
    assert "steps 3" in text_of(unfinished) and "end" not in text_of(unfinished)


def test_a_notebook_can_stop_on_purpose(tmp_path):
    toy = write_notebook(
        tmp_path / "toy.ipynb",
        "from mu.notebooks.run import Stop\nprint('before')",
        "raise Stop('Enough:\\nsay more.')",
        "print('never')",
    )
    output = tmp_path / "out" / "toy.ipynb"
    assert execute(toy, output) is True and execute(toy, output) is False
    executed = nbformat.read(output, 4)
    assert (
        text_of(output).splitlines() == ["before", "Enough:", "say more."]
        and executed.cells[-1].execution_count is None
    )
    assert [cell.source for cell in executed.cells if cell.cell_type == "code"][-3:] == [
        cell.source for cell in nbformat.read(toy, 4).cells
    ][-3:]
    assert (
        sorted(p.name for p in output.parent.iterdir()) == ["toy.html", "toy.ipynb"]
        and "Exception" not in output.with_suffix(".html").read_text()
    )


def test_dead_kernel_is_told_as_such(tmp_path):
    toy = write_notebook(
        tmp_path / "toy.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(
        RuntimeError, match=r"stopped in cell \[.\] `import os, signal`\n.*kernel died"
    ):
        execute(toy, tmp_path / "out.ipynb", html=False)
    assert not (tmp_path / "out.ipynb").exists()


def test_two_at_once_are_refused(toy, tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time\nf = open(sys.argv[1], 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\ntime.sleep(600)",
            tmp_path / "out.unfinished.ipynb",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(
            RuntimeError, match="out.unfinished.ipynb is being written by another process"
        ):
            execute(toy, tmp_path / "out.ipynb")
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    "parameters, error, words",
    [
        (
            {"step": 3},
            ValueError,
            "no parameter 'step'; it has: steps, lr, name, names, weights, fail",
        ),
        ({"steps": 3.0}, TypeError, "steps must be int (by default 3), not 3.0, which is float"),
        ({"steps": True}, TypeError, "steps must be int"),
        ({"steps": None}, TypeError, "which is NoneType"),
        ({"lr": "1e-5"}, TypeError, "YAML needs a point and a sign"),
        ({"fail": 1}, TypeError, "fail must be bool"),
        ({"name": 3}, TypeError, "name must be str"),
        ({"names": "ab"}, TypeError, "names must be list[str]"),
        ({"names": ["a", 1]}, TypeError, "names must be list[str]"),
        ({"weights": {"a": "1"}}, TypeError, "weights must be dict[str, float]"),
        ({"weights": {1: 1.0}}, TypeError, "weights must be dict[str, float]"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_written(
    toy, tmp_path, parameters, error, words
):
    with pytest.raises(error) as caught:
        execute(toy, tmp_path / "out" / "toy.ipynb", parameters)
    assert words in str(caught.value) and str(toy) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_right_parameters_pass(toy):
    check_parameters(
        toy,
        {"steps": 0, "lr": 1, "name": "", "names": [], "weights": {"a": 1, "b": 0.5}, "fail": True},
    )


@pytest.mark.parametrize(
    "value, annotation, expected",
    [
        (1, "float", True),
        (True, "float", False),
        ([1, [2]], "list", True),
        ([[1], [2]], "list[list[int]]", True),
        ([[1], [2.5]], "list[list[int]]", False),
        ({}, "dict[str, int]", True),
        ([], "dict[str, int]", False),
    ],
)
def test_types(value, annotation, expected):
    assert fits(value, ast.parse(annotation, mode="eval").body) is expected


@pytest.mark.parametrize(
    "line",
    [
        "steps = 3",
        "steps: int = n",
        "steps: int = 3.5",
        "steps: tuple = (1, 2)",
        "steps: Path = 'a'",
        "names: list[Path] = ['a']",
    ],
)
def test_a_parameter_is_an_annotated_literal(tmp_path, line):
    with pytest.raises(ValueError, match="must read `(steps|names): type = value  # meaning`"):
        read_parameters(write_notebook(tmp_path / "toy.ipynb", parameters=line))


def test_command_line(toy, ran, tmp_path, capsys):
    main(
        [
            str(toy),
            str(tmp_path / "out.ipynb"),
            "-p",
            "lr",
            "1e-5",
            "-p",
            "name",
            "7",
            "-p",
            "names",
            "['x']",
        ]
    )
    assert text_of(tmp_path / "out.ipynb").startswith("steps 3 float 7")
    main(
        [
            str(toy),
            str(tmp_path / "out.ipynb"),
            "-p",
            "lr",
            "1e-5",
            "-p",
            "name",
            "7",
            "-p",
            "names",
            "['x']",
        ]
    )
    assert "was there already" in capsys.readouterr().out
    for arguments, words in (
        (["-p", "steps", "many"], "steps must be int"),
        (["-p", "step", "1"], "no parameter 'step'"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{words}"):
            main([str(toy), str(tmp_path / "out.ipynb"), *arguments])
    with pytest.raises(SystemExit, match="there is no notebook"):
        main([str(tmp_path / "nowhere.ipynb"), "out.ipynb"])


# --- the experiment: Snakemake, with the Snakefile of the repository and three toy notebooks


def experiment(folder, steps, *flags):
    (folder / "experiment.yaml").write_text(
        yaml.safe_dump({"runs": "runs/toy", "report": "reports/toy", "experiment": steps})
    )
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--configfile",
        "experiment.yaml",
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
        *flags,
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout + done.stderr


def made(folder):
    return {p.stem: p.stat().st_mtime_ns for p in (folder / "reports/toy/notebooks").glob("*.html")}


def test_walk_repeats_nothing_and_goes_on_where_it_stopped(tmp_path):
    shutil.copy(ROOT / "Snakefile", tmp_path)
    source = "import os, pathlib\nos.makedirs('runs/toy', exist_ok=True)\npathlib.Path(f'runs/toy/{name}').write_text(os.environ['OMP_NUM_THREADS'])"
    for name in ("10_a", "20_b"):
        write_notebook(
            tmp_path / "notebooks" / f"{name}.ipynb", "assert not fail, 'asked to fail'", source
        )
    shutil.copy(ROOT / "notebooks" / "run.py", tmp_path / "notebooks")
    steps = {
        "10_a": {"parameters": {"name": "a"}, "leaves": ["runs/toy/a"], "threads": 2},
        "20_b": {"after": ["10_a"], "parameters": {"name": "b"}},
        "20_b-again": {
            "notebook": "20_b",
            "after": ["20_b"],
            "parameters": {"name": "c", "fail": True},
        },
    }

    code, said = experiment(
        tmp_path, steps | {"20_b": {"after": ["10_a"], "parameters": {"lr": "1e-5"}}}
    )
    assert code and "lr must be float" in said and not (tmp_path / "reports").exists(), (
        "refused before anything runs"
    )

    code, said = experiment(tmp_path, steps)
    assert (
        code
        and "stopped in cell [3] `assert not fail, 'asked to fail'`" in said
        and "AssertionError: asked to fail" in said
    )
    assert "as far as it came: reports/toy/notebooks/20_b-again.unfinished.ipynb" in said
    first = made(tmp_path)
    assert (
        set(first) == {"10_a", "20_b"}
        and (tmp_path / "runs/toy/a").read_text() == "2"
        and (tmp_path / "runs/toy/b").read_text() == "1"
    )

    earlier = tmp_path / "reports/toy/notebooks/10_a.ipynb"
    earlier.write_text(earlier.read_text().replace(origin_of(earlier)["mu"], "0123456789abcdef"))
    steps["20_b-again"]["parameters"]["fail"] = False
    code, said = experiment(tmp_path, steps)
    assert (
        code == 0
        and said.count("note: of an earlier mu are 10_a. To make everything again, delete runs/toy")
        == 1
    ), said
    second = made(tmp_path)
    assert {n: second[n] for n in first} == first and set(second) == {*first, "20_b-again"}

    (tmp_path / "runs/toy/a").unlink()  # what is gone is made again, and what came after it
    code, said = experiment(tmp_path, steps, "--dry-run")
    assert (
        code == 0
        and not (tmp_path / "runs/toy/done/10_a").exists()
        and "10_a" in said
        and made(tmp_path) == second
    )


# --- the notebooks of the repository


def test_there_are_notebooks():
    assert {p.name[:2] for p in NOTEBOOKS} >= {"00", "10", "20", "21", "30", "90"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_its_parts(path):
    assert faults(path) == []


def test_what_a_notebook_lacks_is_said(tmp_path):
    """Each part taken away, each limit broken, is one fault."""
    whole = ROOT / "notebooks" / "35_compare_attacks.ipynb"
    said = {}

    def broken(name, change):
        read = nbformat.read(whole, 4)
        change(read)
        nbformat.write(read, tmp_path / f"{name}.ipynb")
        said[name] = faults(tmp_path / f"{name}.ipynb")

    def cut(old, new="", cell=None):
        def change(read):
            cells = [
                c for c in (read.cells if cell is None else [read.cells[cell]]) if old in c.source
            ]
            assert cells
            for c in cells:
                c.source = c.source.replace(old, new)

        return change

    def tagged(read):
        return next(c for c in read.cells if "parameters" in c.metadata.get("tags", []))

    def code(read):
        return [
            c
            for c in read.cells
            if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])
        ]

    for part in (
        "**Goes in:**",
        "**Comes out:**",
        "**Needs:**",
        "**Limits.**",
        "**Next",
        "What this showed",
        "You should see",
        "## Checks",
    ):
        broken(part.strip("*# .:").lower().replace(" ", "-"), cut(part))
    broken("question", cut("?", ".", 0))
    broken(
        "heading", lambda read: read.cells[0].update(source=read.cells[0].source.removeprefix("# "))
    )
    broken("outputs", lambda read: code(read)[1].update(execution_count=3))
    broken("long", lambda read: code(read)[1].update(source="x = 1\n" * 21))
    broken("untagged", lambda read: tagged(read).metadata.pop("tags"))
    broken(
        "words",
        lambda read: tagged(read).update(source=re.sub(r"  #.*", "", tagged(read).source, count=1)),
    )
    broken("hidden", lambda read: tagged(read).update(source=tagged(read).source + "\nx = 1"))
    broken("minutes", lambda read: read.metadata.mu.pop("minutes"))
    broken(
        "text",
        lambda read: read.cells.__setitem__(
            slice(1, -1),
            [
                c
                for c in read.cells[1:-1]
                if c.cell_type == "code" or "You should see" in c.source or "## Checks" in c.source
            ],
        ),
    )
    assert [name for name, found in said.items() if len(found) != 1] == [], said
    assert (
        "a cell has 21 lines, 20 is the most: x = 1" in said["long"]
        and "the last cell has no **Limits.**" in said["limits"]
        and "the metadata have no mu.minutes" in said["minutes"]
    )


def test_the_check_of_the_book_finds_nothing_and_knows_no_other_words():
    def book(*words):
        return subprocess.run(
            [sys.executable, "-m", "mu.notebooks.book", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    assert (found := book("--check")).returncode == 0, found.stderr
    before = {path: path.stat().st_mtime_ns for path in [*NOTEBOOKS, ROOT / "README.md"]}
    wrong = book("--chekc")
    assert (
        wrong.returncode == 2
        and "--chekc" in wrong.stderr
        and before == {path: path.stat().st_mtime_ns for path in before}
    ), "a slip writes nothing"


def test_every_profile_has_the_notebooks_of_the_walk_and_fits_them():
    folders = [f for f in (ROOT / "notebooks" / "profiles").iterdir() if f.is_dir()]
    assert {f.name for f in folders} >= {"pocket", "colab-t4", "paper-sd-v1-4", "paper-sdxl"}
    for folder in folders:
        assert {f.stem for f in folder.iterdir()} - {"86_benchmark_large"} == {
            "15_preflight",
            "20_unlearn",
            "21_meta_unlearn",
            "30_attack_finetune",
            "31_attack_prompts",
            "50_evaluate",
        }
        runs = []
        for file in folder.iterdir():
            notebook = ROOT / "notebooks" / f"{file.stem}.ipynb"
            parameters = read_profile(folder.name, notebook)
            assert parameters and parameters == yaml.safe_load(file.read_text())
            check_parameters(notebook, parameters)
            if file.stem == "86_benchmark_large":  # its figures are kept
                assert (
                    parameters["out"] == f"reports/measured/{folder.name}"
                    and parameters["profile"] == folder.name
                )
                assert (
                    parameters["steps"]
                    > effective(ROOT / "notebooks" / "21_meta_unlearn.ipynb", folder.name)[
                        "trajectory_reuse"
                    ]
                )
                continue
            runs.append(parameters["out"])
            if file.stem != "15_preflight" and folder.name.startswith("paper"):
                assert "published" in file.read_text(), "what the paper says, and what it does not"
        assert len(set(runs)) == 1, "one experiment, one place"
    with pytest.raises(
        FileNotFoundError,
        match="20_unlearn.ipynb has no profile 'collab'; it has: colab-t4, paper-sd-v1-4, paper-sdxl, pocket",
    ):
        read_profile("collab", ROOT / "notebooks" / "20_unlearn.ipynb")
    assert read_profile("", ROOT / "notebooks" / "20_unlearn.ipynb") == {}


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
        if "models" not in yaml.safe_load(p.read_text())
    ],
    ids=lambda p: p.stem,
)  # grids: test_grid.py
def test_profile_fits_the_notebooks(path):
    profile = yaml.safe_load(path.read_text())
    assert (
        {"runs", "report", "experiment"}
        <= set(profile)
        <= {"runs", "report", "experiment", "common"}
    )
    for name, step in profile["experiment"].items():
        notebook = ROOT / "notebooks" / f"{step.get('notebook', name)}.ipynb"
        check_parameters(notebook, step.get("parameters", {}))
        assert set(step) <= {"notebook", "after", "threads", "leaves", "parameters"} and set(
            step.get("after", [])
        ) <= set(profile["experiment"])
        values = {
            n: ast.literal_eval(p["default"])
            for n, p in papermill.inspect_notebook(notebook).items()
        } | step.get("parameters", {})
        assert (
            values.get("out", profile["runs"]) == profile["runs"]
            and values.get("report", profile["report"]) == profile["report"]
        )
        assert all(
            file.startswith((profile["runs"], profile["report"])) for file in step.get("leaves", [])
        )
