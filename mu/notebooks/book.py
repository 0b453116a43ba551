"""What is generated in the notebooks, and of them in the README: badge, navigation, first cell, contents. `python -m mu.notebooks.book` writes it; `python -m mu.notebooks.book --check` writes nothing, and says what
is stale and what a notebook lacks (`faults`); `python -m mu.notebooks.book --minutes reports/pocket/notebooks ...` also takes over how long the executed notebooks of these folders took."""

import argparse
import ast
import sys
from pathlib import Path
from statistics import median

import nbformat

from mu import ROOT
from mu.files import fill
from mu.notebooks.colab import address, badge, bootstrap
from mu.notebooks.run import read_parameters

START, BEGIN, END = "00_start_here", "<!-- generated -->", "<!-- /generated -->"
LONGEST, TEXT = 20, 0.6  # lines of a code cell; text cells for each code cell


def question(notebook):
    """A read notebook's headline, which is a question."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def overview(folder):
    """The README's table of notebooks: question (their headline), GPU and minutes (their metadata, as measured), Colab (their first code cell)."""
    lines = [
        "| notebook | question | GPU | minutes on two cores, as in the demo, in make paper or in make attacks | Colab |",
        "|---|---|---|---|---|",
    ]
    for file in sorted(Path(folder).glob("*.ipynb")):
        read = nbformat.read(file, 4)
        colab = (
            badge(file, address()) or "✓"
            if any("google.colab" in cell.source for cell in read.cells)
            else "–"
        )
        lines.append(
            f"| [{file.stem}]({Path(folder).name}/{file.name}) | {question(read)} | {read.metadata['mu'].get('gpu', 'no')} | {read.metadata['mu']['minutes'] or 'not measured'} | {colab} |"
        )
    return "\n".join(lines) + "\n"


def contents(notebooks):
    """Markdown: the notebooks in their order, each with its question."""
    return "## Contents\n\n" + "\n".join(
        f"- [{file.stem}]({file.name}): {question(nbformat.read(file, 4))}" for file in notebooks
    )


def dressed(file, notebooks, at):
    """A notebook, read, with what is generated of it: below the headline its badge (of the repository `at`; "" for none) and the way to its neighbours, its first code cell, and, in
    the first notebook, the contents."""
    read, place = nbformat.read(file, 4), notebooks.index(file)
    way = [
        *(f"[← {f.stem}]({f.name})" for f in notebooks[max(0, place - 1) : place]),
        f"[contents]({START}.ipynb#Contents)",
        *(f"[{f.stem} →]({f.name})" for f in notebooks[place + 1 : place + 2]),
    ]
    head, *rest = read.cells[0].source.split("\n\n")
    kept = (
        "\n\n".join(rest).split(END)[-1].lstrip("\n")
        if END in read.cells[0].source
        else "\n\n".join(rest)
    )
    read.cells[0].source = "\n\n".join(
        [head, "\n".join([BEGIN, *filter(None, [badge(file, at)]), " · ".join(way), END]), kept]
    )
    next(cell for cell in read.cells if cell.cell_type == "code").source = bootstrap(at)
    if file.stem == START:
        known = next(
            (cell for cell in read.cells if "contents" in cell.metadata.get("tags", [])), None
        )
        if known is None:
            known = nbformat.v4.new_markdown_cell(metadata={"tags": ["contents"]}, id="contents")
            read.cells.insert(
                len(read.cells) - 1, known
            )  # what this showed, and what is next, stays the last
        known.source = contents(notebooks)
    return read


def stale(folder, at):
    """Those of a folder's notebooks that are not as `dressed` makes them."""
    notebooks = sorted(Path(folder).glob("*.ipynb"))
    return [
        file
        for file in notebooks
        if nbformat.writes(dressed(file, notebooks, at)) != nbformat.writes(nbformat.read(file, 4))
    ]


def faults(file):
    """What a notebook lacks, in words; empty where it lacks nothing: a title that asks, what goes in and comes out and is needed, one cell of parameters that each have words, checks, what one
    should see, what it showed with its limits and what is next, minutes in its metadata; outputs are stripped, cells are short, and there is enough text between them."""
    read = nbformat.read(file, 4)
    code, text = ([c for c in read.cells if c.cell_type == kind] for kind in ("code", "markdown"))
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]

    def lines(c):
        return [line for line in c.source.splitlines() if line.strip()]

    first, last, all_text = (
        read.cells[0].source,
        read.cells[-1].source,
        "\n".join(c.source for c in text),
    )
    said = (
        []
        if first.startswith("# ") and "?" in first.splitlines()[0]
        else ["the title, a heading in the first cell, is no question"]
    )
    said += [
        f"the first cell does not say {part}"
        for part in ("**Goes in:**", "**Comes out:**", "**Needs:**")
        if part not in first
    ]
    said += [
        f"the last cell has no {part}"
        for part in ("What this showed", "**Limits.**", "**Next")
        if part not in last
    ]
    said += [
        f"no text says {part}" for part in ("You should see", "## Checks") if part not in all_text
    ]
    said += ["there is no check (assert)"] if not any("assert" in c.source for c in code) else []
    said += (
        ["the first code cell does not prepare Colab"]
        if "google.colab" not in code[0].source
        else []
    )
    said += [
        f"outputs are not stripped: {lines(c)[0]}" for c in code if c.outputs or c.execution_count
    ]
    said += [
        f"a cell has {len(lines(c))} lines, {LONGEST} is the most: {lines(c)[0]}"
        for c in code
        if c not in tagged and len(lines(c)) > LONGEST
    ]
    said += (
        [f"{len(text)} text cells are few beside {len(code)} of code"]
        if len(text) < TEXT * len(code)
        else []
    )
    said += [
        f"the metadata have no mu.{key}"
        for key in ("minutes",)
        if key not in read.metadata.get("mu", {})
    ]
    if len(tagged) != 1:
        return [*said, f"{len(tagged)} cells are tagged `parameters`: it must be one"]
    try:
        known, written = read_parameters(file), ast.parse(tagged[0].source).body
    except ValueError as error:
        return [*said, str(error)]
    said += (
        [
            "a line of the parameters is not `name: type = value  # meaning`, so that papermill would not read it"
        ]
        if [getattr(getattr(n, "target", None), "id", "") for n in written] != list(known)
        else []
    )
    return said + [
        f"the parameter {name} has no words"
        for name, parameter in known.items()
        if not parameter["help"]
    ]


def timed(folders):
    """Notebook → minutes, as papermill measured them, the median over its executed copies in these folders. Copies that only found what others had done count as well: name folders of first runs."""
    found = {}
    for file in (file for folder in folders for file in sorted(Path(folder).glob("*.ipynb"))):
        ran = nbformat.read(file, 4).metadata.get("papermill", {})
        if ran.get("duration") and not file.stem.endswith(".unfinished"):
            found.setdefault(Path(ran["input_path"]).stem, []).append(ran["duration"] / 60)
    return {name: round(median(minutes), 1) for name, minutes in found.items()}


def write_minutes(folder, minutes):
    """Put measured minutes (`timed`) into the metadata of the notebooks of a folder."""
    for file in sorted(Path(folder).glob("*.ipynb")):
        if file.stem in minutes:
            read = nbformat.read(file, 4)
            read.metadata["mu"]["minutes"] = minutes[file.stem]
            nbformat.write(read, file)


def write(folder, at):
    """Write what is generated into each notebook of a folder; the same again changes nothing."""
    notebooks = sorted(Path(folder).glob("*.ipynb"))
    for file in notebooks:
        nbformat.write(dressed(file, notebooks, at), file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; say what is stale, and what a notebook lacks",
    )
    parser.add_argument(
        "--minutes",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders of executed notebooks, whose times are taken over",
    )
    asked, folder = parser.parse_args(), ROOT / "notebooks"
    if asked.check:
        found = [
            f"{file.name}: stale; python -m mu.notebooks.book writes it anew"
            for file in stale(folder, address())
        ]
        found += [
            f"{file.name}: {words}"
            for file in sorted(folder.glob("*.ipynb"))
            for words in faults(file)
        ]
        found += (
            []
            if f"<!-- notebooks -->\n{overview(folder)}<!-- /notebooks -->"
            in (ROOT / "README.md").read_text()
            else [
                "README.md: its table of notebooks is stale; python -m mu.notebooks.book writes it anew"
            ]
        )
        sys.exit("\n".join(found) or 0)
    write_minutes(folder, timed(asked.minutes))
    write(folder, address())
    fill(ROOT / "README.md", overview(folder), "notebooks")
