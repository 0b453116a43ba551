"""What is generated in the notebooks, and of them in the README: badge, navigation, first cell, contents. `python -m mu.book` writes it, `python -m mu.book --check` only says what is stale;
`python -m mu.book --minutes reports/pocket/notebooks ...` also takes over how long the executed notebooks of these folders took."""

import sys
from pathlib import Path
from statistics import median

import nbformat

from mu.colab import ROOT, address, badge, bootstrap
from mu.runs import fill

START, BEGIN, END = "00_start_here", "<!-- generated -->", "<!-- /generated -->"


def question(notebook):
    """A read notebook's headline, which is a question."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def overview(folder):
    """The README's table of notebooks: question (their headline), GPU and minutes (their metadata, as measured), Colab (their first code cell)."""
    lines = ["| notebook | question | GPU | minutes on two cores, as in the demo, in make paper or in make attacks | Colab |", "|---|---|---|---|---|"]
    for file in sorted(Path(folder).glob("*.ipynb")):
        read = nbformat.read(file, 4)
        colab = badge(file, address()) or "✓" if any("google.colab" in cell.source for cell in read.cells) else "–"
        lines.append(f"| [{file.stem}]({Path(folder).name}/{file.name}) | {question(read)} | {read.metadata['mu'].get('gpu', 'no')} | {read.metadata['mu']['minutes'] or 'not measured'} | {colab} |")
    return "\n".join(lines) + "\n"


def contents(notebooks):
    """Markdown: the notebooks in their order, each with its question."""
    return "## Contents\n\n" + "\n".join(f"- [{file.stem}]({file.name}): {question(nbformat.read(file, 4))}" for file in notebooks)


def dressed(file, notebooks, at):
    """A notebook, read, with what is generated of it: below the headline its badge (of the repository `at`; "" for none) and the way to its neighbours, its first code cell, and, in
    the first notebook, the contents."""
    read, place = nbformat.read(file, 4), notebooks.index(file)
    way = [*(f"[← {f.stem}]({f.name})" for f in notebooks[max(0, place - 1):place]), f"[contents]({START}.ipynb#Contents)", *(f"[{f.stem} →]({f.name})" for f in notebooks[place + 1:place + 2])]
    head, *rest = read.cells[0].source.split("\n\n")
    kept = "\n\n".join(rest).split(END)[-1].lstrip("\n") if END in read.cells[0].source else "\n\n".join(rest)
    read.cells[0].source = "\n\n".join([head, "\n".join([BEGIN, *filter(None, [badge(file, at)]), " · ".join(way), END]), kept])
    next(cell for cell in read.cells if cell.cell_type == "code").source = bootstrap(at)
    if file.stem == START:
        known = next((cell for cell in read.cells if "contents" in cell.metadata.get("tags", [])), None)
        if known is None:
            known = nbformat.v4.new_markdown_cell(metadata={"tags": ["contents"]}, id="contents")
            read.cells.insert(len(read.cells) - 1, known)  # what this showed, and what is next, stays the last
        known.source = contents(notebooks)
    return read


def stale(folder, at):
    """Those of a folder's notebooks that are not as `dressed` makes them."""
    notebooks = sorted(Path(folder).glob("*.ipynb"))
    return [file for file in notebooks if nbformat.writes(dressed(file, notebooks, at)) != nbformat.writes(nbformat.read(file, 4))]


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
    if sys.argv[1:] == ["--check"]:
        found = stale(ROOT / "notebooks", address())
        sys.exit(f"stale: {', '.join(file.name for file in found)}; python -m mu.book writes them anew" if found else 0)
    if sys.argv[1:2] == ["--minutes"]:
        write_minutes(ROOT / "notebooks", timed(sys.argv[2:]))
    write(ROOT / "notebooks", address())
    fill(ROOT / "README.md", overview(ROOT / "notebooks"), "notebooks")
