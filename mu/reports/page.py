"""Pages that open from disk and load nothing: the report and the executed notebooks."""

import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from mu.files import atomic

# The page of nbconvert without the blocks that load scripts from the network.
NOTEBOOK_PAGE = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in (
        "html_head_js",
        "jupyter_widgets",
        "html_head_js_mathjax",
        "html_head_js_mermaidjs",
    )
)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
LATEX = {
    "–": "--",
    "→": r"$\to$",
    "✓": "yes",
    "✗": "no",
    "÷": r"$\div$",
    "−": "$-$",
    "ζ": r"$\zeta$",
    "τ": r"$\tau$",
    "η": r"$\eta$",
}


def inside(file, folder, what):
    """Return the link from `folder`'s index.html to `file`.

    file: relative to `folder` or to the working directory; a running notebook counts as present,
    because its page appears when it ends. what: name of the file in error messages.
    Raises FileNotFoundError for a missing file, and ValueError for one outside the folder, whose
    link would break when the folder is moved.
    """
    folder = Path(folder).resolve()
    found = next((path for path in (folder / file, Path(file)) if _present(path)), None)
    if found is None:
        raise FileNotFoundError(
            f"{what}: {file} is neither in {folder} nor in {Path.cwd()}: "
            "save it before the report is written"
        )
    link = Path(os.path.relpath(found.resolve(), folder)).as_posix()
    if link.startswith("../"):
        raise ValueError(
            f"{what}: {file} is outside {folder}: save it below that folder, "
            "so that the report can be moved as a whole"
        )
    return link


def _present(path):
    return path.is_file() or path.with_name(f"{path.stem}.unfinished.ipynb").is_file()


def executed(folder, running):
    """Return links (page, title) to the executed notebooks of a report, for `write_report`.

    They are below `<folder>/notebooks` and, of the ablations, `<folder>/ablations/notebooks`.
    running: name of the notebook that is running, whose page appears when it ends.
    """
    folder = Path(folder)
    pages = {page.stem: page for page in sorted((folder / "notebooks").glob("*.html"))}
    page = folder / "notebooks" / f"{running}.html"
    if page.with_name(f"{running}.unfinished.ipynb").exists():
        pages[running] = page
    links = [(page, title) for title, page in pages.items()]
    for page in sorted((folder / "ablations" / "notebooks").glob("*.html")):
        links.append((page, f"ablations: {page.stem}"))
    return links


def not_kept(folder, files):
    """Return the files, relative to `folder`, that Git ignores although it keeps index.html.

    A clone of the repository has the page without them. Empty if Git ignores the whole folder or
    does not know it.
    """
    if not shutil.which("git"):
        return set()
    result = subprocess.run(
        ["git", "check-ignore", "-z", "--stdin"],
        cwd=folder,
        input="\0".join(["index.html", *files]),
        capture_output=True,
        text=True,
    )
    ignored = set(filter(None, result.stdout.split("\0")))
    return set() if "index.html" in ignored else ignored


def picture(card, folder, what):
    """Return a card with its figure as a link and an alt text; without a figure, unchanged.

    Raises ValueError for a figure without any text.
    """
    if "figure" not in card:
        return card
    # The answer is the last choice, because it is next to the figure.
    alt = card.get("alt") or card.get("question") or card.get("caption") or card.get("answer")
    if not alt:
        raise ValueError(
            f"{what}: {card['figure']} has no text: add an alt, a question, a caption or an answer"
        )
    return card | {"figure": inside(card["figure"], folder, what), "alt": alt}


def _cell(value, digits):
    """Return a table cell as text; a missing value is a dash."""
    if pd.isna(value):
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def as_table(table, caption=""):
    """Return {"caption", "links", "head", "rows", "numeric"} of a DataFrame or a CSV file."""
    data = table if isinstance(table, pd.DataFrame) else pd.read_csv(table)
    if data.index.nlevels > 1 or data.index.name is not None:
        data = data.reset_index()
    return {
        "caption": caption,
        "links": [],
        "head": [str(name) for name in data.columns],
        "numeric": [pd.api.types.is_numeric_dtype(kind) for kind in data.dtypes],
        "rows": [[_cell(value, 3) for value in row] for row in data.itertuples(index=False)],
    }


def save_table(table, folder, name, caption=""):
    """Save a table as `<folder>/tables/<name>.csv`, .md and .tex, and return it.

    Numbers have four significant digits, missing values are dashes. The LaTeX table uses booktabs,
    and graphicx if it is wider than a page.
    """
    folder = Path(folder) / "tables"
    folder.mkdir(parents=True, exist_ok=True)

    def rounded(value):
        # `float_format` skips columns that also hold text.
        return float(f"{value:.4g}") if isinstance(value, float) else value

    table.map(rounded).to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
    text = table.map(lambda value: _cell(value, 4))
    lines = [map(str, table.columns), ["---"] * len(table.columns), *text.itertuples(index=False)]
    markdown = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    (folder / f"{name}.md").write_text(markdown)
    latex = text.to_latex(index=False, escape=True, caption=caption or None, label=f"tab:{name}")
    if len(table.columns) > 7:  # wider than a page
        start, end = r"\begin{tabular}", r"\end{tabular}"
        latex = latex.replace(start, "\\resizebox{\\linewidth}{!}{%\n" + start)
        latex = latex.replace(end, end + "}")
    for character, command in LATEX.items():
        latex = latex.replace(character, command)
    (folder / f"{name}.tex").write_text(latex)
    return table


def write_report(
    folder,
    *,
    title,
    claim,
    terms=None,
    caveats=(),
    headline=None,
    courses=(),
    cards=(),
    tables=None,
    protocol=None,
    notebooks=(),
    language="en",
):
    """Write `folder`/index.html atomically and return its path.

    title: one line. claim: sentences, one paragraph each. terms: {term: meaning}, below the
    headline. caveats: sentences, a list after the explorer.
    headline, cards: {"question", "answer", "figure", "caption", "alt"}, each optional; figure is an
    SVG or PNG below `folder`. courses: of `mu.reports.explorer.save_sprite_sheet`.
    tables: {caption: table}, a DataFrame or CSV path, or (table, name) to link the files of
    `save_table`. protocol: a dict; nested ones become lists.
    notebooks: paths (HTML or ipynb) or (path, title); those `not_kept` are listed without a link.
    All text is escaped. Raises FileNotFoundError or ValueError for a file that is missing or
    outside the folder, and for a figure without text.
    """
    folder = Path(folder)
    for course in courses:
        inside(course["sheet"], folder, f"pictures of {course['name']}")
    links = [_notebook_link(entry, folder) for entry in notebooks]
    gone = not_kept(folder, [link["href"] for link in links])
    page = TEMPLATES.get_template("page.html.j2").render(
        title=title,
        claim=[claim] if isinstance(claim, str) else claim,
        language=language,
        headline=picture(headline, folder, "headline") if headline else None,
        courses=list(courses),
        cards=[_card(card, number, folder) for number, card in enumerate(cards, 1)],
        terms=terms or {},
        caveats=list(caveats),
        tables=[_linked_table(*entry, folder) for entry in (tables or {}).items()],
        protocol=protocol or {},
        notebooks=[link for link in links if link["href"] not in gone],
        others=[link for link in links if link["href"] in gone],
        folders=sorted({href.rpartition("/")[0] for href in gone}),
    )
    with atomic(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "index.html"


def _card(card, number, folder):
    return picture(card, folder, f"card {number} ({card.get('question', 'no question')})")


def _notebook_link(entry, folder):
    file, title = (entry, Path(entry).stem) if isinstance(entry, (str, Path)) else entry
    return {"href": inside(file, folder, "notebook"), "words": title}


def _linked_table(caption, table, folder):
    """Return `as_table` of a table, with links to the files of (table, name)."""
    if not isinstance(table, tuple):
        return as_table(table, caption)
    table, name = table
    files = [
        (kind, inside(f"tables/{name}.{kind}", folder, f"table {name}"))
        for kind in ("csv", "md", "tex")
    ]
    return as_table(table, caption) | {"links": files}


class _Exporter(HTMLExporter):
    """nbconvert's HTML exporter, with formulas as MathML, which browsers draw without a script."""

    @pass_context
    def markdown2html(self, context, source):
        class Renderer(IPythonRenderer):
            def block_math(self, body):
                return convert(body, display="block")

            def inline_math(self, body):
                return convert(body)

        folder = context["resources"]["metadata"]["path"]
        return MarkdownWithMath(
            renderer=Renderer(escape=False, embed_images=True, path=folder)
        ).render(source)


def notebook_page(executed, notebook):
    """Return the HTML page of an executed notebook, with its images embedded.

    executed: the nbformat node. notebook: the path it was read from; images that its text cells
    link to are relative to its folder.
    """
    headings = (cell.source for cell in executed.cells if cell.source.startswith("# "))
    heading = next(headings, None)
    title = heading.splitlines()[0].lstrip("# ") if heading else Path(notebook).stem
    resources = {"metadata": {"name": title, "path": str(Path(notebook).parent)}}
    return _Exporter(raw_template=NOTEBOOK_PAGE).from_notebook_node(executed, resources)[0]
