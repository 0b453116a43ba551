"""The notebook runner, on toy notebooks."""

import ast
import shutil
import subprocess
import sys

import nbformat
import papermill
import pytest
from toys import ROOT, text_of, write_notebook

from mu.notebooks.run import (
    check_parameters,
    execute,
    has_type,
    main,
    origin,
    read_origin,
    read_parameters,
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
    """The toy, run once: output and parameters."""
    output = tmp_path_factory.mktemp("ran") / "deep" / "toy.ipynb"
    parameters = {"steps": 4, "name": 'it\'s $(echo no) "quoted"'}
    assert execute(toy, output, parameters) is True
    return output, parameters


def test_execute_writes_output_and_page(ran):
    output, _ = ran
    assert sorted(p.name for p in output.parent.iterdir()) == ["toy.html", "toy.ipynb"]
    assert text_of(output).splitlines() == ['steps 4 float it\'s $(echo no) "quoted"', "end"]
    assert all(c.execution_count for c in nbformat.read(output, 4).cells if c.cell_type == "code")


def test_page_loads_nothing_and_draws_formulas(ran):
    page = ran[0].with_suffix(".html").read_text()
    assert "<math" in page
    assert "<title>What is it?</title>" in page
    assert "<code>$5</code>" in page
    attributes = ('src="http', "src='http", 'href="http', "<script src")
    for external in (*attributes, "cdnjs", "unpkg", "url(http", "@import"):
        assert external not in page, external


def test_an_unchanged_notebook_is_not_run_again(toy, ran, tmp_path):
    output, parameters = ran
    before = output.stat().st_mtime_ns
    assert execute(toy, output, parameters) is False
    assert output.stat().st_mtime_ns == before
    shutil.copytree(output.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / "toy.ipynb"
    assert execute(toy, copy, {"steps": 5}) is True, "other parameters"
    assert text_of(copy).startswith("steps 5 float toy")
    assert origin(toy, {"steps": 5}) == read_origin(copy)
    assert read_origin(copy) != origin(toy, {"steps": 6})
    other = write_notebook(tmp_path / "toy.ipynb", "print('another source')")
    assert origin(other, {})["asked"] != origin(toy, {})["asked"]
    assert read_origin(tmp_path / "nowhere.ipynb") == {}


def test_failure_names_the_cell_and_keeps_the_earlier_output(toy, ran, tmp_path):
    shutil.copytree(ran[0].parent, tmp_path / "out")
    output = tmp_path / "out" / "toy.ipynb"
    before = output.read_bytes(), output.with_suffix(".html").read_bytes()
    with pytest.raises(RuntimeError) as caught:
        execute(toy, output, {"fail": True})
    unfinished = output.with_name("toy.unfinished.ipynb")
    cell = "cell [4] `# a comment first`"
    for part in (str(toy), cell, "AssertionError: asked to fail", f"open {unfinished}"):
        assert part in str(caught.value)
    assert (output.read_bytes(), output.with_suffix(".html").read_bytes()) == before
    assert "steps 3" in text_of(unfinished)
    assert "end" not in text_of(unfinished)


def test_a_notebook_can_stop_early(tmp_path):
    toy = write_notebook(
        tmp_path / "toy.ipynb",
        "from mu.notebooks.run import Stop\nprint('before')",
        "raise Stop('Enough:\\nsay more.')",
        "print('never')",
    )
    output = tmp_path / "out" / "toy.ipynb"
    assert execute(toy, output) is True
    assert execute(toy, output) is False
    executed = nbformat.read(output, 4)
    assert text_of(output).splitlines() == ["before", "Enough:", "say more."]
    assert executed.cells[-1].execution_count is None
    code = [cell.source for cell in executed.cells if cell.cell_type == "code"]
    assert code[-3:] == [cell.source for cell in nbformat.read(toy, 4).cells][-3:]
    assert sorted(p.name for p in output.parent.iterdir()) == ["toy.html", "toy.ipynb"]
    assert "Exception" not in output.with_suffix(".html").read_text()


def test_dead_kernel_is_reported(tmp_path):
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    toy = write_notebook(tmp_path / "toy.ipynb", code)
    message = r"stopped in cell \[.\] `import os, signal`\n.*kernel died"
    with pytest.raises(RuntimeError, match=message):
        execute(toy, tmp_path / "out.ipynb", html=False)
    assert not (tmp_path / "out.ipynb").exists()


def test_a_second_process_is_refused(toy, tmp_path):
    script = (
        "import fcntl, sys, time\nf = open(sys.argv[1], 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", script, tmp_path / "out.unfinished.ipynb"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        message = "out.unfinished.ipynb is being written by another process"
        with pytest.raises(RuntimeError, match=message):
            execute(toy, tmp_path / "out.ipynb")
    finally:
        holder.kill()
        holder.wait()


UNKNOWN = "unknown parameter 'step': choose steps, lr, name, names, weights, fail"
WRONG_TYPES = [
    ({"steps": 3.0}, "steps must be int (default 3), got 3.0 of type float"),
    ({"steps": True}, "steps must be int"),
    ({"steps": None}, "of type NoneType"),
    ({"lr": "1e-5"}, "YAML needs a point and a sign"),
    ({"fail": 1}, "fail must be bool"),
    ({"name": 3}, "name must be str"),
    ({"names": "ab"}, "names must be list[str]"),
    ({"names": ["a", 1]}, "names must be list[str]"),
    ({"weights": {"a": "1"}}, "weights must be dict[str, float]"),
    ({"weights": {1: 1.0}}, "weights must be dict[str, float]"),
]


@pytest.mark.parametrize(
    "parameters, error, message",
    [({"step": 3}, ValueError, UNKNOWN), *((p, TypeError, text) for p, text in WRONG_TYPES)],
)
def test_wrong_parameters_are_refused_before_anything_is_written(
    toy, tmp_path, parameters, error, message
):
    with pytest.raises(error) as caught:
        execute(toy, tmp_path / "out" / "toy.ipynb", parameters)
    assert message in str(caught.value)
    assert str(toy) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_right_parameters_pass(toy):
    weights = {"a": 1, "b": 0.5}
    parameters = {"steps": 0, "lr": 1, "name": "", "names": [], "weights": weights, "fail": True}
    check_parameters(toy, parameters)


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
def test_values_match_annotations(value, annotation, expected):
    assert has_type(value, ast.parse(annotation, mode="eval").body) is expected


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


def test_defaults_are_read_as_python(tmp_path):
    """papermill's own reader splits lines at = and #."""
    lines = ['name: str = "a = b # c"  # with = and #', "lr: float = -1e-5  # negative"]
    lines.append('weights: dict[str, float] = {"#": 1.0}  # a dict')
    notebook = write_notebook(tmp_path / "toy.ipynb", parameters="\n".join(lines))
    found = read_parameters(notebook)
    assert [p.default for p in found.values()] == ["a = b # c", -1e-5, {"#": 1.0}]
    assert [p.meaning for p in found.values()] == ["with = and #", "negative", "a dict"]
    known = papermill.inspect_notebook(ROOT / "notebooks" / "20_unlearn.ipynb")
    own = read_parameters(ROOT / "notebooks" / "20_unlearn.ipynb")
    assert list(own) == list(known)
    for name, parameter in own.items():
        assert parameter.kind == known[name]["inferred_type_name"]
        assert parameter.default == ast.literal_eval(known[name]["default"])


def test_values_may_begin_with_a_hyphen(toy, tmp_path, capsys):
    output = tmp_path / "out.ipynb"
    main([str(toy), str(output), "-p", "lr", "-1e-5", "-p", "name", "-x"])
    assert text_of(output).startswith("steps 3 float -x")
    with pytest.raises(SystemExit):
        main([str(toy), str(output), "-p", "lr"])
    assert "expected 2 arguments" in capsys.readouterr().err


def test_braces_in_paths_are_literal(tmp_path):
    notebook = write_notebook(tmp_path / "proj{v2}" / "toy.ipynb", "print(steps)")
    output = tmp_path / "runs {steps}" / "out{}.ipynb"
    assert execute(notebook, output, {"steps": 5}) is True
    assert text_of(output) == "5\n"
    assert sorted(file.name for file in output.parent.iterdir()) == ["out{}.html", "out{}.ipynb"]
    assert execute(notebook, output, {"steps": 5}) is False


def test_the_notebook_is_never_overwritten(toy, tmp_path, monkeypatch):
    before = toy.read_bytes()
    (tmp_path / "link.ipynb").symlink_to(toy)
    monkeypatch.chdir(toy.parent)
    for output in (toy, toy.name, tmp_path / "link.ipynb"):
        with pytest.raises(ValueError, match="is the notebook itself, which would be lost"):
            execute(toy, output)
    with pytest.raises(ValueError, match="out.html must end with .ipynb"):
        execute(toy, tmp_path / "out.html")
    assert toy.read_bytes() == before


def test_command_line(toy, tmp_path, capsys):
    command = [str(toy), str(tmp_path / "out.ipynb")]
    values = ["-p", "lr", "1e-5", "-p", "name", "7", "-p", "names", "['x']"]
    main([*command, *values])
    assert text_of(tmp_path / "out.ipynb").startswith("steps 3 float 7")
    main([*command, *values])
    assert "is up to date" in capsys.readouterr().out
    for arguments, message in (
        (["-p", "steps", "many"], "steps must be int"),
        (["-p", "step", "1"], "unknown parameter 'step'"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main([*command, *arguments])
    with pytest.raises(SystemExit, match="there is no notebook"):
        main([str(tmp_path / "nowhere.ipynb"), "out.ipynb"])
