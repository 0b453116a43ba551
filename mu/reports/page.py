"""Pages that open from disk and load nothing from elsewhere: the report, and each executed notebook."""

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

# nbconvert's page, less what it would load from the network
NOTEBOOK_PAGE = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in (
        "html_head_js",
        "jupyter_widgets",
        "html_head_js_mathjax",
        "html_head_js_mermaidjs",
    )
)
TEMPLATE = Path(__file__).with_name("page.html.j2")


def inside(file, folder, what):
    """The link from `folder`'s index.html to `file`, which may be named from `folder` or from the working directory.

    A notebook that is running now counts as there: its page appears when it ends. Raises FileNotFoundError for a file that is not there, ValueError for one outside the folder: the link would break when
    the folder is moved."""
    folder = Path(folder).resolve()

    def there(path):
        return path.is_file() or path.with_name(f"{path.stem}.unfinished.ipynb").is_file()

    found = next((path for path in (folder / file, Path(file)) if there(path)), None)
    if found is None:
        raise FileNotFoundError(
            f"{what}: {file} is neither in {folder} nor in {Path.cwd()}: save it before the report is written"
        )
    link = Path(os.path.relpath(found.resolve(), folder)).as_posix()
    if link.startswith("../"):
        raise ValueError(
            f"{what}: {file} lies outside {folder}: save it below that folder, so that the report can be moved as a whole"
        )
    return link


def executed(folder, running):
    """Links (page, words) to the executed notebooks below `folder`/notebooks and, of the ablations, `folder`/ablations/notebooks, for `write_report`; with the one that is `running` now (its name),
    whose page appears when it ends."""
    folder = Path(folder)
    pages = {page.stem: page for page in sorted((folder / "notebooks").glob("*.html"))}
    me = folder / "notebooks" / f"{running}.html"
    if me.with_name(f"{running}.unfinished.ipynb").exists():
        pages[running] = me
    return [(page, words) for words, page in pages.items()] + [
        (page, f"ablations: {page.stem}")
        for page in sorted((folder / "ablations" / "notebooks").glob("*.html"))
    ]


def not_kept(folder, files):
    """Those of a page's files (named from its folder) that Git ignores although it keeps the page: who clones the repository has the page without them. None where the whole folder is
    ignored, or is in no repository."""
    asked = (
        subprocess.run(
            ["git", "check-ignore", "-z", "--stdin"],
            cwd=folder,
            input="\0".join(["index.html", *files]),
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    ignored = set(filter(None, asked.stdout.split("\0"))) if asked else set()
    return set() if "index.html" in ignored else ignored


def picture(card, folder, what):
    """A card with its figure as a link, and with an alt text."""
    if "figure" not in card:
        return card
    alt = (
        card.get("alt") or card.get("question") or card.get("caption") or card.get("answer")
    )  # the answer stands beside it
    if not alt:
        raise ValueError(
            f"{what}: {card['figure']} has no words: give it an alt, a question, a caption or an answer"
        )
    return card | {"figure": inside(card["figure"], folder, what), "alt": alt}


def as_table(table):
    """{"caption", "head", "rows", "numeric"} of a DataFrame or of a CSV file; empty cells are shown as a dash."""
    caption, data = table if isinstance(table, tuple) else ("", table)
    data = data if isinstance(data, pd.DataFrame) else pd.read_csv(data)
    if data.index.nlevels > 1 or data.index.name is not None:
        data = data.reset_index()

    def text(value):
        return "–" if pd.isna(value) else f"{value:.3g}" if isinstance(value, float) else str(value)

    return {
        "caption": caption,
        "links": [],
        "head": [str(name) for name in data.columns],
        "numeric": [pd.api.types.is_numeric_dtype(kind) for kind in data.dtypes],
        "rows": [[text(value) for value in row] for row in data.itertuples(index=False)],
    }


def save_table(table, folder, name, caption=""):
    """A table as `<folder>/tables/<name>.csv`, .md and .tex (booktabs; wide ones scaled by graphicx), numbers to four figures, missing ones as a dash. Returns it."""
    folder = Path(folder) / "tables"
    folder.mkdir(parents=True, exist_ok=True)

    def rounded(value):
        return (
            float(f"{value:.4g}") if isinstance(value, float) else value
        )  # also in a column that has words, which float_format passes over

    table.map(rounded).to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")

    def text(value):
        return "–" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [
        [str(column) for column in table.columns],
        ["---"] * len(table.columns),
        *(map(text, line) for line in table.itertuples(index=False)),
    ]
    (folder / f"{name}.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
    latex = (
        table.map(text)
        .replace("–", "--")
        .to_latex(index=False, escape=True, caption=caption or None, label=f"tab:{name}")
    )
    if len(table.columns) > 7:  # wider than a page
        latex = latex.replace(
            r"\begin{tabular}", "\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}"
        ).replace(r"\end{tabular}", r"\end{tabular}}")
    (folder / f"{name}.tex").write_text(
        latex.replace("–", "--")
        .replace("→", r"$\to$")
        .replace("✓", "yes")
        .replace("✗", "no")
        .replace("÷", r"$\div$")
        .replace("−", "$-$")
        .replace("ζ", r"$\zeta$")
        .replace("τ", r"$\tau$")
        .replace("η", r"$\eta$")
    )
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
    """Write `folder`/index.html, whole or not at all, and return its path.

    title: one line. claim: sentences, each a paragraph, with the measured figures.
    terms: {word: what it means here}, below the headline. caveats: sentences that belong to the claim, a list after the explorer.
    courses: what `mu.reports.explorer.save_sprite_sheet` returned, for a slider over the steps of attacks.
    headline, cards: {"question", "answer", "figure", "caption", "alt"}: figure a SVG or PNG below `folder`, each word optional.
    tables: {caption: DataFrame or CSV path, or (one of them, the name that `save_table` gave its files), which are linked then}. protocol: a dict, nested ones as lists.
    notebooks: paths (HTML or ipynb) or (path, words); those that a repository does not keep (`not_kept`) are named, and not linked.
    Everything is text and is escaped; nothing is loaded from elsewhere. Raises FileNotFoundError or ValueError that names the figure,
    the notebook or the card that is missing, outside the folder or without words."""
    folder = Path(folder)
    for course in courses:
        inside(course["sheet"], folder, f"pictures of {course['name']}")
    links = []
    for entry in notebooks:
        file, words = (entry, Path(entry).stem) if isinstance(entry, (str, Path)) else entry
        links.append({"href": inside(file, folder, "notebook"), "words": words})
    gone = not_kept(folder, [link["href"] for link in links])
    shown = []
    for caption, table in (tables or {}).items():
        table, name = table if isinstance(table, tuple) else (table, "")
        files = (
            [
                (kind, inside(f"tables/{name}.{kind}", folder, f"table {name}"))
                for kind in ("csv", "md", "tex")
            ]
            if name
            else []
        )
        shown.append(as_table((caption, table)) | {"links": files})
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE.name).render(
        title=title,
        claim=[claim] if isinstance(claim, str) else claim,
        language=language,
        headline=picture(headline, folder, "headline") if headline else None,
        courses=list(courses),
        cards=[
            picture(card, folder, f"card {number} ({card.get('question', 'no question')})")
            for number, card in enumerate(cards, 1)
        ],
        terms=terms or {},
        caveats=list(caveats),
        tables=shown,
        protocol=protocol or {},
        notebooks=[link for link in links if link["href"] not in gone],
        others=[link for link in links if link["href"] in gone],
        folders=sorted({href.rpartition("/")[0] for href in gone}),
    )
    with atomic(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "index.html"


class _Exporter(HTMLExporter):
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
    """HTML text of an executed notebook: pictures are in the page, formulas are MathML, which browsers draw by themselves.

    executed: the nbformat node; notebook: the path that it came from, where the pictures that its text cells link to are looked for."""
    title = next(
        (
            cell.source.splitlines()[0].lstrip("# ")
            for cell in executed.cells
            if cell.source.startswith("# ")
        ),
        Path(notebook).stem,
    )
    resources = {"metadata": {"name": title, "path": str(Path(notebook).parent)}}
    return _Exporter(raw_template=NOTEBOOK_PAGE).from_notebook_node(executed, resources)[0]
