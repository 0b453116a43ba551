"""Write the generated parts of the notebooks and of the README.

These are each notebook's badge, navigation and first code cell, the table of contents, and the
README's table of notebooks.

    python -m mu.notebooks.book                     # write them
    python -m mu.notebooks.book --check             # list stale parts and what notebooks lack
    python -m mu.notebooks.book --minutes FOLDER    # also adopt the times of executed notebooks
    python -m mu.notebooks.book --repository https://github.com/OWNER/NAME    # of a fork
"""

import argparse
import ast
import sys
from pathlib import Path
from statistics import median

import nbformat

from mu import ROOT
from mu.files import fill
from mu.notebooks.colab import address, badge, bootstrap, set_address
from mu.notebooks.run import read_parameters

NOTEBOOKS = ROOT / "notebooks"
START, BEGIN, END = "00_start_here", "<!-- generated -->", "<!-- /generated -->"
MAX_LINES = 20  # of a code cell
MIN_TEXT = 0.6  # text cells per code cell
HEADER = (
    "| notebook | question | GPU "
    "| minutes on two cores, as in the demo, in make paper or in make attacks | Colab |"
)


def list_notebooks(folder):
    """Return the notebooks of a folder in their order."""
    return sorted(Path(folder).glob("*.ipynb"))


def title(notebook):
    """Return the title of a notebook that was read: a question."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def overview(folder):
    """Return the README's table of notebooks in Markdown.

    GPU and minutes come from the notebooks' metadata.
    """
    lines = [HEADER, "|---|---|---|---|---|"]
    for file in list_notebooks(folder):
        notebook = nbformat.read(file, 4)
        metadata = notebook.metadata["mu"]
        runs_on_colab = any("google.colab" in cell.source for cell in notebook.cells)
        row = [
            f"[{file.stem}]({Path(folder).name}/{file.name})",
            title(notebook),
            metadata.get("gpu", "no"),
            str(metadata["minutes"] or "not measured"),
            (badge(file, address()) or "✓") if runs_on_colab else "–",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def contents(notebooks):
    """Return the table of contents in Markdown: the notebooks and their questions."""
    titles = {file: title(nbformat.read(file, 4)) for file in notebooks}
    lines = [f"- [{file.stem}]({file.name}): {text}" for file, text in titles.items()]
    return "## Contents\n\n" + "\n".join(lines)


def navigation(file, notebooks):
    """Return links to the previous notebook, the contents and the next notebook, in Markdown."""
    place = notebooks.index(file)
    before, after = notebooks[max(0, place - 1) : place], notebooks[place + 1 : place + 2]
    links = [
        *(f"[← {f.stem}]({f.name})" for f in before),
        f"[contents]({START}.ipynb#Contents)",
        *(f"[{f.stem} →]({f.name})" for f in after),
    ]
    return " · ".join(links)


def generate(file, notebooks, at):
    """Read a notebook and return it with its generated parts up to date.

    at: address of the repository for badge and first code cell; "" for none.
    """
    notebook = nbformat.read(file, 4)
    head, _, text = notebook.cells[0].source.partition("\n\n")
    text = text.split(END)[-1].lstrip("\n")
    block = "\n".join([BEGIN, *filter(None, [badge(file, at)]), navigation(file, notebooks), END])
    notebook.cells[0].source = "\n\n".join([head, block, text])
    first_code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first_code.source = bootstrap(at)
    if file.stem == START:
        tagged = [c for c in notebook.cells if "contents" in c.metadata.get("tags", [])]
        if not tagged:
            cell = nbformat.v4.new_markdown_cell(metadata={"tags": ["contents"]}, id="contents")
            notebook.cells.insert(-1, cell)  # the summary remains the last cell
            tagged = [cell]
        tagged[0].source = contents(notebooks)
    return notebook


def stale(folder, at):
    """Return the notebooks of a folder whose generated parts are out of date."""

    def differs(file):
        generated = nbformat.writes(generate(file, notebooks, at))
        return generated != nbformat.writes(nbformat.read(file, 4))

    notebooks = list_notebooks(folder)
    return [file for file in notebooks if differs(file)]


def faults(file):
    """Return what a notebook lacks, as a list of messages.

    A notebook needs a question as title; inputs, outputs and requirements; documented parameters;
    checks; expected results; a summary with limits and next steps; measured minutes. Its outputs
    are stripped, its cells short, and text accompanies the code.
    """
    notebook = nbformat.read(file, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    found = _text_faults(notebook, len(code)) + _code_faults(code, parameters)
    if "minutes" not in notebook.metadata.get("mu", {}):
        found.append("the metadata lack mu.minutes")
    return found + _parameter_faults(file, parameters)


def _text_faults(notebook, code_cells):
    """Return what the text cells lack."""
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    first, last, found = notebook.cells[0].source, notebook.cells[-1].source, []
    if not first.startswith("# ") or "?" not in first.splitlines()[0]:
        found.append("the first cell has no title that is a question: start it with `# …?`")
    needed = {
        "the first cell lacks": (("**Goes in:**", "**Comes out:**", "**Needs:**"), first),
        "the last cell lacks": (("What this showed", "**Limits.**", "**Next"), last),
        "no text cell has": (("You should see", "## Checks"), "\n".join(text)),
    }
    for message, (parts, source) in needed.items():
        found += [f"{message} {part}" for part in parts if part not in source]
    if len(text) < MIN_TEXT * code_cells:
        found.append(f"{len(text)} text cells are too few for {code_cells} code cells")
    return found


def _code_faults(code, parameters):
    """Return what is wrong with the code cells."""
    found = []
    if not any("assert" in cell.source for cell in code):
        found.append("no cell checks anything: add an assert")
    if "google.colab" not in code[0].source:
        found.append("the first code cell does not prepare Colab")
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.outputs or cell.execution_count:
            found.append(f"outputs are not stripped: {lines[0]}")
        if cell not in parameters and len(lines) > MAX_LINES:
            found.append(f"a cell has {len(lines)} lines, more than {MAX_LINES}: {lines[0]}")
    return found


def _parameter_faults(file, cells):
    """Return what is wrong with the parameters of a notebook."""
    if len(cells) != 1:
        return [f"{len(cells)} cells are tagged `parameters`: tag one"]
    try:
        known = read_parameters(file)
    except ValueError as error:
        return [str(error)]
    found = []
    statements = ast.parse(cells[0].source).body
    names = [getattr(getattr(node, "target", None), "id", "") for node in statements]
    if names != list(known):
        found.append("two parameters have the same name")
    undocumented = [name for name, parameter in known.items() if not parameter.meaning]
    return found + [f"the parameter {name} has no description" for name in undocumented]


def read_minutes(folders):
    """Return notebook → minutes that papermill measured, the median over its executed copies.

    Copies that found finished runs count as well: pass folders of first runs.
    """
    found = {}
    for file in (file for folder in folders for file in list_notebooks(folder)):
        ran = nbformat.read(file, 4).metadata.get("papermill", {})
        if ran.get("duration") and not file.stem.endswith(".unfinished"):
            found.setdefault(Path(ran["input_path"]).stem, []).append(ran["duration"] / 60)
    return {name: round(median(minutes), 1) for name, minutes in found.items()}


def write_minutes(folder, minutes):
    """Write measured minutes into the metadata of the notebooks of a folder."""
    for file in list_notebooks(folder):
        if file.stem in minutes:
            notebook = nbformat.read(file, 4)
            notebook.metadata["mu"]["minutes"] = minutes[file.stem]
            nbformat.write(notebook, file)


def write(folder, at):
    """Write the generated parts of the notebooks of a folder."""
    notebooks = list_notebooks(folder)
    for file in notebooks:
        nbformat.write(generate(file, notebooks, at), file)


def check():
    """Return all stale parts and faults of the repository's notebooks, as messages."""
    fix = "run python -m mu.notebooks.book"
    found = [
        f"{file.name}: generated parts are stale: {fix}" for file in stale(NOTEBOOKS, address())
    ]
    for file in list_notebooks(NOTEBOOKS):
        found += [f"{file.name}: {fault}" for fault in faults(file)]
    table = f"<!-- notebooks -->\n{overview(NOTEBOOKS)}<!-- /notebooks -->"
    if table not in (ROOT / "README.md").read_text():
        found.append(f"README.md: the table of notebooks is stale: {fix}")
    return found


def main():
    """Write or check the generated parts from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; list stale parts")
    executed = "folders of executed notebooks whose times are adopted"
    parser.add_argument("--minutes", nargs="+", default=[], metavar="FOLDER", help=executed)
    fork = "address of the repository on GitHub for Colab, such as a fork's; an empty one: no Colab"
    parser.add_argument("--repository", metavar="ADDRESS", help=fork)
    options = parser.parse_args()
    if options.repository is not None:
        set_address(options.repository)
    if options.check:
        sys.exit("\n".join(check()) or 0)
    write_minutes(NOTEBOOKS, read_minutes(options.minutes))
    write(NOTEBOOKS, address())
    fill(ROOT / "README.md", overview(NOTEBOOKS), "notebooks")


if __name__ == "__main__":
    main()
