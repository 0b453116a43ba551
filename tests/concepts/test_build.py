"""Sets for anybody's concept: what is proposed, what is built, that its two sides share nothing, and what is refused."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import httpx
import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from mu.concepts import build as builder
from mu.concepts.build import (
    build,
    draw,
    load_generator,
    mark_harmful,
    open_image,
    read_imports,
    twin,
)
from mu.concepts.presets import (
    PRESETS,
    SIDES,
    check_words,
    concept_from,
    make_concept,
    neighbours,
    read_preset,
)
from mu.concepts.probe import load_probe
from mu.concepts.sets import encode_folder, is_harmful, load_sets, read_folder, vocabulary
from mu.files import read_json
from mu.models import load_pipeline
from mu.notebooks.run import execute

ROOT = Path(__file__).parents[2]
SETS = ROOT / "data" / "pocket-sets"
KNOWN = pd.read_csv(ROOT / "data" / "pocket-concepts.csv")
NAMES = list(yaml.safe_load(Path(PRESETS).read_text())["presets"])
PAPER = {"nudity", "nudity-hrm-s", "spongebob", "snoopy", "thomas-kinkade", "kelly-mckernan"}
FEW = dict(images_a_prompt=2, images_a_concept=1, steps=1)


@pytest.fixture(scope="module")
def pocket():
    return {name: load_pipeline(name) for name in ("pocket", "pocket-sdxl")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny pipeline that knows the words of all presets."""
    presets = [read_preset(name) for name in NAMES]
    texts = sorted(
        {
            text
            for concept in presets
            for things in concept.prompts.values()
            for some in things.values()
            for text in some
        }
    )
    return str(tiny.make_pipeline(tmp_path_factory.mktemp("words"), texts))


def cat(model, **changes):
    return make_concept(
        **dict(
            name="cat",
            related=["tiger"],
            unrelated=["apple", "book"],
            clean=["sun"],
            generator=model,
        )
        | changes
    )


def pictures(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(Path(folder).rglob("*.png"))
    }


# --- the words


@pytest.mark.parametrize("name", ["pocket", "pocket-sdxl"])
def test_kin_are_among_the_nearest_far_more_often_than_by_chance(pocket, name):
    kin = dict(zip(KNOWN.concept, KNOWN.group, strict=False))
    found = [
        neighbours(pocket[name], concept, KNOWN.concept, count=5).concept
        for concept in KNOWN.concept
    ]
    hits = np.mean(
        [
            kin[other] == kin[concept]
            for concept, others in zip(KNOWN.concept, found, strict=False)
            for other in others
        ]
    )
    counts = KNOWN.group.value_counts()
    chance = (counts * (counts - 1)).sum() / (len(KNOWN) * (len(KNOWN) - 1))
    assert hits > 3.5 * chance, (hits, chance)
    assert {"tiger", "leopard"} <= set(found[list(KNOWN.concept).index("cat")])


def test_a_cosine_is_that_of_the_pooled_outputs_and_the_mean_of_both_encoders(pocket):
    one, two = pocket["pocket"], pocket["pocket-sdxl"]
    words, texts = (
        ["tiger", "pine tree", "ice cream"],
        ["a cat", "a tiger", "a pine tree", "a ice cream"],
    )
    ids = [
        t(texts, padding="max_length", return_tensors="pt").input_ids
        for t in (one.tokenizer, two.tokenizer, two.tokenizer_2)
    ]
    with torch.no_grad():
        pooled = [
            one.text_encoder(ids[0]).pooler_output,
            two.text_encoder(ids[1]).pooler_output,
            two.text_encoder_2(ids[2]).text_embeds,
        ]
    a, b, c = (F.cosine_similarity(x[1:], x[:1]) for x in pooled)
    for pipe, expected in ((one, a), (two, (b + c) / 2)):
        found = neighbours(pipe, "cat", words, count=2)
        order = expected.argsort(descending=True)[:2]
        assert list(found.concept) == [words[i] for i in order]
        assert found.cosine.tolist() == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_without_candidates_the_words_of_the_tokenizer_are_asked_and_never_the_concept_itself(
    pocket,
):
    found = neighbours(pocket["pocket"], "teddy bear", count=1000)
    words = vocabulary(pocket["pocket"].tokenizer)
    assert (
        set(found.concept) == set(words) - {"teddy", "bear"}
        and found.cosine.is_monotonic_decreasing
    )
    assert set(neighbours(pocket["pocket"], "Cat", ["cats", "CAT", "tiger", "tiger"]).concept) == {
        "tiger"
    }


def test_words_that_a_small_model_does_not_know_are_named(pocket):
    with pytest.raises(
        ValueError,
        match="does not know the words sofa, woman: use words of its .*, or another model",
    ):
        check_words(pocket["pocket"].tokenizer, ["a woman, on a red sofa"])
    with pytest.raises(ValueError, match="does not know the words giraffes"):
        neighbours(pocket["pocket"], "giraffes", ["tiger"])
    large = type("Large", (), {"get_vocab": lambda self: {}, "__len__": lambda self: 49408})()
    check_words(large, ["SpongeBob"])  # it knows parts of every word


def test_a_concept_has_prompts_that_differ_on_both_sides():
    concept = make_concept("cat", ["tiger"], kind="object")
    assert concept.prompts["forget"] == {
        "cat": ["a cat", "a photo of a cat", "a drawing of a cat"]
    } and concept.prompts["attack"] == {"cat": ["cat", "a picture of a cat"]}
    assert (
        concept.prompts["related"]["tiger"][0] == "a tiger"
        and "apple" in concept.prompts["unrelated"]
        and "bus" in concept.prompts["clean"]
    )
    assert "apple" not in make_concept("apple", ["castle"]).prompts["unrelated"], (
        "everyday things, but not the concept"
    )
    style = make_concept("noto", ["fluent"], ["a", "b", "c", "d"], kind="style").prompts
    assert style["forget"] == {"noto": ["a a, noto style", "a c, noto style"]} and style[
        "attack"
    ] == {"noto": ["b, noto style", "d, noto style"]}
    assert (
        style["related"] == {"fluent": ["a a, fluent style", "a c, fluent style"]}
        and style["unrelated"]["b"][0] == "a b"
    )
    own = make_concept("cat", {"tiger": ["a big tiger"], "lion": None}, attack=["my cat"]).prompts
    assert own["related"] == {
        "tiger": ["a big tiger"],
        "lion": ["a lion", "a photo of a lion", "a drawing of a lion"],
    } and own["attack"] == {"cat": ["my cat"]}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(kind="animal"), "unknown kind of concept 'animal': allowed are object, style"),
        (dict(related=[]), "at least one related concept.*`neighbours` proposes"),
        (dict(name=" !"), "a concept needs a name"),
        (
            dict(related=["Cat", "tiger"]),
            "cat named twice: a thing is the concept itself, or related to it, or neither",
        ),
        (dict(related=["tiger", "tiger"]), "tiger named twice"),
        (dict(unrelated=["tiger"]), "tiger named twice"),
        (dict(clean=["cat"]), "cat named twice"),
        (dict(attack=["A cat "]), "both sides have the prompts 'a cat': reword"),
        (dict(unrelated={"sun": ["sun"]}, clean=["sun"]), "both sides have the prompts 'sun'"),
        (dict(kind="style", unrelated=["apple"]), "at least two unrelated ones, got ..apple"),
    ],
)
def test_a_concept_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        cat("pocket", **changes)


def test_parameters_choose_a_preset_or_ones_own_and_not_both():
    own = concept_from("m", concept=" dragon ", related="snake, crocodile,", harmful=True)
    assert (own.name, own.generator, own.harmful, list(own.prompts["related"])) == (
        "dragon",
        "m",
        True,
        ["snake", "crocodile"],
    )
    assert (
        concept_from("m", "cat").generator == "m"
        and concept_from("m", "snoopy").generator.startswith("black-forest-labs/FLUX.1")
        and concept_from("m", "snoopy").steps == 4
    )
    other = concept_from("m", "nudity", generator="sdxl")
    assert (other.generator, other.steps, other.guidance, other.harmful) == (
        "sdxl",
        None,
        None,
        True,
    ), "FLUX's four steps are FLUX's"
    for wrong in (dict(), dict(preset="cat", concept="dog"), dict(preset="cat", related="dog")):
        with pytest.raises(ValueError, match="name a preset, which has its words, or a concept"):
            concept_from("m", **wrong)
    with pytest.raises(
        ValueError, match="unknown preset 'dog': .*concepts.yaml has nudity, .*, openmoji"
    ):
        concept_from("m", "dog")


def test_the_presets_are_those_of_the_paper_and_of_the_pocket_model(pocket):
    concepts = {name: read_preset(name) for name in NAMES}
    assert set(NAMES) == PAPER | {"cat", "santa-claus", "openmoji"} and {
        name for name in NAMES if concepts[name].harmful
    } == {"nudity", "nudity-hrm-s"}
    for name in PAPER:
        assert (concepts[name].generator, concepts[name].steps, concepts[name].guidance) == (
            "black-forest-labs/FLUX.1-schnell",
            4,
            0.0,
        )
    assert (
        set(concepts["nudity"].prompts["related"]) == {"woman", "man", "skin"}
        and "dog" in concepts["nudity"].prompts["unrelated"]
    )
    assert (
        len(concepts["nudity"].prompts["attack"]["nudity"]) == 3
        and len(concepts["nudity-hrm-s"].prompts["attack"]["nudity"]) == 1
    )
    assert all(
        "adult" in text
        for role in ("forget", "attack")
        for text in concepts["nudity"].prompts[role]["nudity"]
    )
    for name in set(NAMES) - PAPER:
        probe = read_json(SETS / name / "probe.json")
        things = {
            role: {label.split(":")[1] for label in labels.values()}
            for role, labels in probe.items()
        }
        assert things == {"forget": {concepts[name].name}} | {
            role: set(concepts[name].prompts[role]) for role in ("related", "unrelated")
        }
        check_words(
            pocket["pocket"].tokenizer,
            [
                text
                for things in concepts[name].prompts.values()
                for some in things.values()
                for text in some
            ],
        )
    common = yaml.safe_load(Path(PRESETS).read_text())
    check_words(pocket["pocket"].tokenizer, common["everyday"] + common["benign"])


# --- the images


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_and_is_what_the_other_notebooks_read(model, tmp_path, name):
    concept = concept_from(model, name, generator=model)
    folder = build(tmp_path / name, concept, model, images_a_prompt=1, images_a_concept=1, steps=1)
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
    assert (
        made["prompts"] == concept.prompts
        and made["images"]["defender/forget"] == len(found["forget"][0])
        and made["date"]
        and made["versions"]
    )


def test_every_image_has_a_seed_of_its_own_and_another_seed_draws_others(model, tmp_path):
    one, same, other = (
        build(tmp_path / name, cat(model), model, seed=seed, **FEW)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    found = pictures(one)
    assert (
        found == pictures(same)
        and found.keys() == pictures(other).keys()
        and set(found.values()).isdisjoint(pictures(other).values())
    )
    assert len(set(found.values())) == len(found) == 2 * 3 + 1 + 2 + 2 * 2 + 1


@pytest.mark.parametrize("seed", [0, 1])
def test_no_picture_starts_from_a_probes_seed_or_from_one_of_the_other_side(
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
    build(tmp_path / "x", cat(model), model, seed=seed, **FEW)
    theirs = {
        text
        for role in ("attack", "clean")
        for texts in cat(model).prompts[role].values()
        for text in texts
    }
    seeds = [{s for text, s in asked if (text in theirs) is side} for side in (False, True)]
    assert (
        min(map(min, seeds)) >= 100_000
        and seeds[0].isdisjoint(seeds[1])
        and len(asked) == len(seeds[0] | seeds[1])
    )


def test_a_finished_folder_is_marked_as_harmful_once_and_a_record_is_left_alone(tmp_path):
    assert not is_harmful(tmp_path)
    assert "concept.json now says that this concept is harmful" in mark_harmful(
        tmp_path
    ) and is_harmful(tmp_path)
    assert "says that this concept is harmful" in mark_harmful(tmp_path) and read_json(
        tmp_path / "concept.json"
    ) == {"harmful": True}
    (tmp_path / "concept.json").write_text('{"harmful": false, "name": "cat"}')
    assert 'NOT in the other notebooks; put "harmful": true there' in mark_harmful(
        tmp_path
    ) and read_json(tmp_path / "concept.json") == {"harmful": False, "name": "cat"}


def test_a_stopped_build_goes_on_and_ends_with_the_same_files(model, tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", cat(model), model, **FEW)
    asked = []

    def counted(pipe, prompt, seeds, *rest, stop=4, **more):
        asked.append((prompt, list(seeds)))
        if len(asked) == stop:
            raise KeyboardInterrupt
        return draw(pipe, prompt, seeds, *rest, **more)

    monkeypatch.setattr(builder, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", cat(model), model, **FEW)
    assert (
        len(pictures(tmp_path / "parts")) == 6
        and not (tmp_path / "parts" / "concept.json").exists()
    )
    asked[:] = [None] * 4
    build(tmp_path / "parts", cat(model), model, **FEW)
    assert pictures(whole) == pictures(tmp_path / "parts") and not [
        text for text, _ in asked[4:] if text in cat(model).prompts["forget"]["cat"]
    ]
    for name in ("probe.json", "defender/forget/metadata.jsonl", "attacker/clean/metadata.jsonl"):
        assert (whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    monkeypatch.setattr(
        builder, "draw", lambda *_, **__: pytest.fail("a finished folder is drawn again")
    )
    build(tmp_path / "parts", cat(model), model, **FEW)


def test_a_folder_holds_one_concept(model, tmp_path):
    build(tmp_path / "x", cat(model), model, **FEW)
    before = pictures(tmp_path / "x")
    with pytest.raises(
        ValueError,
        match="holds a run with name='cat', not the requested 'dog': name another folder, or delete this one",
    ):
        build(tmp_path / "x", cat(model, name="dog"), model, **FEW)
    with pytest.raises(ValueError, match="images_a_prompt=2, not the requested 3"):
        build(tmp_path / "x", cat(model), model, **FEW | dict(images_a_prompt=3))
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


def test_the_same_picture_saved_anew_is_found_and_another_drawing_is_not():
    files = {
        file.name[4:]: file for file in sorted(SETS.glob("*/*/*/*.png"))
    }  # one picture of each drawing
    kept = {}
    assert len(files) > 290 and not [
        name for name, file in files.items() if twin(Image.open(file), name, kept)
    ], "different drawings, none taken for another"
    for name in list(files)[::9]:
        for i, image in enumerate(versions(Image.open(files[name]).convert("RGB"))):
            found = twin(image, "again", kept)
            assert found and found["of"] == name, (name, i, found)
    assert (
        twin(
            Image.open(files["cat-noto.png"]),
            "x",
            {"other": kept["wolf-openmoji.png"]},
            distance=256,
        )["of"]
        == "other"
    ), "the distance is the caller's"


def test_a_near_duplicate_on_either_side_is_left_out_and_drawn_again(model, tmp_path, monkeypatch):
    first = {}

    def alike(
        pipe, prompt, seeds, *rest, **more
    ):  # the attacker's first picture is the defender's first, made a little brighter
        images = draw(pipe, prompt, seeds, *rest, **more)
        first.setdefault("image", images[0])
        return [
            first["image"].point(lambda x: min(255, int(1.05 * x)))
            if prompt == "cat" and seed % 10**5 == 0
            else image
            for seed, image in zip(seeds, images, strict=False)
        ]

    monkeypatch.setattr(builder, "draw", alike)
    folder = build(tmp_path / "x", cat(model), model, **FEW)
    (dropped,) = read_json(folder / "concept.json")["near_duplicates"]
    assert (
        (folder / dropped["file"]).is_file()
        and dropped["file"].startswith("near-duplicates/attacker/forget/")
        and dropped["of"].startswith("defender/forget/000-cat-0")
    )
    assert len(read_folder(folder / "attacker" / "forget")[0]) == 4, "another one took its place"
    monkeypatch.setattr(
        builder, "draw", lambda pipe, prompt, seeds, *_, **__: [first["image"]] * len(seeds)
    )
    with pytest.raises(
        ValueError,
        match="'a cat' gave 1 of 2 images in 9 attempts, the others are near-duplicates .*ask for fewer images, name more prompts, or lower the distance",
    ):
        build(tmp_path / "y", cat(model), model, **FEW)


def test_any_pipeline_of_diffusers_draws(model, tmp_path):
    flux = str(tiny.make_flux_pipeline(tmp_path / "flux"))
    concept = cat(flux, unrelated=["book"], forget=["a cat"], attack=["cat"], steps=1, guidance=0.0)
    folder = build(tmp_path / "x", concept, model, images_a_prompt=1, images_a_concept=1)
    assert {Image.open(file).size for file in folder.rglob("*.png")} == {(16, 16)} and read_json(
        folder / "concept.json"
    )["generator"] == flux
    one, again, other = draw(load_generator(flux), "a cat", [3, 3, 4], 16, 1, 0.0)
    assert one.size == (512, 512) and one.tobytes() == again.tobytes() != other.tobytes()


def test_a_model_that_cannot_be_had_says_why(model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="unknown model 'nobody': neither one of pocket"):
        build(tmp_path / "x", cat(model, generator="nobody"), model, **FEW)
    with pytest.raises(
        FileNotFoundError,
        match="'black-forest-labs/FLUX.1-schnell'.*Without a network a hub model must be in the cache",
    ):
        build(
            tmp_path / "y", cat(model, generator="black-forest-labs/FLUX.1-schnell"), model, **FEW
        )
    gated = GatedRepoError(
        "403", response=httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    )

    def refuse(*_, **__):
        raise OSError("no access") from gated

    monkeypatch.setattr(builder.AutoPipelineForText2Image, "load_config", refuse)
    with pytest.raises(
        PermissionError, match="'black-forest-labs/FLUX.1-schnell' is gated: accept its licence"
    ):
        load_generator("black-forest-labs/FLUX.1-schnell")


@pytest.mark.parametrize(
    "changes, options, words",
    [
        (dict(related=["woman", "sofas"]), {}, "does not know the words sofas"),
        (dict(forget=["a cat " * 10]), {}, "prompt of 22 tokens, at most 20 are read"),
        ({}, dict(images_a_prompt=0), "must be at least 1, got 0 and 1"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_drawn(
    model, tmp_path, monkeypatch, changes, options, words
):
    monkeypatch.setattr(builder, "draw", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=words):
        build(tmp_path / "x", cat(model, **changes), model, **FEW | options)
    assert not (tmp_path / "x").exists()


# --- images of one's own


def save_emoji(folder, names, side=64):
    """Real drawings of cats and others, under these names."""
    files = sorted(
        {file.name[4:]: file for file in SETS.glob("*/*/*/*.png")}.values(),
        key=lambda file: file.name[4:],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in zip(names, files, strict=False):
        Image.open(file).resize((side, side)).save(folder / name)
    return folder


def test_images_of_ones_own_are_shared_between_the_sides(model, tmp_path):
    source = save_emoji(
        tmp_path / "mine", [f"{i}.png" for i in range(11)] + ["deep.jpg", "more.webp"]
    )
    (source / "notes.txt").write_text("no image")
    folder = build(tmp_path / "x", cat(model), model, images=str(source), **FEW)
    ours, theirs = (read_folder(folder / place / "forget") for place in ("defender", "attacker"))
    assert (
        sorted(set(ours[1])) == sorted(cat(model).prompts["forget"]["cat"])
        and set(theirs[1]) == {"cat", "a picture of a cat"}
        and (len(ours[0]), len(theirs[0])) == (6, 4)
    )
    assert {p.read_bytes() for p in ours[0]}.isdisjoint(p.read_bytes() for p in theirs[0]) and len(
        read_folder(folder / "defender/retain-unrelated")[0]
    ) == 2
    assert read_json(folder / "concept.json")["imported_from"] == str(source)
    originals = [open_image(file, 16).tobytes() for file, _ in read_imports(source)]
    assert all(Image.open(p).tobytes() in originals for p in [*ours[0], *theirs[0]])


def test_captions_of_ones_own_go_whole_to_one_side(model, tmp_path):
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
    folder = build(tmp_path / "x", cat(model), model, images=str(source), **FEW)
    ours, theirs = (read_folder(folder / place / "forget")[1] for place in ("defender", "attacker"))
    assert (
        sorted(ours + theirs) == sorted(captions)
        and set(ours).isdisjoint(theirs)
        and len(ours) > len(theirs) >= 2
    )
    write(["my cat"] * 9 + ["My cat"])
    with pytest.raises(
        ValueError,
        match="10 go to the defender, 0 to the attacker, and each needs 2: add images with other captions, or remove metadata.jsonl",
    ):
        build(tmp_path / "y", cat(model), model, images=str(source), **FEW)


def test_copies_among_ones_images_count_once(model, tmp_path):
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(10)])
    for i in range(4):
        Image.open(source / f"{i}.png").resize((90, 90)).save(source / f"copy-{i}.jpg", quality=80)
    folder = build(tmp_path / "x", cat(model), model, images=str(source), **FEW)
    assert len(read_json(folder / "concept.json")["near_duplicates"]) == 4
    (source / "9.png").unlink()
    with pytest.raises(
        ValueError,
        match="mine holds 9 images, 4 more are near-duplicates of these; needed are 6 for the defender and 4 for the attacker, 2 for each of 5 prompts",
    ):
        build(tmp_path / "y", cat(model), model, images=str(source), **FEW)
    assert not (tmp_path / "y").exists()


def test_images_of_other_sizes_are_cropped_upright_on_white(tmp_path):
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
    assert turned[:10].max() < 60 and turned[-10:].min() > 200


def test_a_folder_without_images_and_a_broken_image_are_named(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match="empty holds no image: put files there that end in .png"
    ):
        build(tmp_path / "x", cat(model), model, images=str(tmp_path / "empty"), **FEW)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to import from"):
        build(tmp_path / "x", cat(model), model, images=str(tmp_path / "nowhere"), **FEW)
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(12)])
    (source / "5.png").write_bytes((source / "5.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="5.png is not a readable image .*: remove or replace it"):
        build(tmp_path / "x", cat(model), model, images=str(source), **FEW)
    assert not (tmp_path / "x").exists()


# --- the notebook


def run(folder, **parameters):
    """10_prepare_concepts with the pocket model: (what it printed, its pictures)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        small = dict(
            out=str(folder / "runs"),
            sampling_steps=2,
            shown=2,
            images_a_prompt=1,
            images_a_concept=1,
            candidates=str(ROOT / "data" / "pocket-concepts.csv"),
            presets=PRESETS,
        )
        assert execute(
            ROOT / "notebooks" / "10_prepare_concepts.ipynb",
            folder / "10.ipynb",
            small | parameters,
        )
    executed = nbformat.read(folder / "10.ipynb", 4)
    outputs = [
        output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    return (
        text,
        [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})],
        executed,
    )


def changing(png):
    """The share of neighbouring pixels of a picture's first row of tiles that differ."""
    row = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), float)[:90]
    return (np.abs(np.diff(row, axis=1)).max(-1) > 0).mean()


def test_the_notebook_proposes_and_stops(tmp_path):
    text, shown, executed = run(tmp_path, concept="dragon")
    assert (
        "crocodile" in text
        and "Nothing is built yet" in text
        and "related = " in text
        and len(shown) == 1
    )
    assert (
        not (tmp_path / "runs").exists()
        and (tmp_path / "10.html").is_file()
        and "Exception" not in (tmp_path / "10.html").read_text()
    )
    assert not [
        cell for cell in executed.cells[-6:] if cell.cell_type == "code" and cell.execution_count
    ]


def test_the_notebook_builds_a_preset(tmp_path):
    text, shown, _ = run(tmp_path, preset="cat")
    folder = tmp_path / "runs" / "sets" / "cat"
    assert read_json(folder / "concept.json")["images"] == {
        "defender/forget": 3,
        "defender/retain-related": 9,
        "defender/retain-unrelated": 24,
        "attacker/forget": 3,
        "attacker/clean": 8,
    }
    assert (
        f"sets = '{folder}'" in text
        and "none of them on both sides" in text
        and len(list((tmp_path / "runs" / "cache").iterdir())) == 5
    )
    assert len(shown) == 2 and changing(shown[-1]) > 0.5


def test_the_notebook_imports_a_folder_and_veils_what_is_harmful(tmp_path):
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(6)])
    text, shown, _ = run(
        tmp_path,
        concept="cat",
        related="tiger",
        unrelated="apple,book",
        images=str(source),
        harmful=True,
    )
    made = read_json(tmp_path / "runs" / "sets" / "cat" / "concept.json")
    assert (
        made["harmful"]
        and made["imported_from"] == str(source)
        and made["images"]["attacker/forget"] == 2
    )
    assert changing(shown[-1]) < 0.3, "blurred beyond recognition"


def test_the_notebook_veils_a_finished_folder_on_request_and_the_others_then_do_so_too(tmp_path):
    shutil.copytree(SETS / "cat", tmp_path / "mine")
    text, shown, _ = run(tmp_path, sets=str(tmp_path / "mine"), harmful=True)
    assert (
        "concept.json now says that this concept is harmful" in text
        and is_harmful(tmp_path / "mine")
        and changing(shown[-1]) < 0.3
    )
