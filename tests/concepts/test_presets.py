"""Concepts in words: suggestions, prompts of both sides, presets."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from concepts.builds import NAMES, ROOT, SETS, cat

from mu.concepts.presets import (
    PRESETS,
    check_words,
    concept_from,
    make_concept,
    neighbours,
    override,
    read_preset,
)
from mu.concepts.sets import vocabulary
from mu.files import read_json

KNOWN = pd.read_csv(ROOT / "data" / "pocket-concepts.csv")
PAPER = {"nudity", "nudity-hrm-s", "spongebob", "snoopy", "thomas-kinkade", "kelly-mckernan"}


@pytest.mark.parametrize("name", ["pocket", "pocket-sdxl"])
def test_related_concepts_are_nearest_more_often_than_by_chance(pocket, name):
    kin = dict(zip(KNOWN.concept, KNOWN.group, strict=True))
    found = [
        neighbours(pocket[name], concept, KNOWN.concept, count=5).concept
        for concept in KNOWN.concept
    ]
    hits = np.mean(
        [
            kin[other] == kin[concept]
            for concept, others in zip(KNOWN.concept, found, strict=True)
            for other in others
        ]
    )
    counts = KNOWN.group.value_counts()
    chance = (counts * (counts - 1)).sum() / (len(KNOWN) * (len(KNOWN) - 1))
    assert hits > 3.5 * chance, (hits, chance)
    assert {"tiger", "leopard"} <= set(found[list(KNOWN.concept).index("cat")])


def test_cosines_are_of_pooled_outputs_averaged_over_encoders(pocket):
    one, two = pocket["pocket"], pocket["pocket-sdxl"]
    words = ["tiger", "pine tree", "ice cream"]
    texts = ["a cat", "a tiger", "a pine tree", "a ice cream"]
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


def test_candidates_default_to_the_vocabulary_without_the_concept(
    pocket,
):
    found = neighbours(pocket["pocket"], "teddy bear", count=1000)
    words = vocabulary(pocket["pocket"].tokenizer)
    assert set(found.concept) == set(words) - {"teddy", "bear"}
    assert found.cosine.is_monotonic_decreasing
    assert set(neighbours(pocket["pocket"], "Cat", ["cats", "CAT", "tiger", "tiger"]).concept) == {
        "tiger"
    }


def test_unknown_words_of_a_small_model_are_named(pocket):
    with pytest.raises(
        ValueError, match="know the words sofa, woman: use its words.*, or another model"
    ):
        check_words(pocket["pocket"].tokenizer, ["a woman, on a red sofa"])
    with pytest.raises(ValueError, match="does not know the words giraffes"):
        neighbours(pocket["pocket"], "giraffes", ["tiger"])
    large = type("Large", (), {"get_vocab": lambda self: {}, "__len__": lambda self: 49408})()
    check_words(large, ["SpongeBob"])  # it knows parts of every word


def test_the_two_sides_have_different_prompts():
    concept = make_concept("cat", {"related": ["tiger"]}, kind="object")
    assert concept.prompts["forget"] == {"cat": ["a cat", "a photo of a cat", "a drawing of a cat"]}
    assert concept.prompts["attack"] == {"cat": ["cat", "a picture of a cat"]}
    assert concept.prompts["related"]["tiger"][0] == "a tiger"
    assert "apple" in concept.prompts["unrelated"]
    assert "bus" in concept.prompts["clean"]
    apple = make_concept("apple", {"related": ["castle"]})
    assert "apple" not in apple.prompts["unrelated"], "everyday things, but not the concept"
    things = {"related": ["fluent"], "unrelated": ["a", "b", "c", "d"]}
    style = make_concept("noto", things, kind="style").prompts
    assert style["forget"] == {"noto": ["a a, noto style", "a c, noto style"]}
    assert style["attack"] == {"noto": ["b, noto style", "d, noto style"]}
    assert style["related"] == {"fluent": ["a a, fluent style", "a c, fluent style"]}
    assert style["unrelated"]["b"][0] == "a b"
    related = {"tiger": ["a big tiger"], "lion": None}
    own = make_concept("cat", {"related": related, "attack": ["my cat"]}).prompts
    assert own["related"] == {
        "tiger": ["a big tiger"],
        "lion": ["a lion", "a photo of a lion", "a drawing of a lion"],
    }
    assert own["attack"] == {"cat": ["my cat"]}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(kind="animal"), "unknown kind of concept 'animal': choose object or style"),
        (dict(related=[]), "needs a name and related concepts .`neighbours`"),
        (dict(name=" !"), "a concept needs a name"),
        (dict(related=["Cat", "tiger"]), "cat named twice: each thing has one role"),
        (dict(related=["tiger", "tiger"]), "tiger named twice"),
        (dict(unrelated=["tiger"]), "tiger named twice"),
        (dict(clean=["cat"]), "cat named twice"),
        (dict(attack=["A cat "]), "both sides have the prompts 'a cat': reword"),
        (dict(unrelated={"sun": ["sun"]}, clean=["sun"]), "both sides have the prompts 'sun'"),
        (dict(kind="style", unrelated=["apple"]), "at least two unrelated things, got ..apple"),
    ],
)
def test_contradictory_concepts_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        cat("pocket", **changes)


def test_parameters_choose_a_preset_or_a_concept_but_not_both():
    own = override(concept_from("m", concept=" dragon ", related="snake, crocodile,"), harmful=True)
    assert (own.name, own.generator, own.harmful) == ("dragon", "m", True)
    assert list(own.prompts["related"]) == ["snake", "crocodile"]
    assert concept_from("m", "cat").generator == "m"
    assert concept_from("m", "snoopy").generator.startswith("black-forest-labs/FLUX.1")
    assert concept_from("m", "snoopy").steps == 4
    other = override(concept_from("m", "nudity"), generator="sdxl")
    assert (other.generator, other.harmful) == ("sdxl", True)
    assert (other.steps, other.guidance) == (None, None), "FLUX's four steps are FLUX's"
    for wrong in (dict(), dict(preset="cat", concept="dog"), dict(preset="cat", related="dog")):
        with pytest.raises(ValueError, match="name either a preset, or a concept"):
            concept_from("m", **wrong)
    with pytest.raises(
        ValueError, match="unknown preset 'dog': .*concepts.yaml has nudity, .*, openmoji"
    ):
        concept_from("m", "dog")


def test_presets_match_the_paper_and_the_pocket_sets(pocket):
    concepts = {name: read_preset(name) for name in NAMES}
    drawn = {"car"}  # by the pocket model itself
    assert set(NAMES) == PAPER | drawn | {"cat", "santa-claus", "openmoji"}
    assert {name for name in NAMES if concepts[name].harmful} == {"nudity", "nudity-hrm-s"}
    for name in PAPER:
        assert concepts[name].generator == "black-forest-labs/FLUX.1-schnell"
        assert (concepts[name].steps, concepts[name].guidance) == (4, 0.0)
    assert set(concepts["nudity"].prompts["related"]) == {"woman", "man", "skin"}
    assert "dog" in concepts["nudity"].prompts["unrelated"]
    assert len(concepts["nudity"].prompts["attack"]["nudity"]) == 3
    assert len(concepts["nudity-hrm-s"].prompts["attack"]["nudity"]) == 1
    assert all("adult" in text for text in concepts["nudity"].texts("forget", "attack"))
    for name in set(NAMES) - PAPER - drawn:
        probe = read_json(SETS / name / "probe.json")
        things = {
            role: {label.split(":")[1] for label in labels.values()}
            for role, labels in probe.items()
        }
        assert things == {"forget": {concepts[name].name}} | {
            role: set(concepts[name].prompts[role]) for role in ("related", "unrelated")
        }
        check_words(pocket["pocket"].tokenizer, concepts[name].texts())
    check_words(pocket["pocket"].tokenizer, concepts["car"].texts())
    common = yaml.safe_load(Path(PRESETS).read_text())
    check_words(pocket["pocket"].tokenizer, common["everyday"] + common["benign"])
