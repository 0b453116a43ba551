"""Blur of harmful concepts' images, tested with harmless concepts."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mu.attacks.finetune
import mu.measures.evaluate
from mu.attacks.finetune import AttackConfig, fine_tuning
from mu.concepts.probe import load_probe, make_probe
from mu.concepts.sets import is_harmful, read_image, read_metadata
from mu.images import blur, to_grid
from mu.measures.evaluate import judge_images, load_judge, measure
from mu.measures.under_attack import Schedule, attack_run
from mu.reports.plots import compare
from mu.sampling import Sampling

PROBE = {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}}


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def likeness(a, b):
    """Return the correlation of differences between neighbouring pixels."""
    a, b = (np.diff(np.asarray(x, float), axis=-2).ravel() for x in (a, b))
    return abs(np.corrcoef(a, b)[0, 1])


def test_blur_keeps_field_means_only():
    images = noise(3, 3, 64, 48)
    hidden = blur(images)
    assert hidden.shape == images.shape
    assert all(len(hidden[i].flatten(1).unique(dim=1).T) == 16 for i in range(3)), (
        "four by four plain fields each"
    )
    torch.testing.assert_close(hidden.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(hidden[1, 0, :16, :12], images[1, 0, :16, :12].mean().expand(16, 12))
    assert likeness(hidden.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1)) < 0.1


def test_blur_returns_the_type_of_its_input():
    grid = to_grid(noise(4, 3, 20, 20), 2)
    array = np.asarray(grid)
    assert isinstance(blur(grid), Image.Image)
    assert blur(grid).size == (40, 40)
    assert blur(grid.convert("L")).mode == "RGB"
    assert blur(array).dtype == np.uint8
    assert np.array_equal(blur(array), np.asarray(blur(grid)))
    assert not np.array_equal(blur(array), array)
    both = blur([array, grid])
    assert np.array_equal(both[0], blur(array))
    assert isinstance(both[1], Image.Image)
    np.testing.assert_allclose(blur(array / 255.0), blur(array) / 255.0, atol=1 / 255)
    assert blur(noise(2, 3, 7, 5).half()).dtype == torch.half
    assert blur(noise(0, 3, 8, 8)).shape == (
        0,
        3,
        8,
        8,
    )
    with pytest.raises(ValueError, match=r"\(n, 3, height, width\), got \(3, 8, 8\)"):
        blur(noise(3, 8, 8))


def test_the_judge_does_not_recognise_its_own_blurred_training_images():
    sets, judge = Path(__file__).parents[2] / "data" / "pocket-sets", load_judge()
    lines = [
        line | {"path": file.parent / line["file_name"]}
        for file in sorted(sets.rglob("metadata.jsonl"))
        for line in read_metadata(file.parent)
    ]
    images = torch.stack([(read_image(line["path"], 64) + 1) / 2 for line in lines])

    def known(pictures):
        return np.mean(
            [
                seen == f"concept:{line['concept']}"
                for seen, line in zip(judge_images(judge, pictures), lines, strict=True)
            ]
        )

    assert len(lines) > 500
    assert known(images) > 0.95
    assert known(blur(images)) < 0.2 < known(blur(images, 8))


@pytest.fixture
def drawn(pipe, judge, sets, monkeypatch):
    """Return a function that measures and attacks on noise images: PNG name → its noise."""

    def run(folder, probe):
        made = []

        def draw(*_):
            made.append(noise(len(probe.items), 3, 64, 64, seed=len(made)))
            return made[-1]

        monkeypatch.setattr("mu.measures.evaluate.draw_images", draw)
        rows = measure(folder / "before", pipe, judge, probe, 2.0, 2, {"model": "tiny"})
        make_attack = partial(fine_tuning, pipe, sets[0], probe, AttackConfig())
        schedule = Schedule(at=(0, 1, 2), sampling=Sampling(steps=2))
        before = (rows, folder / "before" / "samples.png")
        attack_run(folder / "attack", pipe, judge, make_attack, schedule, before)
        before, one, two = (to_grid(images) for images in made)
        return {
            "before/samples.png": before,
            "attack/step-0000.png": before,
            "attack/step-0001.png": one,
            "attack/step-0002.png": two,
        }

    return run


@pytest.mark.parametrize(
    "harmful, show_unblurred, shown",
    [(False, False, True), (True, True, True), (True, False, False)],
)
def test_saved_images_of_a_harmful_concept_are_blurred(
    pipe, drawn, tmp_path, harmful, show_unblurred, shown
):
    probe = replace(make_probe(pipe, PROBE, (0, 1)), harmful=harmful, show_unblurred=show_unblurred)
    made = drawn(tmp_path, probe)
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.png")} == set(made)
    for name, real in made.items():
        found = likeness(Image.open(tmp_path / name), real)
        assert found > 0.99 if shown else found < 0.1, (name, found)
    others = {f.suffix for f in tmp_path.rglob("*") if f.is_file()} - {".png"}
    assert others == {".json"}, "other files may hold pictures"


def test_the_judge_sees_unblurred_images(pipe, judge, sets, monkeypatch, tmp_path):
    probe, seen = make_probe(pipe, PROBE, (0, 1)), []
    real = mu.measures.evaluate.judge_images
    monkeypatch.setattr(
        mu.measures.evaluate,
        "judge_images",
        lambda judge, images, kind: seen.append(images) or real(judge, images, kind),
    )
    rows = [
        measure(tmp_path / str(h), pipe, judge, replace(probe, harmful=h), 2.0, 2, {})
        for h in (False, True)
    ]
    assert rows[0] == rows[1]
    assert torch.equal(seen[0], seen[1])


def test_images_are_drawn_again_only_if_blur_settings_change(pipe, judge, monkeypatch, tmp_path):
    plain, calls, real = make_probe(pipe, PROBE, (0,)), [], mu.measures.evaluate.evaluate
    monkeypatch.setattr(mu.measures.evaluate, "evaluate", lambda *a: calls.append(1) or real(*a))
    found = []
    for probe, drawings in (
        (plain, 1),
        (plain, 1),
        (replace(plain, harmful=True), 2),
        (replace(plain, harmful=True, show_unblurred=True), 3),
        (replace(plain, show_unblurred=True), 4),
    ):
        measure(tmp_path, pipe, judge, probe, 2.0, 2, {"model": "tiny"})
        assert len(calls) == drawings
        found.append((tmp_path / "samples.png").read_bytes())
    assert found[0] == found[1] == found[3] == found[4] != found[2]
    assert "blurred" not in json.loads((tmp_path / "metrics.json").read_text())["protocol"]


def test_a_concept_folder_declares_harmful_concepts(pipe, tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    assert not is_harmful(tmp_path)
    assert not load_probe(pipe, tmp_path, "1,1").blurred
    (tmp_path / "concept.json").write_text('{"harmful": true}')
    assert is_harmful(tmp_path)
    assert load_probe(pipe, tmp_path, "1,1").blurred
    assert not load_probe(pipe, tmp_path, "1,1", show_unblurred=True).blurred
    (tmp_path / "concept.json").write_text('{"name": "cat"}')
    assert not is_harmful(tmp_path)


def test_comparisons_blur_images_that_were_saved_unblurred(tmp_path):
    rows = [{"group": "forget", "prompt": f"p{i}", "seed": 0} for i in range(2)]
    to_grid(noise(2, 3, 64, 64)).save(tmp_path / "x.png")
    shown, hidden = (
        compare({"x": (rows, tmp_path / "x.png")}, blurred=v).axes[0].images[0].get_array()
        for v in (False, True)
    )
    assert likeness(shown, hidden) < 0.1
    assert np.array_equal(blur(np.asarray(shown)), hidden)
