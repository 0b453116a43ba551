"""Drawings: packages, rendering, augmentation, and the sets of defender and attacker."""

import csv
import json
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packages import write_package

from data.recipe import emoji
from data.recipe.emoji import (
    ATTACKER_STYLES,
    STYLES,
    augment,
    caption,
    draw_all,
    draw_once,
    fetch_icons,
    read_concepts,
    render,
)
from mu.concepts.sets import read_folder

PACK = {
    "prefix": "test",
    "width": 32,
    "height": 32,
    "icons": {
        "cat": {"body": '<rect width="32" height="32" fill="#f00"/>'},
        "wide": {"body": '<rect width="64" height="32" fill="#00f"/>', "width": 64},
    },
    "aliases": {"cat-face": {"parent": "cat"}, "lost": {"parent": "nobody"}},
}


def test_captions_and_concepts_file(tmp_path):
    assert caption("cat") == "a cat"
    assert caption("cat", "noto", "blue") == "a cat, noto style, on a blue background"
    red = caption("cat", color="red", template="a drawing of a {}")
    assert red == "a drawing of a cat, on a red background"
    with open(tmp_path / "concepts.csv", "w", newline="") as f:
        rows = [["concept", "group", "kind", "icons"], ["cat", "feline", "object", "cat-face cat"]]
        csv.writer(f).writerows(rows)
    cat = {"concept": "cat", "group": "feline", "kind": "object", "icons": ["cat-face", "cat"]}
    assert read_concepts(tmp_path / "concepts.csv") == [cat]


# --- packages --------------------------------------------------------------------------------


@pytest.fixture
def no_npm(monkeypatch):
    def fail(*_, **__):
        pytest.fail("npm was called although the tarball exists")

    monkeypatch.setattr(emoji.subprocess, "run", fail)


def test_icons_come_from_the_tarball_with_their_aliases(tmp_path, no_npm):
    write_package(tmp_path, "@iconify-json/test", "1.0.0", icons=PACK)
    icons = fetch_icons("@iconify-json/test", "1.0.0", tmp_path)
    assert icons.keys() == {"cat", "cat-face", "wide"}
    assert icons["cat"] == icons["cat-face"]
    assert 'viewBox="0 0 32 32"' in icons["cat"]
    assert 'viewBox="0 0 64 32"' in icons["wide"]
    assert "#f00" in icons["cat"]


def test_drawings_are_rendered_to_size_and_centred(tmp_path, no_npm):
    write_package(tmp_path, "@iconify-json/test", "1.0.0", icons=PACK)
    icons = fetch_icons("@iconify-json/test", "1.0.0", tmp_path)
    cat, wide = render(icons["cat-face"]), render(icons["wide"], 64)
    assert cat.shape == (128, 128, 4)
    assert cat.dtype == np.uint8
    assert (cat == [255, 0, 0, 255]).all()
    assert wide.shape == (64, 64, 4)
    assert (wide[20:44] == [0, 0, 255, 255]).all()
    assert not wide[:14].any()
    assert not wide[50:].any()


def test_drawings_are_centred_and_not_stretched():
    pole = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 {}"><path d="{}"/></svg>'
    square = render(pole.format(16, "M7 0h2v16H7z"))
    tall = render(pole.format(32, "M7 0h2v32H7z"))
    assert square.shape == tall.shape == (128, 128, 4)
    columns = [np.nonzero(image[..., 3].max(0))[0] for image in (square, tall)]
    assert all(63 <= index.mean() <= 64 for index in columns)
    assert len(columns[1]) < len(columns[0])


def test_every_concept_is_drawn_in_every_style_that_has_it(tmp_path, no_npm):
    write_package(tmp_path, "@a/one", "1.0.0", icons=PACK)
    plain = {"icons": {"catface": {"body": '<rect width="16" height="16"/>'}}}
    write_package(tmp_path, "@a/two", "2.0.0", icons=plain)
    concepts = [
        {"concept": "cat", "icons": ["cat-face"]},
        {"concept": "dog", "icons": ["dog", "wide"]},
    ]
    styles = {"one": ("@a/one", "1.0.0"), "two": ("@a/two", "2.0.0")}
    drawings = draw_all(concepts, styles, tmp_path)
    assert [(d["concept"], d["style"], d["icon"]) for d in drawings] == [
        ("cat", "one", "cat-face"),
        ("dog", "one", "wide"),
        ("cat", "two", "cat-face"),
    ]
    assert all(d["rgba"].shape == (128, 128, 4) for d in drawings)

    (tmp_path / "out").mkdir()
    for packages in (tmp_path, tmp_path / "nowhere"):  # the second time from the files
        saved, rgba = draw_once(tmp_path / "out", concepts, styles, packages)
        assert saved == [{k: v for k, v in d.items() if k != "rgba"} for d in drawings]
        expected = torch.stack([torch.tensor(d["rgba"]).permute(2, 0, 1) for d in drawings])
        assert torch.equal(rgba, expected)


def test_a_package_is_fetched_once(tmp_path, monkeypatch):
    calls = []

    def npm(command, cwd, **_):
        calls.append(command)
        if "1.0.0" not in command[-1]:
            return SimpleNamespace(returncode=1, stderr="npm error 404 no such version")
        write_package(cwd, "@iconify-json/test", "1.0.0", icons=PACK)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", npm)
    for _ in range(2):
        fetch_icons("@iconify-json/test", "1.0.0", tmp_path / "npm")
    assert calls == [["npm", "pack", "@iconify-json/test@1.0.0"]]
    match = "@iconify-json/test@9.9.9: npm error 404 no such version"
    with pytest.raises(RuntimeError, match=match):
        fetch_icons("@iconify-json/test", "9.9.9", tmp_path / "npm")


def test_a_failed_fetch_reports_the_message_of_npm(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 404 no such thing >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    match = "npm could not fetch @nobody/nothing@1.0: 404 no such thing"
    with pytest.raises(RuntimeError, match=match):
        fetch_icons("@nobody/nothing", "1.0", tmp_path / "packages")


# --- augmentation ----------------------------------------------------------------------------


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_augmentation_of_strength_0_is_the_drawing(rgba):
    colors = torch.rand(6, 3, generator=seeded(0))
    one, two = (augment(rgba, colors, seeded(seed), strength=0) for seed in (1, 2))
    assert torch.equal(one, two)
    assert one.shape == (6, 3, 64, 64)
    x = rgba.float() / 255
    composed = x[:, :3] * x[:, 3:] + (1 - x[:, 3:]) * colors[:, :, None, None]
    expected = torch.nn.functional.avg_pool2d(composed, 2) * 2 - 1
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)
    moved, again, other = (augment(rgba, colors, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(moved, again)
    assert (moved - other).abs().max() > 0.1
    assert (moved - one).abs().max() > 0.1
    assert moved.min() >= -1 - 1e-5
    assert moved.max() <= 1 + 1e-5


def test_hidden_colours_do_not_bleed():
    """A drawing whose transparent pixels are red shows no red under any map."""
    image = torch.zeros(1, 4, 128, 128, dtype=torch.uint8)
    image[:, 0] = 255
    image[:, 1:, 40:90, 40:90] = 255
    image[:, 0, 40:90, 40:90] = 0
    views = augment(image.repeat(8, 1, 1, 1), torch.zeros(8, 3), seeded(0))
    assert views[:, 0].max() < -1 + 1e-4
    assert views[:, 1].max() > 0.9


# --- sets ------------------------------------------------------------------------------------

OURS = ("defender/forget", "defender/retain-related", "defender/retain-unrelated")
THEIRS = ("attacker/forget", "attacker/clean")
KINDS = [("object", "cat", ["tiger"]), ("style", "noto", ["fluent", "twemoji"])]


@pytest.fixture(scope="module")
def drawings():
    """Return random drawings of eight concepts in six styles."""
    rng = np.random.default_rng(0)
    names = ["bus", "cat", "cup", "dog", "key", "leaf", "pear", "tiger"]
    return [
        {
            "concept": name,
            "style": style,
            "icon": name,
            "rgba": rng.integers(0, 256, (128, 128, 4), dtype=np.uint8),
        }
        for style in (*STYLES, *list(ATTACKER_STYLES)[:2])
        for name in names
    ]


@pytest.mark.parametrize("kind, concept, related", KINDS)
def test_defender_and_attacker_share_neither_image_nor_prompt(
    tmp_path, drawings, kind, concept, related
):
    emoji.write_attack_sets(tmp_path, drawings, concept, kind, related)
    images, prompts, lines = {}, {}, {}
    for name in (*OURS, *THEIRS):
        paths, captions = read_folder(tmp_path / name)
        images[name], prompts[name] = {path.read_bytes() for path in paths}, set(captions)
        table = (tmp_path / name / "metadata.jsonl").read_text()
        lines[name] = [json.loads(line) for line in table.splitlines()]
        assert len(images[name]) == len(paths) > 0
    for ours in OURS:
        for theirs in THEIRS:
            assert not images[ours] & images[theirs]
            assert not prompts[ours] & prompts[theirs]
    what = "style" if kind == "style" else "concept"
    for name in ("defender/forget", "attacker/forget"):
        assert all(line[what] == concept and concept in line["text"] for line in lines[name])
    assert {line[what] for line in lines["defender/retain-related"]} == set(related)
    others = [line for name in lines if not name.endswith("/forget") for line in lines[name]]
    assert all(line[what] != concept for line in others)
    clean = {line["concept"] for line in lines["attacker/clean"]}
    assert not clean & {line["concept"] for line in lines["defender/retain-unrelated"]}


@pytest.mark.parametrize("kind, concept, related", KINDS)
def test_evaluation_prompts_expect_the_right_labels(tmp_path, drawings, kind, concept, related):
    emoji.write_attack_sets(tmp_path, drawings, concept, kind, related)
    probe = json.loads((tmp_path / "probe.json").read_text())
    what = "style" if kind == "style" else "concept"
    assert probe.keys() == {"forget", "related", "unrelated"}
    assert set(probe["forget"].values()) == {f"{what}:{concept}"}
    assert set(probe["related"].values()) == {f"{what}:{name}" for name in related}
    assert f"{what}:{concept}" not in probe["unrelated"].values()


def test_the_sets_are_reproducible(tmp_path, drawings):
    contents = []
    for name in ("once", "again"):
        folder = tmp_path / name
        emoji.write_attack_sets(folder, drawings, *("cat", "object", ["tiger"]))
        files = [file for file in folder.rglob("*") if file.is_file()]
        contents.append({file.relative_to(folder): file.read_bytes() for file in files})
    assert contents[0] == contents[1]
