"""Run notebooks through papermill: parameters are checked, files appear whole, an error says which cell of which notebook to open.

python -m mu.notebooks.run notebooks/20_unlearn.ipynb runs/mine/20_unlearn.ipynb --profile colab-t4 -p seed 1
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from mu import ROOT

KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}
# papermill shows finished cells; of what a cell prints, progress bars are shown too
PROGRESS = SimpleNamespace(
    write=lambda text: "\r" in text and sys.stderr.write(text), flush=sys.stderr.flush
)


class Stop(Exception):
    """Raised in a cell that ends a notebook before its last one on purpose: what follows is not run, and that is no failure, here or in Jupyter."""

    def _render_traceback_(self):  # what IPython shows
        return str(self).splitlines()


def fits(value, kind):
    """Whether a value is of an annotation (its syntax tree): int, float (an int will do), str, bool, list[...], dict[..., ...]."""
    if isinstance(kind, ast.Subscript):
        inside = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        values = (
            [value]
            if len(inside) == 1
            else [list(value), list(value.values())]
            if isinstance(value, dict)
            else []
        )
        return fits(value, kind.value) and all(
            fits(v, k) for vs, k in zip(values, inside, strict=False) for v in vs
        )
    return isinstance(value, KINDS[kind.id]) and (kind.id == "bool" or not isinstance(value, bool))


def read_parameters(notebook):
    """Name → papermill's description of the cell tagged `parameters`, one a line: `name: type = value  # unit, meaning`.

    Raises FileNotFoundError for no notebook, ValueError for a parameter that is not written so."""
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    known = papermill.inspect_notebook(notebook)
    for name, parameter in known.items():
        kind, default, good = parameter["inferred_type_name"], parameter["default"], False
        with contextlib.suppress(ValueError, SyntaxError, KeyError, AttributeError):
            good = fits(ast.literal_eval(default), ast.parse(kind, mode="eval").body)
        if not good:
            raise ValueError(
                f"{notebook}: the parameter `{name}: {kind} = {default}` must read `{name}: type = value  # meaning`, "
                f"with a literal of one of the types {', '.join(KINDS)}"
            )
    return known


def check_parameters(notebook, parameters):
    """papermill only warns about these. Raises ValueError for an unknown one (and lists the known), TypeError for a wrong type."""
    known = read_parameters(notebook)
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(
                f"{notebook} has no parameter {name!r}; it has: {', '.join(known) or 'none'}"
            )
        kind = known[name]["inferred_type_name"]
        if not fits(value, ast.parse(kind, mode="eval").body):
            mend = (
                "; YAML needs a point and a sign: 1.0e-5"
                if kind == "float" and isinstance(value, str)
                else ""
            )
            raise TypeError(
                f"{notebook}: parameter {name} must be {kind} (by default {known[name]['default']}), "
                f"not {value!r}, which is {type(value).__name__}{mend}"
            )


def read_profile(profile, notebook):
    """Parameters of a notebook in a profile: the file `profiles/<profile>/<notebook>.yaml` beside it; {} for no profile.

    Raises FileNotFoundError that lists the known ones."""
    if not profile:
        return {}
    notebook = Path(notebook)
    file = notebook.parent / "profiles" / profile / f"{notebook.stem}.yaml"
    if not file.is_file():
        known = sorted(
            f.parent.name for f in notebook.parent.glob(f"profiles/*/{notebook.stem}.yaml")
        )
        raise FileNotFoundError(
            f"{notebook.name} has no profile {profile!r}; it has: {', '.join(known) or 'none'}"
        )
    return yaml.safe_load(file.read_text()) or {}


def effective(notebook, profile="", changes=None):
    """All parameters of a notebook: its own values, over them the profile's, over them `changes`. Raises as `read_profile` and `check_parameters` do."""
    asked = read_profile(profile, notebook) | (changes or {})
    check_parameters(notebook, asked)
    return {
        name: ast.literal_eval(parameter["default"])
        for name, parameter in read_parameters(notebook).items()
    } | asked


def origin(notebook, parameters):
    """What an executed notebook is made from, as digests: "asked" (cells and parameters), and "mu", the code that they call."""

    def digest(data):
        return hashlib.sha256(data).hexdigest()[:16]

    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(notebook, 4).cells]
    return {
        "asked": digest(json.dumps([cells, parameters], sort_keys=True).encode()),
        "mu": digest(b"".join(file.read_bytes() for file in sorted((ROOT / "mu").rglob("*.py")))),
    }


def origin_of(output):
    """`origin`, as it was when the executed notebook was made; {} if it is not there."""
    return (
        nbformat.read(output, 4).metadata.get("mu", {}).get("origin", {})
        if Path(output).exists()
        else {}
    )


def without_error(executed):
    """An executed notebook that ended by `Stop`: its words are plain text, and papermill's notices of an error are gone. Another one as it is."""
    executed.cells = [
        cell
        for cell in executed.cells
        if not any(tag.startswith("papermill-error-cell") for tag in cell.metadata.get("tags", []))
    ]
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                nbformat.v4.new_output("stream", text=o.evalue + "\n")
                if o.output_type == "error"
                else o
                for o in cell.outputs
            ]
    return executed


def execute(notebook, output, parameters=None, html=True, again=False):
    """Run `notebook` with `parameters` and write `output` (ipynb) and, with `html`, a page of the same name beside it.

    Both appear whole, when every cell has run, or those before a `Stop`. Until then, and after a failure, the notebook is `<output>.unfinished.ipynb`,
    and an earlier `output` is left as it was. An `output` of the same cells and parameters is not made again, unless `again`.
    Returns whether the notebook was run. Raises as `check_parameters` does, and RuntimeError that names the cell to look at,
    or the process that is running the same notebook into the same place."""
    from mu.files import atomic
    from mu.reports.page import notebook_page

    notebook, output, parameters = Path(notebook), Path(output), parameters or {}
    check_parameters(notebook, parameters)
    page, unfinished, made_from = (
        output.with_suffix(".html"),
        output.with_suffix(".unfinished.ipynb"),
        origin(notebook, parameters),
    )
    if (
        not again
        and origin_of(output).get("asked") == made_from["asked"]
        and (page.exists() or not html)
    ):
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(
        unfinished, "a"
    ) as lock:  # held as long as this process lives: a killed one leaves nothing locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            papermill.execute_notebook(
                notebook,
                unfinished,
                parameters,
                kernel_name="python3",
                progress_bar={"desc": output.stem},
                stdout_file=PROGRESS,
                extra_arguments=["--log-level=40"],
            )
        except BlockingIOError:
            raise RuntimeError(
                f"{unfinished} is being written by another process: wait for it, or stop it"
            ) from None
        except (PapermillExecutionError, DeadKernelError) as error:
            if getattr(error, "ename", "") != Stop.__name__:
                cell = [
                    c
                    for c in nbformat.read(unfinished, 4).cells
                    if c.cell_type == "code" and c.metadata.papermill.start_time
                ][-1]
                why = (
                    f"{error.ename}: {error.evalue}"
                    if isinstance(error, PapermillExecutionError)
                    else "its kernel died, most often of too little memory"
                )
                raise RuntimeError(
                    f"{notebook} stopped in cell [{cell.execution_count or '*'}] `{cell.source.strip().splitlines()[0]}`\n"
                    f"  {why}\n  open {unfinished}"
                ) from None
        executed = without_error(nbformat.read(unfinished, 4))
        executed.metadata.setdefault("mu", {})["origin"] = made_from
        if html:
            with atomic(page) as temporary:
                temporary.write_text(notebook_page(executed, notebook), encoding="utf-8")
        with atomic(output) as temporary:
            nbformat.write(executed, temporary)
        unfinished.unlink()
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m mu.notebooks.run", description="Run a notebook with checked parameters."
    )
    parser.add_argument("notebook")
    parser.add_argument("output", help="the executed notebook; its page (HTML) goes beside it")
    parser.add_argument(
        "--profile",
        default="",
        help="a folder of notebooks/profiles with the parameters of a model and a machine: pocket, colab-t4, ...",
    )
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter, its value as in Python",
    )
    parser.add_argument(
        "--again", action="store_true", help="run even if the output is there already"
    )
    asked = parser.parse_args(arguments)
    try:
        parameters, known = dict(asked.p), read_parameters(asked.notebook)
        for name in parameters.keys() & {
            name for name, parameter in known.items() if parameter["inferred_type_name"] != "str"
        }:
            with contextlib.suppress(
                ValueError, SyntaxError
            ):  # what is no literal stays text, and is refused for its type
                parameters[name] = ast.literal_eval(parameters[name])
        ran = execute(
            asked.notebook,
            asked.output,
            read_profile(asked.profile, asked.notebook) | parameters,
            again=asked.again,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(
        asked.output
        if ran
        else f"{asked.output} was there already, of the same notebook and parameters (--again runs it anew)"
    )


if __name__ == "__main__":
    main()
