"""Concept sets from imported images: the split between the sides, refusals."""

import json

import numpy as np
import pytest
from concepts.builds import FEW, cat, save_emoji
from PIL import Image

from mu.concepts.build import build, open_image, read_imports
from mu.concepts.sets import read_folder
from mu.files import read_json


def test_imported_images_are_split_between_the_sides(model, tmp_path):
    source = save_emoji(
        tmp_path / "mine", [f"{i}.png" for i in range(11)] + ["deep.jpg", "more.webp"]
    )
    (source / "notes.txt").write_text("no image")
    folder = build(tmp_path / "x", cat(model), model, images=str(source), options=FEW)
    ours, theirs = (read_folder(folder / place / "forget") for place in ("defender", "attacker"))
    assert sorted(set(ours[1])) == sorted(cat(model).prompts["forget"]["cat"])
    assert set(theirs[1]) == {"cat", "a picture of a cat"}
    assert (len(ours[0]), len(theirs[0])) == (6, 4)
    assert {p.read_bytes() for p in ours[0]}.isdisjoint(p.read_bytes() for p in theirs[0])
    assert len(read_folder(folder / "defender/retain-unrelated")[0]) == 2
    assert read_json(folder / "concept.json")["imported_from"] == str(source)
    originals = [open_image(file, 16).tobytes() for file, _ in read_imports(source)]
    assert all(Image.open(p).tobytes() in originals for p in [*ours[0], *theirs[0]])


def test_each_caption_goes_to_one_side(model, tmp_path):
    captions = ["my cat"] * 5 + ["your cat"] * 3 + ["a sleeping cat"] * 2
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(10)])

    def write(texts):
        return (source / "metadata.jsonl").write_text(
            "".join(
                json.dumps({"file_name": f"{i}.png", "text": text}) + "\n"
                for i, text in enumerate(texts)
            )
        )

    write(captions)
    folder = build(tmp_path / "x", cat(model), model, images=str(source), options=FEW)
    ours, theirs = (read_folder(folder / place / "forget")[1] for place in ("defender", "attacker"))
    assert sorted(ours + theirs) == sorted(captions)
    assert set(ours).isdisjoint(theirs)
    assert len(ours) > len(theirs) >= 2
    write(["my cat"] * 9 + ["My cat"])
    with pytest.raises(
        ValueError,
        match="10 go to the defender and 0 to the attacker, but each needs 2; add images with "
        "other captions, or remove metadata.jsonl",
    ):
        build(tmp_path / "y", cat(model), model, images=str(source), options=FEW)


def test_imported_near_duplicates_count_once(model, tmp_path):
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(10)])
    for i in range(4):
        Image.open(source / f"{i}.png").resize((90, 90)).save(source / f"copy-{i}.jpg", quality=80)
    folder = build(tmp_path / "x", cat(model), model, images=str(source), options=FEW)
    assert len(read_json(folder / "concept.json")["near_duplicates"]) == 4
    (source / "9.png").unlink()
    with pytest.raises(
        ValueError,
        match="mine holds 9 images and 4 near-duplicates: the defender needs 6, the attacker 4 "
        r"\(2 per prompt\); add images",
    ):
        build(tmp_path / "y", cat(model), model, images=str(source), options=FEW)
    assert not (tmp_path / "y").exists()


def test_images_are_cropped_turned_upright_and_put_on_white(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.asarray(open_image(tmp_path / "wide.png", 20)).tolist() == wide[:, 20:40].tolist(), (
        "the middle of it"
    )
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png", 8)).min() == 255
    half = Image.fromarray(
        np.repeat([[[255] * 3] * 32, [[0] * 3] * 32], 16, axis=0).astype(np.uint8)
    )
    exif = half.getexif()
    exif[274] = 3  # taken upside down
    half.save(tmp_path / "turned.jpg", exif=exif)
    turned = np.asarray(open_image(tmp_path / "turned.jpg", 32))
    assert turned[:10].max() < 60
    assert turned[-10:].min() > 200


def test_missing_and_broken_images_are_named(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in .*empty: add .png"):
        build(tmp_path / "x", cat(model), model, images=str(tmp_path / "empty"), options=FEW)
    with pytest.raises(FileNotFoundError, match="no images in .*nowhere"):
        build(tmp_path / "x", cat(model), model, images=str(tmp_path / "nowhere"), options=FEW)
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(12)])
    (source / "5.png").write_bytes((source / "5.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="5.png is not a readable image .*: remove or replace it"):
        build(tmp_path / "x", cat(model), model, images=str(source), options=FEW)
    assert not (tmp_path / "x").exists()
