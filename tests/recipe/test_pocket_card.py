"""The committed cards and models: the card's figures are those of the committed files."""

import csv
import json
import shutil

import pytest
from diffusers import StableDiffusionXLPipeline

from data.recipe import card, emoji
from mu import ROOT
from mu.files import digest

DATA = ROOT / "data"


@pytest.mark.parametrize(
    "model, block", [("pocket-sd", "figures"), ("pocket-sdxl", "figures-sdxl")]
)
def test_the_committed_card_has_the_committed_figures(tmp_path, model, block):
    text = (DATA / "README.md").read_text()
    shutil.copy(DATA / "README.md", tmp_path / "README.md")
    metrics = json.loads((DATA / model / "metrics.json").read_text())
    card.fill_card(tmp_path / "README.md", metrics, block)
    assert (tmp_path / "README.md").read_text() == text


def test_the_committed_card_names_packages_and_licences():
    text = (DATA / "README.md").read_text()
    for style, (package, version) in (emoji.STYLES | emoji.ATTACKER_STYLES).items():
        assert f"| `{style}` | `{package}` {version} |" in text
    for name in ("Apache-2.0.txt", "MIT-fluent-emoji.txt"):
        assert (DATA / "licences" / name).is_file()


def test_the_committed_model_is_small_and_evaluated_on_every_concept():
    assert card.megabytes(DATA / "pocket-sd", DATA / "pocket-judge") <= 30
    metrics = json.loads((DATA / "pocket-sd" / "metrics.json").read_text())
    with open(DATA / "pocket-concepts.csv", newline="") as table:
        concepts = [row["concept"] for row in csv.DictReader(table)]
    assert concepts == list(metrics["per concept"])


def test_the_committed_sdxl_model_meets_its_targets():
    folder = DATA / "pocket-sdxl"
    metrics = json.loads((folder / "metrics.json").read_text())
    for part, expected in metrics["protocol"]["weights"].items():
        assert digest(DATA / part) == expected, part
    assert metrics["concepts"]["score"] >= 0.95
    assert metrics["styles"]["score"] >= 0.9
    assert metrics["strong concepts"] >= 0.9
    assert card.megabytes(folder, DATA / "pocket-judge") <= 30
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a dog", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
