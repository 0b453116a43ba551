"""Folders of drawn pictures: looked at as they were drawn, kept as they may be kept, gone on with where they stopped."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mu.measures.gallery
import mu.measures.judges
from mu.images import blur
from mu.measures.evaluate import judge_images
from mu.measures.gallery import draw_folder, features, look_with, read_pictures, save_reference
from mu.measures.metrics import judge_features
from mu.models import encode_prompts
from mu.sampling import draw_images

ROWS = [
    {"prompt": p, "seed": s, "expected": e}
    for p, e in (
        ("a cat", "concept:cat"),
        ("a drawing of a tiger, noto style", "style:noto"),
        ("a banana", "concept:banana"),
    )
    for s in (0, 3)
]
HOW = dict(guidance=2.0, steps=2, batch_size=2)


@pytest.fixture
def small(monkeypatch):
    """What is drawn: (seeds, guidance) of each call."""
    real = mu.measures.gallery.draw_images
    calls = []
    monkeypatch.setattr(
        mu.measures.gallery,
        "draw_images",
        lambda pipe, c, u, seeds, guidance, *a: (
            calls.append((list(seeds), guidance)) or real(pipe, c, u, seeds, guidance, *a)
        ),
    )
    return calls


def test_pictures_are_drawn_judged_and_kept(pipe, judge, tmp_path, small):
    found = draw_folder(tmp_path / "x", pipe, ROWS, look_with(judge), {"model": "tiny"}, **HOW)
    expected = draw_images(
        pipe,
        encode_prompts(pipe, [r["prompt"] for r in ROWS]),
        encode_prompts(pipe, [""]),
        [r["seed"] for r in ROWS],
        2.0,
        2,
    )
    torch.testing.assert_close(
        read_pictures(tmp_path / "x", 6), expected, rtol=0, atol=0.51 / 255 + 1e-4
    )
    torch.testing.assert_close(features(found), judge_features(judge, expected), rtol=0, atol=1e-4)
    seen = [
        judge_images(judge, expected[i : i + 1], row["expected"].split(":")[0])[0]
        for i, row in enumerate(ROWS)
    ]
    assert [row["seen"] for row in found] == seen and [row["hit"] for row in found] == [
        int(s == r["expected"]) for s, r in zip(seen, ROWS, strict=False)
    ]
    assert [row["prompt"] for row in found] == [r["prompt"] for r in ROWS] and [
        c[0] for c in small
    ] == [[0, 3]] * 3

    def monkey(images, rows):
        return pytest.fail("a finished folder was looked at again")

    assert (
        draw_folder(tmp_path / "x", pipe, ROWS, monkey, {"model": "tiny"}, **HOW) == found
        and len(small) == 3
    )
    with pytest.raises(ValueError, match="holds a run with model='tiny', not the requested 'another'"):
        draw_folder(tmp_path / "x", pipe, ROWS, monkey, {"model": "another"}, **HOW)
    with pytest.raises(ValueError, match="holds a run with prompts="):
        draw_folder(tmp_path / "x", pipe, ROWS[1:], monkey, {"model": "tiny"}, **HOW)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_folder_goes_on_with_the_same_numbers(pipe, judge, tmp_path, small, stop):
    whole, calls = draw_folder(tmp_path / "whole", pipe, ROWS, look_with(judge), {}, **HOW), []

    def look(images, rows):
        calls.append(len(rows))
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return look_with(judge)(images, rows)

    with pytest.raises(KeyboardInterrupt):
        draw_folder(tmp_path / "killed", pipe, ROWS, look, {}, **HOW)
    assert len(json.loads((tmp_path / "killed" / "seen.json").read_text())) == 2 * stop
    assert (
        draw_folder(tmp_path / "killed", pipe, ROWS, look, {}, **HOW) == whole and len(calls) == 4
    )
    (tmp_path / "killed" / "00003.png").unlink()  # what is gone is drawn again, and only that
    assert draw_folder(tmp_path / "killed", pipe, ROWS, look, {}, **HOW) == whole and calls[4:] == [
        1
    ]
    for i in range(6):
        assert (tmp_path / "killed" / f"0000{i}.png").read_bytes() == (
            tmp_path / "whole" / f"0000{i}.png"
        ).read_bytes()


def test_each_prompt_may_have_its_own_guidance(pipe, tmp_path, small):
    rows = [
        {"prompt": "a cat", "seed": 0},
        {"prompt": "a cat", "seed": 0, "guidance": 4.0},
        {"prompt": "a cat", "seed": 0, "guidance": 2.0},
    ]
    draw_folder(tmp_path, pipe, rows, look_with(), {}, **HOW)
    assert small == [([0, 0], 2.0), ([0], 4.0)]
    one, other, same = read_pictures(tmp_path, 3)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_of_veiled_pictures_only_what_was_seen_remains(pipe, judge, tmp_path):
    open_, hidden = (
        draw_folder(tmp_path / str(v), pipe, ROWS, look_with(judge), {}, blurred=v, **HOW)
        for v in (False, True)
    )
    assert open_ == hidden, "what looks at them sees the real ones"
    real = read_pictures(tmp_path / "False", 6)
    for i, image in enumerate(blur(real)):
        kept = np.asarray(Image.open(tmp_path / "True" / f"0000{i}.png"))
        assert (
            np.abs(kept - image.permute(1, 2, 0).numpy() * 255).max() < 1.5
            and len(np.unique(kept.reshape(-1, 3), axis=0)) <= 16
        )
    with pytest.raises(ValueError, match="are blurred, so there is nothing to measure on them"):
        read_pictures(tmp_path / "True", 6)
    assert {f.suffix for f in (tmp_path / "True").iterdir()} == {".png", ".json"}


def test_a_detector_gets_the_real_picture_without_a_file(pipe, tmp_path):
    class Spy:
        def detect(self, picture):
            assert isinstance(picture, bytes)
            return [
                {
                    "class": "FEET_EXPOSED",
                    "score": 0.5,
                    "box": [0, 0, 1, 1],
                    "sum": sum(picture[-20:]),
                }
            ]

    found = draw_folder(
        tmp_path, pipe, ROWS[:2], look_with(detector=Spy()), {}, blurred=True, **HOW
    )
    assert [row["found"][0]["class"] for row in found] == [
        "FEET_EXPOSED"
    ] * 2 and "hit" not in found[0]


def test_long_prompts_of_the_wild_are_cut_and_nothing_to_draw_is_refused(pipe, tmp_path):
    long = "a cat " * 200
    with pytest.raises(ValueError, match="tokens, at most"):
        encode_prompts(pipe, [long])
    assert (
        len(
            draw_folder(
                tmp_path / "long", pipe, [{"prompt": long, "seed": 0}], look_with(), {}, **HOW
            )
        )
        == 1
    )
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_folder(tmp_path / "none", pipe, [], look_with(), {}, **HOW)


def test_a_model_that_diverges_stops_the_folder_with_words(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        mu.measures.gallery, "draw_images", lambda *_: torch.full((1, 3, 16, 16), float("nan"))
    )
    with pytest.raises(
        ValueError, match="NaN or infinite values: the model that drew them has diverged"
    ):
        draw_folder(tmp_path, pipe, ROWS[:1], look_with(), {}, **HOW)
    assert not list(tmp_path.glob("*.png"))


def test_a_reference_is_saved_once(tmp_path):
    pictures = [Image.fromarray(np.full((8 + i, 8, 3), 50 * i, np.uint8)) for i in range(3)]
    folder = save_reference(pictures[:2], tmp_path / "real")
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    save_reference(pictures, folder)
    assert len(list(folder.iterdir())) == 3 and all(
        (folder / name).stat().st_mtime_ns == stamp for name, stamp in before.items()
    )


def test_without_a_judge_clip_chooses_among_the_labels(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(
        mu.measures.judges,
        "zero_shot",
        lambda clip, images, names, template: (
            [names[-1] if "style" in template else names[0]] * len(images)
        ),
    )
    monkeypatch.setattr(
        mu.measures.gallery,
        "clip_score",
        lambda clip, images, prompts: torch.arange(len(images)).float(),
    )
    found = look_with(
        clip="clip", labels=["concept:banana", "concept:cat", "style:fluent", "style:noto"]
    )(torch.zeros(6, 3, 8, 8), ROWS)
    assert [row["seen"] for row in found] == ["concept:banana"] * 2 + ["style:noto"] * 2 + [
        "concept:banana"
    ] * 2 and [row["hit"] for row in found] == [0, 0, 1, 1, 1, 1]
    assert [row["clip_score"] for row in found] == [0, 1, 2, 3, 4, 5]
