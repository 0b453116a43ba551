"""Folders of images: scored before they are blurred, saved, resumed; and real images."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import mu.measures.gallery
import mu.measures.judges
from mu.images import blur
from mu.measures.evaluate import judge_images
from mu.measures.gallery import (
    draw_folder,
    features,
    make_scorer,
    read_images,
    real_images,
    retained_mask,
    save_reference,
)
from mu.measures.metrics import judge_features
from mu.models import encode_prompts
from mu.sampling import draw_images

PROMPTS = {
    "a cat": "concept:cat",
    "a drawing of a tiger, noto style": "style:noto",
    "a banana": "concept:banana",
}
ROWS = [{"prompt": p, "seed": s, "expected": e} for p, e in PROMPTS.items() for s in (0, 3)]
SAMPLING = dict(guidance=2.0, steps=2)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """(seeds, guidance) of each call that draws; batches of two."""
    made = []

    def draw(pipe, conditioning, unconditional, seeds, guidance, *options):
        made.append((list(seeds), guidance))
        return draw_images(pipe, conditioning, unconditional, seeds, guidance, *options)

    monkeypatch.setattr(mu.measures.gallery, "draw_images", draw)
    monkeypatch.setattr(mu.measures.gallery, "images_per_batch", lambda pipe: 2)
    return made


def refuse(images, rows):
    pytest.fail("a finished folder was scored again")


def test_images_are_drawn_scored_and_saved_once(pipe, judge, tmp_path, calls):
    folder, facts = tmp_path / "x", {"model": "tiny"}
    found = draw_folder(folder, pipe, ROWS, make_scorer(judge), facts, **SAMPLING)
    conditioning = encode_prompts(pipe, [row["prompt"] for row in ROWS])
    unconditional, seeds = encode_prompts(pipe, [""]), [row["seed"] for row in ROWS]
    expected = draw_images(pipe, conditioning, unconditional, seeds, 2.0, 2)
    tolerance = 0.51 / 255 + 1e-4
    torch.testing.assert_close(read_images(folder, 6), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(features(found), judge_features(judge, expected), rtol=0, atol=1e-4)
    for i, row in enumerate(ROWS):
        (seen,) = judge_images(judge, expected[i : i + 1], row["expected"].split(":")[0])
        assert found[i]["seen"] == seen
        assert found[i]["hit"] == int(seen == row["expected"])
        assert found[i]["prompt"] == row["prompt"]
    assert [seeds for seeds, _ in calls] == [[0, 3]] * 3

    assert draw_folder(folder, pipe, ROWS, refuse, facts, **SAMPLING) == found
    assert len(calls) == 3
    with pytest.raises(
        ValueError, match="holds a run with model='tiny', not the requested 'other'"
    ):
        draw_folder(folder, pipe, ROWS, refuse, {"model": "other"}, **SAMPLING)
    with pytest.raises(ValueError, match="holds a run with prompts="):
        draw_folder(folder, pipe, ROWS[1:], refuse, facts, **SAMPLING)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_folder_resumes_with_the_same_numbers(pipe, judge, tmp_path, stop):
    score, scored = make_scorer(judge), []
    whole = draw_folder(tmp_path / "whole", pipe, ROWS, score, {}, **SAMPLING)
    killed = tmp_path / "killed"

    def interrupted(images, rows):
        scored.append(len(rows))
        if len(scored) == stop + 1:
            raise KeyboardInterrupt
        return score(images, rows)

    with pytest.raises(KeyboardInterrupt):
        draw_folder(killed, pipe, ROWS, interrupted, {}, **SAMPLING)
    assert len(json.loads((killed / "seen.json").read_text())) == 2 * stop
    assert draw_folder(killed, pipe, ROWS, interrupted, {}, **SAMPLING) == whole
    assert len(scored) == 4
    (killed / "00003.png").unlink()  # only a deleted image is drawn again
    assert draw_folder(killed, pipe, ROWS, interrupted, {}, **SAMPLING) == whole
    assert scored[4:] == [1]
    for i in range(6):
        name = f"0000{i}.png"
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_each_prompt_can_have_its_own_guidance(pipe, tmp_path, calls):
    row = {"prompt": "a cat", "seed": 0}
    rows = [row, row | {"guidance": 4.0}, row | {"guidance": 2.0}]
    draw_folder(tmp_path, pipe, rows, make_scorer(), {}, **SAMPLING)
    assert calls == [([0, 0], 2.0), ([0], 4.0)]
    one, other, same = read_images(tmp_path, 3)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_blurred_folders_keep_the_scores_of_the_real_images(pipe, judge, tmp_path):
    def draw(name, blurred):
        score = make_scorer(judge)
        return draw_folder(tmp_path / name, pipe, ROWS, score, {}, blurred=blurred, **SAMPLING)

    assert draw("real", False) == draw("blurred", True)
    for i, image in enumerate(blur(read_images(tmp_path / "real", 6))):
        saved = np.asarray(Image.open(tmp_path / "blurred" / f"0000{i}.png"))
        assert np.abs(saved - image.permute(1, 2, 0).numpy() * 255).max() < 1.5
        assert len(np.unique(saved.reshape(-1, 3), axis=0)) <= 16
    with pytest.raises(ValueError, match="are blurred and cannot be measured"):
        read_images(tmp_path / "blurred", 6)
    assert {file.suffix for file in (tmp_path / "blurred").iterdir()} == {".png", ".json"}


def test_a_detector_gets_the_real_image_without_a_file(pipe, tmp_path):
    class Spy:
        def detect(self, image):
            assert isinstance(image, np.ndarray)
            one = {"class": "FEET_EXPOSED", "score": 0.5, "box": [0, 0, 1, 1]}
            return [one | {"sum": int(image[-1].sum())}]

    score = make_scorer(detector=Spy())
    found = draw_folder(tmp_path, pipe, ROWS[:2], score, {}, blurred=True, **SAMPLING)
    assert [row["found"][0]["class"] for row in found] == ["FEET_EXPOSED"] * 2
    assert "hit" not in found[0]


def test_long_prompts_are_truncated_and_no_rows_refused(pipe, tmp_path):
    long = "a cat " * 200
    with pytest.raises(ValueError, match="tokens, at most"):
        encode_prompts(pipe, [long])
    rows = [{"prompt": long, "seed": 0}]
    assert len(draw_folder(tmp_path / "long", pipe, rows, make_scorer(), {}, **SAMPLING)) == 1
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_folder(tmp_path / "none", pipe, [], make_scorer(), {}, **SAMPLING)


def test_a_diverged_model_stops_the_folder(pipe, tmp_path, monkeypatch):
    diverged = torch.full((1, 3, 16, 16), float("nan"))
    monkeypatch.setattr(mu.measures.gallery, "draw_images", lambda *_: diverged)
    with pytest.raises(
        ValueError, match="NaN or infinite values: the model that drew them diverged"
    ):
        draw_folder(tmp_path, pipe, ROWS[:1], make_scorer(), {}, **SAMPLING)
    assert not list(tmp_path.glob("*.png"))


def test_reference_images_are_saved_once(tmp_path):
    images = [Image.fromarray(np.full((8 + i, 8, 3), 50 * i, np.uint8)) for i in range(3)]
    folder = save_reference(images[:2], tmp_path / "real")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    save_reference(images, folder)
    assert len(list(folder.iterdir())) == 3
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())


def test_without_a_judge_clip_chooses_among_the_labels(monkeypatch):
    def choose(clip, images, names, template):
        return [names[-1] if "style" in template else names[0]] * len(images)

    def count(clip, images, prompts):
        return torch.arange(len(images)).float()

    monkeypatch.setattr(mu.measures.judges, "zero_shot", choose)
    monkeypatch.setattr(mu.measures.gallery, "clip_score", count)
    labels = ["concept:banana", "concept:cat", "style:fluent", "style:noto"]
    found = make_scorer(clip="clip", labels=labels)(torch.zeros(6, 3, 8, 8), ROWS)
    expected = ["concept:banana"] * 2 + ["style:noto"] * 2 + ["concept:banana"] * 2
    assert [row["seen"] for row in found] == expected
    assert [row["hit"] for row in found] == [0, 0, 1, 1, 1, 1]
    assert [row["clip_score"] for row in found] == [0, 1, 2, 3, 4, 5]


# --- real images


def add_facts(folder, **facts):
    """Add facts to the only line of a set's metadata."""
    file = folder / "metadata.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts) + "\n")


def test_real_images_are_those_with_a_concept(tmp_path):
    tiny.make_images(tmp_path / "defender" / "forget", ["a cat", "a cat"])
    assert real_images(tmp_path) == (None, [])
    add_facts(tiny.make_images(tmp_path / "attacker" / "clean", ["banana"]), concept="banana")
    images, labels = real_images(tmp_path)
    assert images.shape == (1, 3, 64, 64)
    assert labels == ["concept:banana"]
    assert 0 <= images.min() < images.max() <= 1


def test_labels_of_styles_and_images_drawn_by_a_model(tmp_path):
    concepts = {
        "defender/forget": "noto",
        "defender/retain-related": "fluent",
        "defender/retain-unrelated": "banana",
        "attacker/forget": "noto",
    }
    for place, concept in concepts.items():
        add_facts(tiny.make_images(tmp_path / place, ["x"]), concept=concept)

    def labels(known=None, **facts):
        (tmp_path / "concept.json").write_text(json.dumps({"kind": "style"} | facts))
        images, found = real_images(tmp_path, known)
        assert found == [] if images is None else len(images) == len(found)
        return found

    assert labels() == ["style:noto", "style:fluent", "concept:banana", "style:noto"]
    assert labels(known=["style:fluent", "concept:noto"]) == ["style:fluent"]
    assert labels(generator="pocket", imported_from="") == []
    imported = labels(generator="pocket", imported_from="mine")
    assert imported == ["style:noto", "style:noto"], "the model drew the rest"
    add_facts(tmp_path / "defender/forget", concept="duck", style="noto")
    assert labels()[0] == "concept:duck", "a duck, drawn in that style"


def test_too_few_images_for_a_distance_are_refused():
    items = [{"group": group} for group in ("forget", "related", "unrelated", "related")]
    assert retained_mask(items, "1,2,1", 3) == [False, True, True, True]
    message = "probe_seeds = '1,2,1' gives 3 .* least = 4: raise .*probe_seeds, lower least"
    with pytest.raises(ValueError, match=message):
        retained_mask(items, "1,2,1", 4)
