"""The pictures of an attack, side by side and step by step: the right picture at the right place, on the page and in JupyterLab."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mu.images import save_grid
from mu.reports.explorer import (
    LARGEST,
    explore,
    read_progress,
    read_sprite_sheet,
    save_sprite_sheet,
)
from mu.reports.page import write_report

ITEMS = [{"group": "forget", "prompt": "a cat", "seed": s} for s in range(10)] + [
    {"group": "related", "prompt": "a tiger", "seed": s} for s in range(2)
]
RUNS = {"unlearned-0": 0.2, "meta-0": 0.6}


def shade(run, step, i):
    """Each picture is one grey that says which it is."""
    return RUNS.get(run, 0.0) + step / 1000 + i / 100


def save(folder, run, step, items=ITEMS, side=8, asked=False):
    folder.mkdir(parents=True, exist_ok=True)
    save_grid(
        torch.stack([torch.full((3, side, side), shade(run, step, i)) for i in range(len(items))]),
        folder / f"step-{step:04d}.png",
    )
    rows = [
        item
        | {"step": step, "hit": int(i % 2)}
        | ({"asked": item["prompt"], "prompt": f"key {item['prompt']}"} if asked and step else {})
        for i, item in enumerate(items)
    ]
    (folder / f"step-{step:04d}.json").write_text(json.dumps(rows))


@pytest.fixture
def out(tmp_path):
    for run in RUNS:
        for step in (0, 50, 100):
            save(tmp_path / "attack" / run / "full-0", run, step)
            save(tmp_path / "attack" / run / "words-0", run, step, ITEMS[:10], asked=True)
    original = tmp_path / "original"
    save(original, "original", 0)
    (original / "step-0000.png").rename(original / "samples.png")
    (original / "metrics.json").write_text(
        json.dumps({"rows": json.loads((original / "step-0000.json").read_text())})
    )
    return tmp_path


def test_every_picture_is_where_its_model_step_and_prompt_say(out):
    course = read_progress(out, "full", list(RUNS))
    assert course.models == ["original", "unlearned", "meta-unlearned"] and course.steps == [
        0,
        50,
        100,
    ]
    assert [(item["prompt"], item["seed"]) for item in course.items] == [
        ("a cat", s) for s in range(8)
    ] + [("a tiger", 0)]
    assert course.pictures.shape == (3, 3, 9, 8, 8, 3) and course.hits.shape == (3, 3, 9)
    for m, run in enumerate(("original", *RUNS)):
        for s, step in enumerate(course.steps):
            for i, number in enumerate([*range(8), 10]):
                expected = shade(run, step if run != "original" else 0, number)
                assert (
                    abs(course.pictures[m, s, i].mean() / 255 - expected) < 0.003
                    and course.hits[m, s, i] == number % 2
                )


def test_what_a_search_said_is_shown_under_what_was_asked(out):
    course = read_progress(out, "words", list(RUNS), original=False)
    assert {item["prompt"] for item in course.items} == {"a cat"} and course.models == [
        "unlearned",
        "meta-unlearned",
    ]
    assert abs(course.pictures[1, 2, 3].mean() / 255 - shade("meta-0", 100, 3)) < 0.003


def test_only_steps_and_pictures_that_all_have_are_shown(out):
    (out / "attack" / "meta-0" / "full-0" / "step-0050.json").unlink()
    save(out / "attack" / "meta-0" / "full-0", "meta-0", 100, ITEMS[2:])
    course = read_progress(out, "full", list(RUNS))
    assert course.steps == [0, 100] and [
        item["seed"] for item in course.items if item["group"] == "forget"
    ] == list(range(2, 10)), "eight of those that all have"


def test_prompts_may_have_seeds_of_their_own(tmp_path):
    items = [
        {"group": "forget", "prompt": f"prompt {n}", "seed": 1000 * n + 7} for n in range(9)
    ] + [{"group": "related", "prompt": "a tiger", "seed": 3}]
    for run in RUNS:
        save(tmp_path / "attack" / run / "full-0", run, 0, items)
    course = read_progress(
        tmp_path, "full", list(RUNS), keep={"forget": (2, 3), "related": (4, 1)}, original=False
    )
    assert course.items == [*items[:6], items[9]], (
        "as many pictures as of two prompts with three seeds"
    )


def test_what_is_not_there_is_named(out):
    with pytest.raises(
        FileNotFoundError, match="(?s)no images in .*slow-0; available attacks: full-0, words-0"
    ):
        read_progress(out, "slow", list(RUNS))
    for step in (0, 50, 100):
        save(
            out / "attack" / "meta-0" / "full-0",
            "meta-0",
            step,
            [{"group": "forget", "prompt": "a dog", "seed": 0}],
        )
    with pytest.raises(ValueError, match="share no image of full"):
        read_progress(out, "full", list(RUNS))


def test_pictures_of_a_harmful_concept_are_veiled(tmp_path):
    (tmp_path / "attack" / "meta-0" / "full-0").mkdir(parents=True)
    save_grid(
        torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        tmp_path / "attack" / "meta-0" / "full-0" / "step-0000.png",
    )
    (tmp_path / "attack" / "meta-0" / "full-0" / "step-0000.json").write_text(
        json.dumps([ITEMS[0] | {"step": 0, "hit": 1}])
    )
    plain, blurred = (
        read_progress(tmp_path, "full", ["meta-0"], blurred=v).pictures[0, 0, 0]
        for v in (False, True)
    )
    assert (
        len(np.unique(blurred.reshape(-1, 3), axis=0))
        <= 16
        < len(np.unique(plain.reshape(-1, 3), axis=0))
    )


def test_the_sheet_has_a_line_an_item_and_a_column_a_model_and_step(out, tmp_path):
    course = read_progress(out, "full", list(RUNS))
    told = save_sprite_sheet(course, tmp_path / "report")
    sheet = np.asarray(Image.open(tmp_path / "report" / told["sheet"]).convert("RGB"))
    assert sheet.shape == (9 * 8, 3 * 3 * 8, 3) and told["hits"][2][1] == [
        int(x) for x in course.hits[2, 1]
    ]
    for m, s, i in ((0, 0, 0), (1, 2, 3), (2, 1, 8)):
        x = (m * len(course.steps) + s) * 8
        assert (
            abs(sheet[i * 8 : (i + 1) * 8, x : x + 8].mean() - course.pictures[m, s, i].mean()) < 6
        )  # WEBP is not exact
    big = type(course)(
        **{**vars(course), "pictures": course.pictures[:1, :1, :2].repeat(64, 3).repeat(64, 4)}
    )
    assert Image.open(tmp_path / save_sprite_sheet(big, tmp_path)["sheet"]).size == (
        LARGEST,
        2 * LARGEST,
    )


def test_the_page_holds_the_pictures_and_what_the_judge_said(out, tmp_path):
    told = save_sprite_sheet(read_progress(out, "full", list(RUNS)), tmp_path / "report")
    text = write_report(
        tmp_path / "report", title="t", claim="c", courses=[told | {"name": "</script><b>full"}]
    ).read_text()
    inside = text.split('id="courses">')[1].split("</script>")[0]
    (read,) = json.loads(inside)
    assert (
        read["sheet"] == "explorer/full.webp"
        and read["steps"] == [0, 50, 100]
        and read["name"] == "</script><b>full"
    ), "a name cannot end the script"
    assert (
        '<input id="step" type="range"' in text
        and "<noscript>" in text
        and "http" not in text.split("<script>")[1]
    )
    with pytest.raises(FileNotFoundError, match="pictures of full"):
        write_report(tmp_path / "elsewhere", title="t", claim="c", courses=[told])


def test_the_widget_shows_what_is_chosen(out):
    for run in RUNS:
        for step in (0, 20):
            save(
                out / "attack" / run / "dogs-0",
                run,
                step,
                [{"group": "related", "prompt": "a dog", "seed": 1}],
            )
    courses = [
        read_progress(out, name, list(RUNS), original=name == "full")
        for name in ("full", "words", "dogs")
    ]
    box = explore(courses, scale=1)
    (attack, prompt, seed, models), step, shown = (
        box.children[0].children,
        box.children[1],
        box.children[2],
    )

    def greys():
        return [
            np.asarray(Image.open(io.BytesIO(frame.children[1].value))).mean() / 255
            for frame in shown.children
        ]

    assert [frame.children[0].value for frame in shown.children] == [
        "original",
        "unlearned",
        "meta-unlearned",
    ]
    step.value, seed.value = 100, 5
    assert greys() == pytest.approx(
        [shade(None, 0, 5), shade("unlearned-0", 100, 5), shade("meta-0", 100, 5)], abs=0.003
    )
    assert {frame.children[2].value for frame in shown.children} == {"recognised"}
    prompt.value = "a tiger"
    assert (
        seed.value == 0
        and greys()[2] == pytest.approx(shade("meta-0", 100, 10), abs=0.003)
        and shown.children[0].children[2].value == "not recognised"
    )
    models.value = ("original", "meta-unlearned")
    assert [frame.children[0].value for frame in shown.children] == ["original", "meta-unlearned"]
    attack.value = "words"
    assert prompt.value == "a cat" and len(shown.children) == 2
    step.value, attack.value = 100, "dogs"
    assert (
        list(step.options) == [0, 20]
        and (prompt.value, seed.value) == ("a dog", 1)
        and greys() == pytest.approx([shade(run, step.value, 0) for run in RUNS], abs=0.003)
    ), "other steps, other prompts"


def test_a_sheet_is_read_back_as_the_course_it_was(out, tmp_path):
    course = read_progress(out, "full", list(RUNS), keep={"forget": (1, 2), "related": (1, 1)})
    assert [(i["group"], i["seed"]) for i in course.items] == [
        ("forget", s) for s in sorted({i["seed"] for i in course.items if i["group"] == "forget"})
    ] + [("related", 0)]
    again = read_sprite_sheet(save_sprite_sheet(course, tmp_path, "renamed"), tmp_path)
    assert (again.name, again.models, again.steps, again.items) == (
        "renamed",
        course.models,
        course.steps,
        course.items,
    )
    assert (
        again.pictures.shape == course.pictures.shape
        and np.abs(again.pictures.astype(float) - course.pictures).mean() < 3
    )
    np.testing.assert_array_equal(again.hits, course.hits)
