"""Run notebooks through papermill.

Validates parameters, writes outputs atomically, and names the cell that fails.

    python -m mu.notebooks.run notebooks/20_unlearn.ipynb runs/mine/20.ipynb --profile colab-t4
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import io
import json
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from mu import ROOT

TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}


def _write_progress(text):
    """Write progress bars, which contain carriage returns, to stderr; drop other output."""
    if "\r" in text:
        sys.stderr.write(text)


PROGRESS = SimpleNamespace(write=_write_progress, flush=sys.stderr.flush)


class Stop(Exception):
    """Ends a notebook early without marking it as failed, under papermill and in Jupyter."""

    def _render_traceback_(self):  # called by IPython
        return str(self).splitlines()


def has_type(value, kind):
    """Return whether a value has an annotated type, given as a syntax tree.

    Types: int, float (accepts an int), str, bool, list[...], dict[..., ...].
    """
    if not isinstance(kind, ast.Subscript):
        is_bool = isinstance(value, bool)
        return isinstance(value, TYPES[kind.id]) and (kind.id == "bool" or not is_bool)
    if not has_type(value, kind.value):
        return False
    if isinstance(value, dict):
        key, item = kind.slice.elts
        return all(has_type(k, key) and has_type(v, item) for k, v in value.items())
    return all(has_type(v, kind.slice) for v in value)


class Parameter(NamedTuple):
    """A parameter of a notebook."""

    kind: str  # its annotated type
    default: object
    meaning: str  # its comment


def read_parameters(notebook):
    """Return name → `Parameter` of a notebook.

    Each line of the cell tagged `parameters` reads `name: type = value  # unit, meaning`.
    Raises FileNotFoundError for a missing notebook, ValueError for another form of a line.
    """
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    cells = nbformat.read(notebook, 4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    source = tagged[0] if tagged else ""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        default, valid = None, False
        with contextlib.suppress(ValueError, SyntaxError, KeyError, AttributeError):
            default = ast.literal_eval(node.value)
            valid = has_type(default, node.annotation)
        if not valid:
            name = getattr(node, "target", getattr(node, "targets", [node])[0])
            raise ValueError(
                f"{notebook}: the parameter `{ast.unparse(node)}` must read "
                f"`{ast.unparse(name)}: type = value  # meaning`, with a literal of type "
                f"{', '.join(TYPES)}"
            )
        meaning = comments.get(node.end_lineno, "#").lstrip("# ")
        found[node.target.id] = Parameter(ast.unparse(node.annotation), default, meaning)
    return found


def check_parameters(notebook, parameters):
    """Check parameters of a notebook, for which papermill only warns.

    Raises ValueError for an unknown parameter, TypeError for a wrong type.
    """
    known = read_parameters(notebook)
    for name, value in parameters.items():
        if name not in known:
            choices = ", ".join(known) or "no parameter"
            raise ValueError(f"{notebook}: unknown parameter {name!r}: choose {choices}")
        kind, default, _ = known[name]
        if not has_type(value, ast.parse(kind, mode="eval").body):
            is_text = kind == "float" and isinstance(value, str)
            fix = "; YAML needs a point and a sign: 1.0e-5" if is_text else ""
            raise TypeError(
                f"{notebook}: parameter {name} must be {kind} (default {default!r}), "
                f"got {value!r} of type {type(value).__name__}{fix}"
            )


def read_profile(profile, notebook):
    """Return the parameters of a notebook in a profile; {} for the empty profile.

    Reads `profiles/<profile>/<notebook>.yaml` beside the notebook. Raises FileNotFoundError for an
    unknown profile.
    """
    if not profile:
        return {}
    notebook = Path(notebook)
    folder, name = notebook.parent / "profiles", f"{notebook.stem}.yaml"
    if not (folder / profile / name).is_file():
        known = ", ".join(sorted(file.parent.name for file in folder.glob(f"*/{name}")))
        raise FileNotFoundError(
            f"{notebook.name} has no profile {profile!r}: choose {known or 'no profile'}"
        )
    return yaml.safe_load((folder / profile / name).read_text()) or {}


def effective(notebook, profile="", changes=None):
    """Return all parameters of a notebook; a profile overrides defaults, `changes` override both.

    Raises as `read_profile` and `check_parameters` do.
    """
    given = read_profile(profile, notebook) | (changes or {})
    check_parameters(notebook, given)
    known = read_parameters(notebook)
    return {name: parameter.default for name, parameter in known.items()} | given


def origin(notebook, parameters):
    """Return digests of what a notebook is made from: "asked" and "mu".

    asked: of its cells and parameters. mu: of the package that the cells call.
    """

    def digest(data):
        return hashlib.sha256(data).hexdigest()[:16]

    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(notebook, 4).cells]
    code = b"".join(file.read_bytes() for file in sorted((ROOT / "mu").rglob("*.py")))
    asked = json.dumps([cells, parameters], sort_keys=True).encode()
    return {"asked": digest(asked), "mu": digest(code)}


def read_origin(output):
    """Return the `origin` that an executed notebook recorded; {} if there is no such notebook."""
    if not Path(output).exists():
        return {}
    return nbformat.read(output, 4).metadata.get("mu", {}).get("origin", {})


def clean_stop(executed):
    """Turn the error of a `Stop` into plain text; leaves other executed notebooks as they are."""

    def is_notice(cell):  # papermill's own
        return any(tag.startswith("papermill-error-cell") for tag in cell.metadata.get("tags", []))

    def as_text(output):
        if output.output_type != "error":
            return output
        return nbformat.v4.new_output("stream", text=output.evalue + "\n")

    executed.cells = [cell for cell in executed.cells if not is_notice(cell)]
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [as_text(output) for output in cell.outputs]
    return executed


def execute(notebook, output, parameters=None, html=True, again=False):
    """Run a notebook; returns whether it ran.

    output: path of the executed notebook; with `html`, its page is written beside it. Both appear
    once all cells, or those before a `Stop`, have run. Until then, and after a failure, the
    notebook is `<output>.unfinished.ipynb`, and an earlier output is kept. An output of the same
    cells and parameters is not run again, unless `again`.
    Raises as `check_parameters` and `check_output` do; RuntimeError that names the failed cell, or
    if another process runs the same notebook.
    """
    # these import torch and nbconvert, which Snakemake's own process does not need
    from mu.files import atomic
    from mu.reports.page import notebook_page

    notebook, output, parameters = Path(notebook), Path(output), parameters or {}
    check_parameters(notebook, parameters)
    check_output(notebook, output)
    page, made_from = output.with_suffix(".html"), origin(notebook, parameters)
    unchanged = read_origin(output).get("asked") == made_from["asked"]
    if unchanged and not again and (page.exists() or not html):
        return False
    unfinished = output.with_suffix(".unfinished.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "a") as lock:  # the lock ends with its process, even with a killed one
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{unfinished} is being written by another process: wait for it, or stop it"
            ) from None
        _run_cells(notebook, unfinished, parameters, output.stem)
        executed = clean_stop(nbformat.read(unfinished, 4))
        executed.metadata.setdefault("mu", {})["origin"] = made_from
        if html:
            with atomic(page) as temporary:
                temporary.write_text(notebook_page(executed, notebook), encoding="utf-8")
        with atomic(output) as temporary:
            nbformat.write(executed, temporary)
        unfinished.unlink()
    return True


def check_output(notebook, output):
    """Raise ValueError for an output that would overwrite the notebook, or is no notebook."""
    if output.exists() and output.samefile(notebook):
        raise ValueError(
            f"the output {output} is the notebook itself, which would be lost: name another file"
        )
    if output.suffix != ".ipynb":
        raise ValueError(f"the output {output} must end with .ipynb: its page is written beside it")


def _literal(path):
    """Return a path for papermill, which fills in {…} of paths."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _run_cells(notebook, unfinished, parameters, title):
    """Execute all cells up to a `Stop`. Raises RuntimeError that names the cell that failed."""
    try:
        papermill.execute_notebook(
            _literal(notebook),
            _literal(unfinished),
            parameters,
            kernel_name="python3",
            progress_bar={"desc": title},
            stdout_file=PROGRESS,
            extra_arguments=["--log-level=40"],
        )
    except (PapermillExecutionError, DeadKernelError) as error:
        if getattr(error, "ename", "") == Stop.__name__:
            return
        code = [c for c in nbformat.read(unfinished, 4).cells if c.cell_type == "code"]
        cell = [c for c in code if c.metadata.papermill.start_time][-1]
        first_line = cell.source.strip().splitlines()[0]
        if isinstance(error, PapermillExecutionError):
            reason = f"{error.ename}: {error.evalue}"
        else:
            reason = "its kernel died, most often for lack of memory"
        raise RuntimeError(
            f"{notebook} stopped in cell [{cell.execution_count or '*'}] `{first_line}`\n"
            f"  {reason}\n  open {unfinished}"
        ) from None


def parse_values(notebook, texts):
    """Return parameters given as text (name → text) as Python values.

    A text that is no literal stays a string, so that `check_parameters` refuses its type.
    """
    known, values = read_parameters(notebook), dict(texts)
    for name, text in texts.items():
        if name in known and known[name].kind != "str":
            with contextlib.suppress(ValueError, SyntaxError):
                values[name] = ast.literal_eval(text)
    return values


def split_values(arguments):
    """Return (name → text of each `-p NAME VALUE`, other arguments).

    argparse takes a VALUE that begins with a hyphen, such as -1e-5, for an option.
    """
    texts, others, rest = {}, [], list(arguments)
    while rest:
        first = rest.pop(0)
        if first == "-p" and len(rest) >= 2:
            name, value, *rest = rest
            texts[name] = value
        else:
            others.append(first)
    return texts, others


def main(arguments=None):
    """Run a notebook from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mu.notebooks.run", description="Run a notebook with checked parameters."
    )
    parser.add_argument("notebook")
    parser.add_argument("output", help="executed notebook; its HTML page is written beside it")
    profile = "profile of model and machine, a folder of notebooks/profiles: pocket, colab-t4, ..."
    parser.add_argument("--profile", default="", help=profile)
    value = "a parameter; its value as in Python"
    parser.add_argument("-p", nargs=2, action="append", metavar=("NAME", "VALUE"), help=value)
    parser.add_argument("--again", action="store_true", help="run even if the output is up to date")
    texts, others = split_values(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(others)
    try:
        changes = parse_values(options.notebook, texts)
        parameters = read_profile(options.profile, options.notebook) | changes
        ran = execute(options.notebook, options.output, parameters, again=options.again)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if ran:
        print(options.output)
    else:
        print(f"{options.output} is up to date; --again runs it again")


if __name__ == "__main__":
    main()
