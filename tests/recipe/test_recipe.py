"""The notebooks of the recipe, run small: five concepts in nine packages, without a network."""

import json
import os
import shutil

import pytest
import tiny
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from packages import write_package

from data.recipe import card, emoji
from mu import ROOT
from mu.measures.evaluate import load_judge
from mu.models import load_pipeline
from mu.notebooks.run import execute

TRAIN = ROOT / "notebooks" / "80_train_pocket.ipynb"
GROW = ROOT / "notebooks" / "81_grow_pocket_sdxl.ipynb"
THINGS = {
    "ball": '<circle cx="8" cy="8" r="7" fill="red"/>',
    "box": '<path fill="#00f" d="M2 2h12v12H2z"/>',
    "hill": '<path fill="green" d="M8 1l7 14H1z"/>',
    "kite": '<path fill="gold" d="M8 0l8 8-8 8-8-8z"/>',
    "pole": '<path fill="#555" d="M7 0h2v16H7z"/>',
}
TINY = dict(
    vae_steps=2,
    vae_batch_size=2,
    judge_steps=2,
    judge_batch_size=4,
    views=1,
    unet_steps=3,
    unet_batch_size=2,
    polish=[[1, 5e-4, 0.75]],
    checkpoint_every=2,
    seeds=1,
    sampling_steps=2,
    threads=1,
)
TINY_SDXL = dict(
    views=1, steps=3, batch_size=4, lr=1e-3, checkpoint_every=2, seeds=1, sampling_steps=2
)


def write_packages(folder):
    """Write a package for each style; one of them draws on a higher canvas."""
    icons = {name: {"body": body} for name, body in THINGS.items() if name != "ball"}
    icons["sphere"] = {"body": THINGS["ball"]}
    aliases = {"ball": {"parent": "sphere"}, "lost": {"parent": "nothing"}}
    info = {"author": {"name": "Somebody"}, "license": {"title": "CC0 1.0"}}
    for i, (package, version) in enumerate((emoji.STYLES | emoji.ATTACKER_STYLES).values()):
        pack = dict(icons=icons, aliases=aliases, width=16, height=32 if i == 1 else 16)
        write_package(folder, package, version, icons=pack, info=info)


@pytest.fixture(autouse=True, scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Run 80_train_pocket once; returns its folder and its parameters."""
    base = tmp_path_factory.mktemp("recipe")
    write_packages(base / "packages")
    concepts = "".join(f"{name},shape,object,{name}\n" for name in THINGS)
    attacks = "ball,object,box\nopenmoji,style,noto;twemoji\n"
    (base / "concepts.csv").write_text("concept,group,kind,icons\n" + concepts)
    (base / "attacks.csv").write_text("concept,kind,related\n" + attacks)
    (base / "data").mkdir()
    shutil.copy(ROOT / "data" / "README.md", base / "data" / "README.md")
    places = dict(
        packages="packages",
        concepts="concepts.csv",
        attacks="attacks.csv",
        out="out",
        release="data",
    )
    parameters = TINY | {name: str(base / place) for name, place in places.items()}
    assert execute(TRAIN, base / "80.ipynb", parameters, html=False)
    return base, parameters


def draw_ball(pipe):
    """Return the shape of an image drawn by a pipeline of plain diffusers."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a ball, noto style", num_inference_steps=2, output_type="np").images
    return images.shape


def modified(folder):
    """Return the time at which each file was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_the_result_is_a_pipeline_of_plain_diffusers(recipe):
    base = recipe[0]
    folder = base / "data" / "pocket-sd"
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert draw_ball(pipe) == (1, 64, 64, 3)
    pickles = (".pt", ".pkl", ".bin", ".ckpt")
    assert not [file for file in base.rglob("*") if file.suffix in pickles]
    assert pipe.config["safety_checker"] == (None, None)
    assert (folder / "samples.png").is_file()
    labels = load_judge(base / "data" / "pocket-judge").config.id2label
    styles = [f"style:{style}" for style in (*emoji.STYLES, "other")]
    assert list(labels.values()) == [f"concept:{name}" for name in THINGS] + styles


def test_defender_and_attacker_share_nothing(recipe):
    sets = recipe[0] / "data" / "pocket-sets"
    assert sorted(folder.name for folder in sets.iterdir()) == ["ball", "openmoji"]
    styles, texts = {}, {}
    for side in ("defender", "attacker"):
        tables = [table.read_text() for table in (sets / "ball" / side).rglob("metadata.jsonl")]
        lines = [json.loads(line) for table in tables for line in table.splitlines()]
        styles[side], texts[side] = ({line[key] for line in lines} for key in ("style", "text"))
    assert styles["defender"] == set(emoji.STYLES)
    assert styles["attacker"] == set(emoji.ATTACKER_STYLES)
    assert not texts["defender"] & texts["attacker"]


def test_the_card_gets_the_measured_figures_and_keeps_its_text(recipe):
    release = recipe[0] / "data"
    metrics = json.loads((release / "pocket-sd" / "metrics.json").read_text())
    text = (release / "README.md").read_text()
    assert f"{metrics['megabytes']:.1f} MB" in text
    assert metrics["protocol"]["weights"]["pocket-judge"] in text
    assert metrics["concepts"]["images"] == 5

    def around(text):
        return text.split("<!-- figures -->")[0], text.split("<!-- /figures -->")[1]

    assert around(text) == around((ROOT / "data" / "README.md").read_text())
    card.fill_card(release / "README.md", metrics)
    assert (release / "README.md").read_text() == text


def test_a_second_run_only_reads_the_stages(recipe):
    base, parameters = recipe
    before = modified(base / "out")
    rewritten = {"metrics.json", "reconstructions.png"}  # from what exists, in no time
    rewritten |= {"concepts.png", "styles.png", "unguided.png"}
    assert execute(TRAIN, base / "again.ipynb", parameters | {"release": ""}, html=False)
    after = modified(base / "out")
    assert after.keys() == before.keys()
    assert {file.name for file in after if after[file] != before[file]} <= rewritten


def test_the_pipeline_grows_into_one_of_sdxl(recipe):
    base, parameters = recipe
    places = {name: parameters[name] for name in ("packages", "concepts", "release")}
    places |= dict(
        start=str(base / "data" / "pocket-sd"),
        judge=str(base / "data" / "pocket-judge"),
        out=str(base / "xl"),
    )
    assert execute(GROW, base / "81.ipynb", places | TINY_SDXL, html=False)
    folder = base / "data" / "pocket-sdxl"
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True)
    assert draw_ball(pipe) == (1, 64, 64, 3)
    metrics = json.loads((folder / "metrics.json").read_text())
    text = (base / "data" / "README.md").read_text()
    block = text.split("<!-- figures-sdxl -->")[1].split("<!-- /figures-sdxl -->")[0]
    assert metrics["protocol"]["weights"]["pocket-sdxl/unet"] in block
    assert set(metrics["effect"]) == {"second text encoder", "pooled embedding"}
    start = load_pipeline(str(base / "data" / "pocket-sd")).unet.conv_in
    moved = (tiny.weights(pipe.unet.conv_in).float() - tiny.weights(start)).abs().max()
    assert 0 < moved < 0.01, "training starts from the weights of the first model"
