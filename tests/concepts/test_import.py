"""Concept sets from imported images: the split between the sides, refusals."""

import json

import pytest
from concepts.builds import FEW, cat, save_emoji
from PIL import Image

from mu.concepts.build import build, read_imports
from mu.concepts.sets import read_folder
from mu.files import read_json
from mu.images import open_image


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
        "other captions, or remove the captions",
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


def save(folder, names, sub=""):
    """Save noise under some names; returns the folder of the images."""
    place = folder / sub
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.effect_noise((16, 16), 90).convert("RGB").save(place / name)
    return place


def write_text_files(place):
    for stem in "01":
        (place / f"{stem}.txt").write_text("a black cat\n")


def write_csv(place):
    text = 'file_name,text\n0.png,a black cat\n1.png,"a cat, white"\n'
    (place / "metadata.csv").write_text(text, encoding="utf-8-sig")


def write_jsonl(place, text="a black cat"):
    lines = [json.dumps({"file_name": f"{n}.png", "text": text}, ensure_ascii=False) for n in "01"]
    (place / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")


CAPTIONS = {
    "CSV": ("", write_csv, ["a black cat", "a cat, white"]),
    "text files": ("", write_text_files, ["a black cat"] * 2),
    "JSON lines in a subfolder": ("train", write_jsonl, ["a black cat"] * 2),
    "CSV in a subfolder": ("a/b", write_csv, ["a black cat", "a cat, white"]),
    "line separators": ("", lambda p: write_jsonl(p, "a\u2028cat\u0085"), ["a\u2028cat\u0085"] * 2),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_beside_images_are_read(tmp_path, kind):
    sub, write, expected = CAPTIONS[kind]
    place = save(tmp_path, ["0.png", "1.png"], sub)
    write(place)
    (tmp_path / "._0.png").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves
    (tmp_path / "notes.txt").write_text("no caption")
    found = read_imports(tmp_path)
    assert found == [(place / f"{n}.png", text) for n, text in zip("01", expected, strict=True)]


def test_captions_are_never_dropped(tmp_path):
    place = save(tmp_path, ["0.png", "1.png"])
    (place / "0.txt").write_text("a black cat")
    with pytest.raises(ValueError, match="1 of 2 images have no caption, such as 1.png"):
        read_imports(place)
    write_csv(place)
    assert [text for _, text in read_imports(place)] == ["a black cat", "a cat, white"]
    (place / "0.txt").write_text("another")
    with pytest.raises(ValueError, match="0.png has two captions"):
        read_imports(place)
    (place / "0.txt").unlink()
    write_jsonl(place)
    with pytest.raises(ValueError, match="both metadata.jsonl and metadata.csv: write one"):
        read_imports(place)
    (place / "metadata.jsonl").unlink()
    for name in ("captions.json", "metadata.parquet", "prompts.csv"):
        (place / name).write_text("{}")
        with pytest.raises(ValueError, match=f"has {name}, which is not read: write captions to"):
            read_imports(place)
        (place / name).unlink()


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
