"""The report page opens from disk, loads nothing and names missing files."""

import html.parser
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from mu.reports.page import executed, write_report


class Reader(html.parser.HTMLParser):
    """Collect tags and text; fail on tags that are not closed in order."""

    void = {"meta", "img", "link", "br"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in self.void else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path):
    for name in (
        "figures/headline.png",
        "figures/a & b.svg",
        "notebooks/20_unlearn.html",
        "tables/quality.csv",
        "notebooks/90_figures.unfinished.ipynb",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a,b\n1,2.34567\nx,\n")
    return tmp_path


def full(folder):
    return write_report(
        folder,
        title="What <b>returns</b>?",
        claim=["First.", "Second & last."],
        headline={
            "figure": "figures/headline.png",
            "alt": "five columns of cats",
            "caption": "Rows: prompts.",
        },
        cards=[
            {
                "question": "How fast?",
                "answer": "Not fast.",
                "figure": folder / "figures/a & b.svg",
            },
            {"question": "And?", "answer": "No figure."},
        ],
        tables={
            "Quality": folder / "tables/quality.csv",
            "Frame": pd.DataFrame({"model": ["meta"], "score": [0.123456], "n": [8]}),
        },
        protocol={
            "seeds": [0, 1, 2],
            "versions": {"torch": "2.13.0"},
            "nothing": None,
            "fast": True,
        },
        notebooks=[
            "notebooks/20_unlearn.html",
            (folder / "notebooks/90_figures.html", "how the figures were made"),
        ],
    )


def test_page_is_complete_and_relative(folder):
    page = full(folder)
    assert page == folder / "index.html"
    text = page.read_text()
    read = Reader(text)
    assert "What <b>returns</b>?" in read.text
    assert read.all("b") == []
    links = [a["href"] for a in read.all("a")] + [i["src"] for i in read.all("img")]
    assert links and not any(link.startswith(("http", "/", "file", "..")) for link in links)
    targets = {a["id"] for _, a in read.tags if "id" in a}
    for link in links:
        if link.startswith("#"):
            assert link[1:] in targets
        elif "90_figures" not in link:  # the running notebook
            assert (folder / unquote(link)).exists()
    assert not read.all("script")
    assert not read.all("link")
    assert "url(" not in text
    assert "@import" not in text
    claims = ("Second & last.", "Not fast.", "No figure.", "how the figures were made")
    values = ("0.123", "2.35", "–", "torch", "2.13.0", "0, 1, 2", "True")
    for words in claims + values:
        assert words in read.text, words


def test_page_is_accessible(folder):
    text = full(folder).read_text()
    read = Reader(text)
    assert [i["alt"] for i in read.all("img")] == ["five columns of cats", "How fast?"]
    assert read.all("html")[0]["lang"] == "en"
    assert any(m.get("name") == "viewport" for m in read.all("meta"))
    assert len(read.all("h1")) == len(read.all("main")) == 1
    assert all("scope" in th for th in read.all("th"))
    scrolled = [d for d in read.all("div") if d.get("class") == "scroll"]
    assert len(scrolled) == 2
    for div in scrolled:
        assert div["tabindex"] == "0", "tables can be scrolled by keyboard"
        assert div["aria-label"]
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'class="skip" href="#main"' in text


def test_small_page(folder):
    read = Reader(write_report(folder, title="T", claim="One sentence.").read_text())
    assert "One sentence." in read.text
    assert not any(read.all(tag) for tag in ("h2", "nav", "img"))


@pytest.mark.parametrize(
    "given, error, words",
    [
        (
            {"cards": [{"question": "Q", "answer": "A", "figure": "figures/none.svg"}]},
            FileNotFoundError,
            r"card 1 \(Q\): figures/none.svg is neither in",
        ),
        (
            {"headline": {"figure": "figures/headline.png"}},
            ValueError,
            "headline: figures/headline.png has no text",
        ),
        (
            {"cards": [{"answer": "A", "figure": __file__}]},
            ValueError,
            "is outside .* save it below that folder",
        ),
        ({"notebooks": ["notebooks/30.html"]}, FileNotFoundError, "notebook: notebooks/30.html"),
    ],
)
def test_missing_files_are_named_and_the_earlier_page_is_kept(folder, given, error, words):
    before = full(folder).read_text()
    with pytest.raises(error, match=words):
        write_report(folder, title="T", claim="C", **given)
    assert (folder / "index.html").read_text() == before
    assert not list(Path(folder).glob(".*tmp"))


def page_of_notebooks(folder, running=""):
    links = executed(folder, running)
    return write_report(folder, title="t", claim="c", notebooks=links).read_text()


def test_executed_notebooks_include_the_running_one(folder):
    unlearn, figures = (
        (folder / "notebooks" / f"{name}.html", name) for name in ("20_unlearn", "90_figures")
    )
    assert executed(folder, "90_figures") == [unlearn, figures]
    assert executed(folder, "30_attack") == [unlearn]
    assert executed(folder / "nowhere", "90_figures") == []
    assert page_of_notebooks(folder, "90_figures").count('href="notebooks/') == 2


def test_notebooks_outside_the_repository_are_listed_without_a_link(folder):
    for name in (
        "notebooks/20_esd-0.html",
        "notebooks/20_esd-10.html",
        "ablations/notebooks/40_ablations.html",
        "ablations/notebooks/21_base-0.html",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("")
    assert [words for _, words in executed(folder, "")] == [
        "20_esd-0",
        "20_esd-10",
        "20_unlearn",
        "ablations: 21_base-0",
        "ablations: 40_ablations",
    ]
    page = page_of_notebooks(folder)
    assert "<details>" not in page
    assert page.count('.html"') == 5, "without a repository all are linked"
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text(
        "**/notebooks/*\n!notebooks/20_unlearn.html\n!ablations/notebooks/40_ablations.html\n"
    )
    linked, listed = page_of_notebooks(folder).split("<details>")
    assert 'href="ablations/notebooks/40_ablations.html"' in linked
    assert 'href="notebooks/20_unlearn.html"' in linked
    assert linked.count('.html"') == 2
    assert "3 more, which are too large" in listed
    assert "ablations: 21_base-0" in listed
    assert "ablations/notebooks and notebooks" in listed
    assert "href=" not in listed, "a clone has no dead links"
    (folder / ".gitignore").write_text("*\n")
    assert "<details>" not in page_of_notebooks(folder), "of an ignored page, all are present"


def test_terms_caveats_and_files_of_tables_are_on_the_page(folder):
    for kind in ("md", "tex"):
        (folder / "tables" / f"quality.{kind}").write_text("")
    page = write_report(
        folder,
        title="t",
        claim="c",
        terms={"CLEAN": "harmless <pictures>"},
        caveats=["Not so."],
        tables={"Quality": (pd.DataFrame({"a": [1]}), "quality"), "Bare": pd.DataFrame({"a": [1]})},
    ).read_text()
    read = Reader(page)
    assert "harmless &lt;pictures&gt;" in page
    assert "<li>Not so.</li>" in page
    links = [a["href"] for a in read.all("a")]
    assert {"#terms", "#caveats"} <= set(links)
    assert [link for link in links if link.startswith("tables/")] == [
        f"tables/quality.{kind}" for kind in ("csv", "md", "tex")
    ]
    with pytest.raises(FileNotFoundError, match="table nothing: tables/nothing.csv"):
        write_report(
            folder, title="t", claim="c", tables={"Nothing": (pd.DataFrame({"a": [1]}), "nothing")}
        )
