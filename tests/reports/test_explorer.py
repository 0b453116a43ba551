"""Images of an attack are at the right place, on the page and in JupyterLab."""

import io
import json
from dataclasses import replace

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

CATS = [{"group": "forget", "prompt": "a cat", "seed": s} for s in range(10)]
ITEMS = [*CATS, *({"group": "related", "prompt": "a tiger", "seed": s} for s in range(2))]
RUNS = {"unlearned-0": 0.2, "meta-0": 0.6}


def shade(run, step, i):
    """Return the grey value that identifies an image."""
    return RUNS.get(run, 0.0) + step / 1000 + i / 100


def save(folder, run, step, items=ITEMS, side=8, asked=False):
    """Save the rows and images of a step; asked: the prompts differ from the expected ones."""
    folder.mkdir(parents=True, exist_ok=True)
    greys = [torch.full((3, side, side), shade(run, step, i)) for i in range(len(items))]
    save_grid(torch.stack(greys), folder / f"step-{step:04d}.png")
    rows = []
    for i, item in enumerate(items):
        row = item | {"step": step, "hit": i % 2}
        if asked and step:
            row |= {"asked": item["prompt"], "prompt": f"key {item['prompt']}"}
        rows.append(row)
    (folder / f"step-{step:04d}.json").write_text(json.dumps(rows))


def attack(out, run, name="full"):
    return out / "attack" / run / f"{name}-0"


@pytest.fixture
def out(tmp_path):
    for run in RUNS:
        for step in (0, 50, 100):
            save(attack(tmp_path, run), run, step)
            save(attack(tmp_path, run, "words"), run, step, CATS, asked=True)
    original = tmp_path / "original"
    save(original, "original", 0)
    (original / "step-0000.png").rename(original / "samples.png")
    rows = json.loads((original / "step-0000.json").read_text())
    (original / "metrics.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_images_are_ordered_by_model_step_and_item(out):
    course = read_progress(out, "full", list(RUNS))
    assert course.models == ["original", "unlearned", "meta-unlearned"]
    assert course.steps == [0, 50, 100]
    cats = [("a cat", s) for s in range(8)]
    assert [(item["prompt"], item["seed"]) for item in course.items] == [*cats, ("a tiger", 0)]
    assert course.pictures.shape == (3, 3, 9, 8, 8, 3)
    assert course.hits.shape == (3, 3, 9)
    for m, run in enumerate(("original", *RUNS)):
        for s, step in enumerate(course.steps):
            for i, number in enumerate([*range(8), 10]):
                expected = shade(run, step if run != "original" else 0, number)
                assert abs(course.pictures[m, s, i].mean() / 255 - expected) < 0.003
                assert course.hits[m, s, i] == number % 2


def test_images_of_a_prompt_search_are_shown_under_the_original_prompt(out):
    course = read_progress(out, "words", list(RUNS), original=False)
    assert {item["prompt"] for item in course.items} == {"a cat"}
    assert course.models == ["unlearned", "meta-unlearned"]
    assert abs(course.pictures[1, 2, 3].mean() / 255 - shade("meta-0", 100, 3)) < 0.003


def test_only_common_steps_and_images_are_shown(out):
    (attack(out, "meta-0") / "step-0050.json").unlink()
    save(attack(out, "meta-0"), "meta-0", 100, ITEMS[2:])
    course = read_progress(out, "full", list(RUNS))
    assert course.steps == [0, 100]
    seeds = [item["seed"] for item in course.items if item["group"] == "forget"]
    assert seeds == list(range(2, 10)), "eight of those that all have"


def test_prompts_may_have_seeds_of_their_own(tmp_path):
    tiger = {"group": "related", "prompt": "a tiger", "seed": 3}
    items = [{"group": "forget", "prompt": f"prompt {n}", "seed": 1000 * n + 7} for n in range(9)]
    for run in RUNS:
        save(attack(tmp_path, run), run, 0, [*items, tiger])
    keep = {"forget": (2, 3), "related": (4, 1)}
    course = read_progress(tmp_path, "full", list(RUNS), keep=keep, original=False)
    assert course.items == [*items[:6], tiger], "as many as two prompts with three seeds"


def test_missing_attacks_and_disjoint_images_are_errors(out):
    message = "(?s)no images in .*slow-0; available attacks: full-0, words-0"
    with pytest.raises(FileNotFoundError, match=message):
        read_progress(out, "slow", list(RUNS))
    dog = {"group": "forget", "prompt": "a dog", "seed": 0}
    for step in (0, 50, 100):
        save(attack(out, "meta-0"), "meta-0", step, [dog])
    with pytest.raises(ValueError, match="share no image of full"):
        read_progress(out, "full", list(RUNS))


def test_images_of_a_harmful_concept_are_blurred(tmp_path):
    folder = attack(tmp_path, "meta-0")
    folder.mkdir(parents=True)
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_grid(noise, folder / "step-0000.png")
    (folder / "step-0000.json").write_text(json.dumps([ITEMS[0] | {"step": 0, "hit": 1}]))

    def colors(blurred):
        course = read_progress(tmp_path, "full", ["meta-0"], blurred=blurred)
        return len(np.unique(course.pictures[0, 0, 0].reshape(-1, 3), axis=0))

    assert colors(blurred=True) <= 16 < colors(blurred=False)


def test_a_sprite_sheet_has_a_row_per_item_and_a_column_per_model_and_step(out, tmp_path):
    course = read_progress(out, "full", list(RUNS))
    facts = save_sprite_sheet(course, tmp_path / "report")
    sheet = np.asarray(Image.open(tmp_path / "report" / facts["sheet"]).convert("RGB"))
    assert sheet.shape == (9 * 8, 3 * 3 * 8, 3)
    assert facts["hits"][2][1] == [int(x) for x in course.hits[2, 1]]
    for m, s, i in ((0, 0, 0), (1, 2, 3), (2, 1, 8)):
        x = (m * len(course.steps) + s) * 8
        tile = sheet[i * 8 : (i + 1) * 8, x : x + 8]
        assert abs(tile.mean() - course.pictures[m, s, i].mean()) < 6  # WebP is lossy
    large = course.pictures[:1, :1, :2].repeat(64, 3).repeat(64, 4)
    facts = save_sprite_sheet(replace(course, pictures=large), tmp_path)
    assert Image.open(tmp_path / facts["sheet"]).size == (LARGEST, 2 * LARGEST)


def test_the_page_holds_the_images_and_the_judgements(out, tmp_path):
    facts = save_sprite_sheet(read_progress(out, "full", list(RUNS)), tmp_path / "report")
    courses = [facts | {"name": "</script><b>full"}]
    page = write_report(tmp_path / "report", title="t", claim="c", courses=courses)
    text = page.read_text()
    (read,) = json.loads(text.split('id="courses">')[1].split("</script>")[0])
    assert read["sheet"] == "explorer/full.webp"
    assert read["steps"] == [0, 50, 100]
    assert read["name"] == "</script><b>full", "a name cannot end the script"
    assert '<input id="step" type="range"' in text
    assert "<noscript>" in text
    assert "http" not in text.split("<script>")[1]
    with pytest.raises(FileNotFoundError, match="pictures of full"):
        write_report(tmp_path / "elsewhere", title="t", claim="c", courses=[facts])


def test_the_widget_shows_the_chosen_images(out):
    dog = {"group": "related", "prompt": "a dog", "seed": 1}
    for run in RUNS:
        for step in (0, 20):
            save(attack(out, run, "dogs"), run, step, [dog])
    courses = [
        read_progress(out, name, list(RUNS), original=name == "full")
        for name in ("full", "words", "dogs")
    ]
    menus, step, shown = explore(courses, scale=1).children
    chosen, prompt, seed, models = menus.children

    def names():
        return [frame.children[0].value for frame in shown.children]

    def greys():
        images = [Image.open(io.BytesIO(box.children[1].value)) for box in shown.children]
        return [np.asarray(image).mean() / 255 for image in images]

    assert names() == ["original", "unlearned", "meta-unlearned"]
    step.value, seed.value = 100, 5
    expected = [shade(None, 0, 5), shade("unlearned-0", 100, 5), shade("meta-0", 100, 5)]
    assert greys() == pytest.approx(expected, abs=0.003)
    assert {frame.children[2].value for frame in shown.children} == {"recognised"}
    prompt.value = "a tiger"
    assert seed.value == 0
    assert greys()[2] == pytest.approx(shade("meta-0", 100, 10), abs=0.003)
    assert shown.children[0].children[2].value == "not recognised"
    models.value = ("original", "meta-unlearned")
    assert names() == ["original", "meta-unlearned"]
    chosen.value = "words"
    assert prompt.value == "a cat"
    assert len(shown.children) == 2
    step.value, chosen.value = 100, "dogs"
    assert list(step.options) == [0, 20], "other steps, other prompts"
    assert (prompt.value, seed.value) == ("a dog", 1)
    assert greys() == pytest.approx([shade(run, step.value, 0) for run in RUNS], abs=0.003)


def test_a_sprite_sheet_is_read_back(out, tmp_path):
    keep = {"forget": (1, 2), "related": (1, 1)}
    course = read_progress(out, "full", list(RUNS), keep=keep)
    items = [(item["group"], item["seed"]) for item in course.items]
    cats = [("forget", seed) for seed in sorted({s for g, s in items if g == "forget"})]
    assert items == [*cats, ("related", 0)]
    again = read_sprite_sheet(save_sprite_sheet(course, tmp_path, "renamed"), tmp_path)
    assert again.name == "renamed"
    assert (again.models, again.steps, again.items) == (course.models, course.steps, course.items)
    assert again.pictures.shape == course.pictures.shape
    assert np.abs(again.pictures.astype(float) - course.pictures).mean() < 3
    np.testing.assert_array_equal(again.hits, course.hits)
