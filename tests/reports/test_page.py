"""The report's page: opens from disk, loads nothing, says what is missing."""

import html.parser
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from mu.reports.page import executed, write_report


class Reader(html.parser.HTMLParser):
    """Collects tags and text; complains about tags that are not closed in order."""

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
    text = page.read_text()
    read = Reader(text)
    assert (
        page == folder / "index.html"
        and "What <b>returns</b>?" in read.text
        and read.all("b") == []
    )
    links = [a["href"] for a in read.all("a")] + [i["src"] for i in read.all("img")]
    assert links and not any(link.startswith(("http", "/", "file", "..")) for link in links)
    targets = {a["id"] for _, a in read.tags if "id" in a}
    for link in links:
        assert (
            link[1:] in targets
            if link.startswith("#")
            else (folder / link.replace("%20", " ").replace("%26", "&")).exists()
            or "90_figures" in link
        )
    assert (
        not read.all("script")
        and not read.all("link")
        and "url(" not in text
        and "@import" not in text
    )
    for words in (
        "Second & last.",
        "Not fast.",
        "No figure.",
        "0.123",
        "2.35",
        "–",
        "torch",
        "2.13.0",
        "0, 1, 2",
        "True",
        "how the figures were made",
    ):
        assert words in read.text, words


def test_page_can_be_read_by_everybody(folder):
    read = Reader(full(folder).read_text())
    assert [i["alt"] for i in read.all("img")] == ["five columns of cats", "How fast?"]
    assert read.all("html")[0]["lang"] == "en" and any(
        m.get("name") == "viewport" for m in read.all("meta")
    )
    assert len(read.all("h1")) == len(read.all("main")) == 1 and all(
        "scope" in th for th in read.all("th")
    )
    scrolled = [d for d in read.all("div") if d.get("class") == "scroll"]
    assert len(scrolled) == 2 and all(d["tabindex"] == "0" and d["aria-label"] for d in scrolled), (
        "tables can be scrolled by keyboard"
    )
    text = (folder / "index.html").read_text()
    assert (
        "prefers-color-scheme: dark" in text
        and "@media print" in text
        and 'class="skip" href="#main"' in text
    )


def test_small_page(folder):
    read = Reader(write_report(folder, title="T", claim="One sentence.").read_text())
    assert (
        "One sentence." in read.text
        and not read.all("h2")
        and not read.all("nav")
        and not read.all("img")
    )


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
            "headline: figures/headline.png has no words",
        ),
        (
            {"cards": [{"answer": "A", "figure": __file__}]},
            ValueError,
            "lies outside .* save it below that folder",
        ),
        ({"notebooks": ["notebooks/30.html"]}, FileNotFoundError, "notebook: notebooks/30.html"),
    ],
)
def test_what_is_missing_is_named_and_an_earlier_page_stays(folder, given, error, words):
    before = full(folder).read_text()
    with pytest.raises(error, match=words):
        write_report(folder, title="T", claim="C", **given)
    assert (folder / "index.html").read_text() == before and not list(Path(folder).glob(".*tmp"))


def test_the_executed_notebooks_are_those_that_are_there_and_the_one_that_is_running(folder):
    there = folder / "notebooks"
    assert executed(folder, "90_figures") == [
        (there / "20_unlearn.html", "20_unlearn"),
        (there / "90_figures.html", "90_figures"),
    ]
    assert (
        executed(folder, "30_attack") == [(there / "20_unlearn.html", "20_unlearn")]
        and executed(folder / "nowhere", "90_figures") == []
    )
    assert (
        write_report(folder, title="t", claim="c", notebooks=executed(folder, "90_figures"))
        .read_text()
        .count('href="notebooks/')
        == 2
    )


def test_notebooks_that_the_repository_does_not_keep_are_named_and_not_linked(folder):
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
    page = write_report(folder, title="t", claim="c", notebooks=executed(folder, "")).read_text()
    assert "<details>" not in page and page.count('.html"') == 5, "in no repository all are linked"
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text(
        "**/notebooks/*\n!notebooks/20_unlearn.html\n!ablations/notebooks/40_ablations.html\n"
    )
    seen, folded = (
        write_report(folder, title="t", claim="c", notebooks=executed(folder, ""))
        .read_text()
        .split("<details>")
    )
    assert (
        'href="ablations/notebooks/40_ablations.html"' in seen
        and 'href="notebooks/20_unlearn.html"' in seen
        and seen.count('.html"') == 2
    )
    assert (
        "3 more, which are too large" in folded
        and "ablations: 21_base-0" in folded
        and "ablations/notebooks and notebooks" in folded
        and "href=" not in folded
    ), "who clones it has no dead links"
    (folder / ".gitignore").write_text("*\n")
    assert (
        "<details>"
        not in write_report(
            folder, title="t", claim="c", notebooks=executed(folder, "")
        ).read_text()
    ), "of a page that is not kept, all are there"


def test_words_caveats_and_files_of_tables_are_on_the_page(folder):
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
    assert (
        "harmless &lt;pictures&gt;" in page
        and "<li>Not so.</li>" in page
        and {"#terms", "#caveats"} <= {a["href"] for a in read.all("a")}
    )
    assert [a["href"] for a in read.all("a") if a["href"].startswith("tables/")] == [
        f"tables/quality.{kind}" for kind in ("csv", "md", "tex")
    ]
    with pytest.raises(FileNotFoundError, match="table nothing: tables/nothing.csv"):
        write_report(
            folder, title="t", claim="c", tables={"Nothing": (pd.DataFrame({"a": [1]}), "nothing")}
        )
