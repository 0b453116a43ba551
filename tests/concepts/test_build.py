"""Concept sets that are generated: contents, seeds, near-duplicates, refusals."""

import io
from dataclasses import replace

import httpx
import pytest
import tiny
from concepts.builds import FEW, NAMES, SETS, cat, pictures
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from mu.concepts import build as builder
from mu.concepts.build import (
    BuildOptions,
    build,
    draw,
    find_duplicate,
    load_generator,
    mark_harmful,
)
from mu.concepts.presets import SIDES, concept_from, override
from mu.concepts.probe import load_probe
from mu.concepts.sets import encode_folder, is_harmful, load_sets, read_folder
from mu.files import read_json
from mu.models import load_pipeline


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_sets_that_the_notebooks_can_read(model, tmp_path, name):
    concept = override(concept_from(model, name), generator=model)
    folder = build(tmp_path / name, concept, model, options=BuildOptions(1, 1, steps=1))
    found = {role: read_folder(folder / place) for role, place in SIDES.items()}
    for role, (_, captions) in found.items():
        first = [
            text
            for some in concept.prompts[role].values()
            for text in (some if role in ("forget", "attack") else some[:1])
        ]
        assert captions == first, "a picture of each thing, of each prompt of the concept"
    sides = [
        {
            "pictures": {p.read_bytes() for role in part for p in found[role][0]},
            "prompts": {text for role in part for text in found[role][1]},
        }
        for part in (("forget", "related", "unrelated"), ("attack", "clean"))
    ]
    assert all(sides[0][what].isdisjoint(sides[1][what]) for what in ("pictures", "prompts"))
    pipe = load_pipeline(model)
    sets, probe = load_sets(pipe, folder), load_probe(pipe, folder, "2,1,1")
    assert {name: len(s) for name, s in sets.items()} == {
        "forget": len(found["forget"][0]),
        "retain_related": len(found["related"][0]),
        "retain_unrelated": len(found["unrelated"][0]),
    }
    assert encode_folder(pipe, folder / "attacker" / "forget").mean.shape[1:] == (4, 8, 8)
    kind = "style" if concept.kind == "style" else "concept"
    assert {item["expected"] for item in probe.items if item["group"] == "forget"} == {
        f"{kind}:{concept.name}"
    }
    assert {item["expected"] for item in probe.items if item["group"] == "related"} == {
        f"{kind}:{thing}" for thing in concept.prompts["related"]
    }
    made = read_json(folder / "concept.json")
    assert (made["name"], made["kind"], made["harmful"], made["generator"], made["seed"]) == (
        concept.name,
        concept.kind,
        concept.harmful,
        model,
        0,
    )
    assert made["prompts"] == concept.prompts
    assert made["images"]["defender/forget"] == len(found["forget"][0])
    assert made["date"]
    assert made["versions"]


def test_every_image_has_its_own_seed(model, tmp_path):
    one, same, other = (
        build(tmp_path / name, cat(model), model, options=replace(FEW, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    found = pictures(one)
    assert found == pictures(same)
    assert found.keys() == pictures(other).keys()
    assert set(found.values()).isdisjoint(pictures(other).values())
    assert len(set(found.values())) == len(found) == 2 * 3 + 1 + 2 + 2 * 2 + 1


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_differ_from_evaluation_seeds_and_between_the_sides(
    model, tmp_path, monkeypatch, seed
):
    asked = []
    monkeypatch.setattr(
        builder,
        "draw",
        lambda pipe, prompt, seeds, *rest, **more: (
            asked.extend((prompt, seed) for seed in seeds)
            or draw(pipe, prompt, seeds, *rest, **more)
        ),
    )
    build(tmp_path / "x", cat(model), model, options=replace(FEW, seed=seed))
    theirs = {
        text
        for role in ("attack", "clean")
        for texts in cat(model).prompts[role].values()
        for text in texts
    }
    seeds = [{s for text, s in asked if (text in theirs) is side} for side in (False, True)]
    assert min(map(min, seeds)) >= 100_000
    assert seeds[0].isdisjoint(seeds[1])
    assert len(asked) == len(seeds[0] | seeds[1])


def test_mark_harmful_writes_concept_json_but_keeps_a_record(tmp_path):
    assert not is_harmful(tmp_path)
    assert "concept.json declares the concept harmful: all notebooks" in mark_harmful(tmp_path)
    assert is_harmful(tmp_path)
    assert "declares the concept harmful" in mark_harmful(tmp_path)
    assert read_json(tmp_path / "concept.json") == {"harmful": True}
    (tmp_path / "concept.json").write_text('{"harmful": false, "name": "cat"}')
    assert 'only this notebook blurs the images: add "harmful": true' in mark_harmful(tmp_path)
    assert read_json(tmp_path / "concept.json") == {"harmful": False, "name": "cat"}


def test_an_interrupted_build_resumes_with_identical_files(model, tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", cat(model), model, options=FEW)
    asked = []

    def counted(pipe, prompt, seeds, *rest, stop=4, **more):
        asked.append((prompt, list(seeds)))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return draw(pipe, prompt, seeds, *rest, **more)

    monkeypatch.setattr(builder, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", cat(model), model, options=FEW)
    assert len(pictures(tmp_path / "parts")) == 6
    assert not (tmp_path / "parts" / "concept.json").exists()
    asked[:] = [None] * 4
    build(tmp_path / "parts", cat(model), model, options=FEW)
    assert pictures(whole) == pictures(tmp_path / "parts")
    assert not [text for text, _ in asked[4:] if text in cat(model).prompts["forget"]["cat"]]
    for name in ("probe.json", "defender/forget/metadata.jsonl", "attacker/clean/metadata.jsonl"):
        assert (whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    monkeypatch.setattr(
        builder, "draw", lambda *_, **__: pytest.fail("a finished folder is drawn again")
    )
    build(tmp_path / "parts", cat(model), model, options=FEW)


def test_a_folder_holds_one_concept(model, tmp_path):
    build(tmp_path / "x", cat(model), model, options=FEW)
    before = pictures(tmp_path / "x")
    with pytest.raises(
        ValueError,
        match="holds a run with name='cat', not the requested 'dog': choose another folder",
    ):
        build(tmp_path / "x", cat(model, name="dog"), model, options=FEW)
    with pytest.raises(ValueError, match="images_a_prompt=2, not the requested 3"):
        build(tmp_path / "x", cat(model), model, options=replace(FEW, images_a_prompt=3))
    assert pictures(tmp_path / "x") == before


def versions(image):
    def jpeg(quality):
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        return Image.open(data).convert("RGB")

    w, h = image.size
    return [
        jpeg(90),
        jpeg(60),
        image.resize((4 * w, 4 * h), Image.LANCZOS),
        image.resize((w // 2, h // 2), Image.LANCZOS),
        image.point(lambda x: min(255, int(1.1 * x))),
    ]


def test_resaved_images_are_duplicates_and_other_drawings_are_not():
    files = {
        file.name[4:]: file for file in sorted(SETS.glob("*/*/*/*.png"))
    }  # one picture of each drawing
    kept = {}
    assert len(files) > 290
    found = [name for name, file in files.items() if find_duplicate(Image.open(file), name, kept)]
    assert not found, "different drawings, none taken for another"
    for name in list(files)[::9]:
        for i, image in enumerate(versions(Image.open(files[name]).convert("RGB"))):
            found = find_duplicate(image, "again", kept)
            assert found
            assert found["of"] == name, (name, i, found)
    other = {"other": kept["wolf-openmoji.png"]}
    found = find_duplicate(
        Image.open(files["cat-noto.png"]), "x", other, BuildOptions(distance=256)
    )
    assert found["of"] == "other", "the distance is the caller's"


def test_near_duplicates_on_either_side_are_replaced(model, tmp_path, monkeypatch):
    first = {}

    # the attacker's first image is the defender's first, a little brighter
    def alike(pipe, prompt, seeds, *rest, **more):
        images = draw(pipe, prompt, seeds, *rest, **more)
        first.setdefault("image", images[0])
        return [
            first["image"].point(lambda x: min(255, int(1.05 * x)))
            if prompt == "cat" and seed % 10**5 == 0
            else image
            for seed, image in zip(seeds, images, strict=True)
        ]

    monkeypatch.setattr(builder, "draw", alike)
    folder = build(tmp_path / "x", cat(model), model, options=FEW)
    (dropped,) = read_json(folder / "concept.json")["near_duplicates"]
    assert (folder / dropped["file"]).is_file()
    assert dropped["file"].startswith("near-duplicates/attacker/forget/")
    assert dropped["of"].startswith("defender/forget/000-cat-0")
    assert len(read_folder(folder / "attacker" / "forget")[0]) == 4, "another one took its place"
    monkeypatch.setattr(
        builder, "draw", lambda pipe, prompt, seeds, *_, **__: [first["image"]] * len(seeds)
    )
    with pytest.raises(
        ValueError,
        match="'a cat' gave 1 of 2 images in 9 attempts, the rest are near-duplicates .*"
        "fewer images, more prompts, or a lower distance",
    ):
        build(tmp_path / "y", cat(model), model, options=FEW)


def test_any_diffusers_pipeline_can_draw(model, tmp_path):
    flux = str(tiny.make_flux_pipeline(tmp_path / "flux"))
    concept = cat(flux, unrelated=["book"], forget=["a cat"], attack=["cat"], steps=1, guidance=0.0)
    folder = build(tmp_path / "x", concept, model, options=BuildOptions(1, 1))
    assert {Image.open(file).size for file in folder.rglob("*.png")} == {(16, 16)}
    assert read_json(folder / "concept.json")["generator"] == flux
    one, again, other = draw(load_generator(flux), "a cat", [3, 3, 4], 16, 1, 0.0)
    assert one.size == (512, 512)
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_unavailable_models_are_explained(model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="unknown model 'nobody': choose pocket"):
        build(tmp_path / "x", cat("nobody"), model, options=FEW)
    flux = "black-forest-labs/FLUX.1-schnell"
    with pytest.raises(FileNotFoundError, match=f"'{flux}'.*cache"):
        build(tmp_path / "y", cat(flux), model, options=FEW)
    gated = GatedRepoError(
        "403", response=httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    )

    def refuse(*_, **__):
        raise OSError("no access") from gated

    monkeypatch.setattr(builder.AutoPipelineForText2Image, "load_config", refuse)
    with pytest.raises(PermissionError, match=f"'{flux}' is gated: accept its licence"):
        load_generator(flux)


@pytest.mark.parametrize(
    "changes, options, words",
    [
        (dict(related=["woman", "sofas"]), {}, "does not know the words sofas"),
        (dict(forget=["a cat " * 10]), {}, "prompt of 22 tokens, at most 20 are read"),
        (
            {},
            dict(images_a_prompt=0),
            "must be at least 1, got .*images_a_prompt=0, images_a_concept=1",
        ),
    ],
)
def test_invalid_builds_are_refused_before_drawing(
    model, tmp_path, monkeypatch, changes, options, words
):
    monkeypatch.setattr(builder, "draw", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=words):
        build(tmp_path / "x", cat(model, **changes), model, options=replace(FEW, **options))
    assert not (tmp_path / "x").exists()
