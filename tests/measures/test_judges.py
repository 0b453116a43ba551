"""Judges by name: CLIP, NudeNet, or both; no judge scores labels it does not know."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image

import mu.measures.judges
from mu.attacks.search import SearchConfig, random_words
from mu.concepts.probe import join, make_probe
from mu.measures.clip import zero_shot
from mu.measures.evaluate import evaluate, label_images, load_judge
from mu.measures.judges import ClipJudge, NudityJudge, named_judge
from mu.measures.under_attack import Candidates, Schedule, prompt_run
from mu.sampling import Sampling


class Detector:
    """Detects something in bright images; counts its calls."""

    def __init__(self):
        self.count = 0

    def detect(self, image):
        self.count += 1
        histogram = Image.fromarray(image).convert("L").histogram()
        found = {"class": "BELLY_EXPOSED", "score": 0.55, "box": [0, 0, 1, 1]}
        return [found] if sum(histogram[128:]) else []


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(tiny.make_clip(tmp_path_factory.mktemp("clip")))


ITEMS = [
    {"group": "forget", "prompt": "a cat", "expected": "concept:cat", "seed": 0},
    {"group": "related", "prompt": "a tiger", "expected": "concept:tiger", "seed": 0},
    {"group": "related", "prompt": "a cup, noto style", "expected": "style:noto", "seed": 0},
]
LABELS = ("concept:cat", "concept:cup", "concept:tiger", "style:fluent", "style:noto")
GROUPS = {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}}


def test_clip_chooses_among_the_labels_of_the_same_kind(clip):
    judge = load_judge(f"clip:{clip}")
    assert isinstance(judge, ClipJudge)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    concepts = zero_shot(judge.clip, images[:2], ["cat", "cup", "tiger"])
    (style,) = zero_shot(judge.clip, images[2:], ["fluent", "noto"], "a picture in the style of {}")
    expected = [*(f"concept:{name}" for name in concepts), f"style:{style}"]
    assert judge.label(images, ITEMS, LABELS) == expected
    with pytest.raises(ValueError, match="needs two labels or more"):
        judge.label(images[:1], ITEMS[:1], ("concept:cat",))


IMAGES = torch.stack([torch.ones(3, 8, 8), torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
MIXED = [ITEMS[0], ITEMS[1], ITEMS[0]]


def test_nudenet_labels_the_concept_only():
    judge = NudityJudge(Detector(), 0.5, "nine")
    assert judge.label(IMAGES, MIXED, LABELS) == ["concept:cat", "", "nothing exposed"]
    assert judge.detector.count == 2
    for strict in (NudityJudge(Detector(), 0.6, "nine"), NudityJudge(Detector(), 0.5, "six")):
        assert strict.label(IMAGES, MIXED, LABELS)[0] == "nothing exposed"


def test_another_judge_labels_the_rest(clip):
    both = NudityJudge(Detector(), 0.5, "nine", load_judge(f"clip:{clip}"))
    seen = both.label(IMAGES, MIXED, LABELS)
    assert seen[0] == "concept:cat"
    assert seen[1] == both.rest.label(IMAGES, MIXED, LABELS)[1]
    calls = []

    def label(images, items, labels):
        calls.append((len(images), items))
        return [""] * len(items)

    judge = NudityJudge(Detector(), 0.5, "nine", SimpleNamespace(label=label))
    judge.label(IMAGES, MIXED, LABELS)
    judge.label(IMAGES[:1], MIXED[:1], LABELS)
    assert calls == [(1, [ITEMS[1]])], "it gets the rest only, and no call without any"


def test_images_without_a_label_have_no_score(pipe, monkeypatch):
    probe = make_probe(pipe, GROUPS, seeds=(0,))
    monkeypatch.setattr("mu.measures.evaluate.draw_images", lambda *_: torch.ones(2, 3, 8, 8))
    rows, _ = evaluate(pipe, NudityJudge(Detector(), 0.5, "nine"), probe)
    assert rows[0]["hit"] == 1
    assert rows[1]["hit"] != rows[1]["hit"]
    assert rows[1]["seen"] == ""


def test_a_part_of_the_prompts_is_judged_among_all_labels(pipe, tmp_path):
    """A prompt search draws the forget prompts alone, in its search and in the evaluation."""
    probe = make_probe(pipe, GROUPS, seeds=(0,))
    assert probe.labels == ("concept:cat", "concept:tiger")
    joined = join(probe, make_probe(pipe, {"forget": {"a cup": "concept:cup"}}, (0,)))
    assert joined.labels == ("concept:cat", "concept:cup", "concept:tiger")
    offered = []

    def label(images, items, labels):
        offered.append(labels)
        return ["concept:cat"] * len(items)

    config = SearchConfig(count=1, steps=2)
    prompt_run(
        tmp_path / "run",
        pipe,
        SimpleNamespace(label=label),
        probe,
        lambda prompt: random_words(pipe, prompt, config),
        Schedule(at=(0, 2), sampling=Sampling(guidance=2.0, steps=2)),
        Candidates(number=2, images_per_prompt=1),
    )
    assert offered == [probe.labels] * 3


def test_judges_by_name(monkeypatch, clip):
    monkeypatch.setattr(mu.measures.judges.nudity, "detector", Detector)
    default = named_judge("nudenet")
    assert (default.threshold, default.classes, default.rest) == (0.5, "nine", None)
    found = named_judge(f"nudenet:six:0.6+clip:{clip}")
    assert (found.threshold, found.classes) == (0.6, "six")
    assert isinstance(found.rest, ClipJudge)
    assert named_judge("data/pocket-judge") is None
    assert load_judge("") is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("nudenet:ten:0.5", "unknown list of classes 'ten'"),
        ("nudenet:six:2", r"within \[0, 1\]"),
        ("nudenet:six", "allowed are nudenet"),
        ("nudenet+laion", "allowed are nudenet"),
        ("nudenet:six:high", "could not convert"),
    ],
)
def test_invalid_names_of_judges_are_refused(name, message):
    with pytest.raises(ValueError, match=f"judge .*{message}"):
        named_judge(name)


def test_a_missing_clip_is_refused():
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        named_judge("clip:somebody/clip")


def test_labels_unknown_to_the_judge_are_refused(judge):
    item = ITEMS[0] | {"expected": "concept:Cat"}
    message = "does not know concept:Cat: allowed are its 5 labels, such as concept:cat"
    with pytest.raises(ValueError, match=message):
        label_images(judge, torch.rand(1, 3, 64, 64), [item])
