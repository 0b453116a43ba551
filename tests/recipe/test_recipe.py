"""The recipe of the pocket model and the benchmark, run small: five made-up things in nine made-up packages, without a network."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load, save

from data.recipe import emoji, pocket
from mu.files import digest
from mu.measures.evaluate import load_judge
from mu.models import load_pipeline, text_encoders
from mu.notebooks.run import execute

ROOT = Path(__file__).parents[2]
RECIPE, BENCHMARK = (
    ROOT / "notebooks" / "80_train_pocket.ipynb",
    ROOT / "notebooks" / "85_benchmark.ipynb",
)
SIBLING, LARGE = (
    ROOT / "notebooks" / "81_grow_pocket_sdxl.ipynb",
    ROOT / "notebooks" / "86_benchmark_large.ipynb",
)
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


def write_package(folder, package, version, **icons):
    """A tarball as npm packs them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "icons": icons,
        "info": {"author": {"name": "Somebody"}, "license": {"title": "CC0 1.0"}},
    }
    with tarfile.open(
        folder / f"{package.strip('@').replace('/', '-')}-{version}.tgz", "w:gz"
    ) as tar:
        for name, value in files.items():
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def stamps(folder):
    return {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe, executed once: (its folder, the parameters)."""
    base = tmp_path_factory.mktemp("recipe")
    icons = {name: {"body": body} for name, body in THINGS.items() if name != "ball"} | {
        "sphere": {"body": THINGS["ball"]}
    }
    for i, (package, version) in enumerate((emoji.STYLES | emoji.ATTACKER_STYLES).values()):
        shape = {"width": 16, "height": 32} if i == 1 else {"width": 16, "height": 16}
        write_package(
            base / "packages",
            package,
            version,
            icons=icons,
            aliases={"ball": {"parent": "sphere"}, "lost": {"parent": "nothing"}},
            **shape,
        )
    (base / "concepts.csv").write_text(
        "concept,group,kind,icons\n" + "".join(f"{name},shape,object,{name}\n" for name in THINGS)
    )
    (base / "attacks.csv").write_text(
        "concept,kind,related\nball,object,box\nopenmoji,style,noto;twemoji\n"
    )
    (base / "data").mkdir()
    shutil.copy(ROOT / "data" / "README.md", base / "data" / "README.md")
    parameters = TINY | {
        name: str(base / place)
        for name, place in dict(
            packages="packages",
            concepts="concepts.csv",
            attacks="attacks.csv",
            out="out",
            release="data",
        ).items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert execute(RECIPE, base / "80.ipynb", parameters, html=False)
        yield base, parameters


def test_it_makes_a_pipeline_of_plain_diffusers(recipe):
    folder = recipe[0] / "data" / "pocket-sd"
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a ball, noto style", num_inference_steps=2, output_type="np").images.shape == (
        1,
        64,
        64,
        3,
    )
    assert not [p for p in recipe[0].rglob("*") if p.suffix in (".pt", ".pkl", ".bin", ".ckpt")]
    assert pipe.config["safety_checker"] == (None, None) and (folder / "samples.png").is_file()
    judge = load_judge(recipe[0] / "data" / "pocket-judge")
    assert list(judge.config.id2label.values()) == [f"concept:{c}" for c in THINGS] + [
        f"style:{s}" for s in [*emoji.STYLES, "other"]
    ]


def test_it_writes_sets_that_share_nothing(recipe):
    sets = recipe[0] / "data" / "pocket-sets"
    assert sorted(p.name for p in sets.iterdir()) == ["ball", "openmoji"]
    lines = {
        side: [
            json.loads(line)
            for table in (sets / "ball" / side).rglob("metadata.jsonl")
            for line in table.read_text().splitlines()
        ]
        for side in ("defender", "attacker")
    }
    assert {x["style"] for x in lines["defender"]} == set(emoji.STYLES) and {
        x["style"] for x in lines["attacker"]
    } == set(emoji.ATTACKER_STYLES)
    assert not {x["text"] for x in lines["defender"]} & {x["text"] for x in lines["attacker"]}


def test_the_card_holds_the_measured_figures_and_nothing_else_changes(recipe):
    card, original = recipe[0] / "data" / "README.md", (ROOT / "data" / "README.md").read_text()
    metrics = json.loads((recipe[0] / "data" / "pocket-sd" / "metrics.json").read_text())
    text = card.read_text()
    assert (
        f"{metrics['megabytes']:.1f} MB" in text
        and metrics["protocol"]["weights"]["pocket-judge"] in text
        and metrics["concepts"]["images"] == 5
    )

    def cut(t):
        return (t.split("<!-- figures -->")[0], t.split("<!-- /figures -->")[1])

    assert cut(text) == cut(original)
    pocket.fill_card(card, metrics)
    assert card.read_text() == text


def test_a_second_run_repeats_nothing(recipe):
    base, parameters = recipe
    before = stamps(base / "out")
    written_again = {
        "metrics.json",
        "concepts.png",
        "styles.png",
        "unguided.png",
        "reconstructions.png",
    }  # from what is there, in no time
    assert execute(RECIPE, base / "again.ipynb", parameters | {"release": ""}, html=False)
    after = stamps(base / "out")
    assert (
        after.keys() == before.keys()
        and {file.name for file in after if after[file] != before[file]} <= written_again
    )


def test_its_sibling_is_a_pipeline_of_sdxl(recipe, monkeypatch):
    base, parameters = recipe
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    places = {name: parameters[name] for name in ("packages", "concepts", "release")} | dict(
        start=str(base / "data" / "pocket-sd"),
        judge=str(base / "data" / "pocket-judge"),
        out=str(base / "xl"),
    )
    assert execute(
        SIBLING,
        base / "81.ipynb",
        places
        | dict(
            views=1, steps=3, batch_size=4, lr=1e-3, checkpoint_every=2, seeds=1, sampling_steps=2
        ),
        html=False,
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(
        base / "data" / "pocket-sdxl", use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a ball, noto style", num_inference_steps=2, output_type="np").images.shape == (
        1,
        64,
        64,
        3,
    )
    metrics = json.loads((base / "data" / "pocket-sdxl" / "metrics.json").read_text())
    block = (
        (base / "data" / "README.md")
        .read_text()
        .split("<!-- figures-sdxl -->")[1]
        .split("<!-- /figures-sdxl -->")[0]
    )
    assert metrics["protocol"]["weights"]["pocket-sdxl/unet"] in block and set(
        metrics["effect"]
    ) == {"second text encoder", "pooled embedding"}
    start = load_pipeline(str(base / "data" / "pocket-sd"))
    moved = max(
        (p.float() - q).abs().max().item()
        for p, q in zip(
            pipe.unet.conv_in.parameters(), start.unet.conv_in.parameters(), strict=False
        )
    )
    assert 0 < moved < 0.01, "it starts where the elder is, and is trained from there"


def test_the_sibling_begins_as_its_elder():
    """Every weight of the UNet is taken over, and what is new is ignored: with the elder's context beside anything, the prediction is the elder's."""
    elder, g = load_pipeline("pocket"), torch.Generator().manual_seed(0)
    sibling = pocket.build_sdxl(elder)
    z, t, c = (
        torch.randn(2, 4, 16, 16, generator=g),
        torch.tensor([10, 700]),
        torch.randn(2, 20, pocket.WIDTH, generator=g),
    )
    wide = torch.cat([c, torch.randn(2, 20, pocket.WIDTH // 2, generator=g)], -1)
    added = {
        "text_embeds": torch.randn(2, pocket.WIDTH // 2, generator=g),
        "time_ids": torch.randn(2, 6, generator=g),
    }
    with torch.no_grad():
        torch.testing.assert_close(
            sibling.unet(z, t, wide, added_cond_kwargs=added).sample,
            elder.unet(z, t, c).sample,
            rtol=0,
            atol=1e-4,
        )


def test_the_benchmark_counts_no_pass_too_many(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in (
        "defender/forget",
        "defender/retain-related",
        "defender/retain-unrelated",
        "attacker/forget",
    ):
        tiny.make_images(tmp_path / "sets" / name, ["a cat", "a tiger"])
    assert execute(
        BENCHMARK,
        tmp_path / "85.ipynb",
        dict(
            model=str(sd_folder),
            sets=str(tmp_path / "sets"),
            out=str(tmp_path / "out"),
            steps=3,
            profiled_steps=2,
            batch_size=2,
            trajectory_reuse=2,
            inner_steps=2,
            inner_batch_size=2,
            retain_batch_size=2,
            threads=1,
        ),
        html=False,
    )
    made = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["loop"] for row in made["table"]] == ["attack", "unlearn", "meta-unlearn"] and made[
        "protocol"
    ]["versions"]
    assert all(
        row["passes"] == row["needed"] and 0 < row["share in UNet"] <= 1 for row in made["table"]
    )


def test_what_a_step_takes_is_measured_beside_what_was_predicted(sdxl_folder, tmp_path):
    assert execute(
        LARGE,
        tmp_path / "86.ipynb",
        dict(
            model=str(sdxl_folder),
            profile="paper-sdxl",
            steps=2,
            profiled_steps=1,
            threads=1,
            out=str(tmp_path / "out"),
            changes=dict(
                batch_size=1,
                trajectory_steps=2,
                trajectory_reuse=1,
                inner_steps=[1, 2],
                inner_batch_size=2,
                retain_batch_size=2,
                precision="bf16",
                optimizer="adamw",
                processes=1,
            ),
        ),
        html=False,
    )
    made = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert {
        "predicted, GiB",
        "passes a step",
        "seconds a step",
        "minutes of the training",
        "share in UNet",
    } < set(made["measured"]) and len(made["records"]) == 2
    assert made["protocol"]["versions"] and made["device"] and len(made["marks"]) == 2


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_stopped_training_ends_with_the_same_numbers(family, request, monkeypatch):
    plain = (
        pocket.sample_captions
    )  # the tiny tokenizer spells words that it does not know, and longer captions would not fit
    monkeypatch.setattr(
        pocket,
        "sample_captions",
        lambda drawings, colors, *rest: [
            "" if not text else f"a {d['concept']}"
            for text, d in zip(plain(drawings, colors, *rest), drawings, strict=False)
        ],
    )

    folder = request.getfixturevalue(f"{family}_folder")

    def train(state=None, until=5):
        pipe = load_pipeline(str(folder))
        parts = [pipe.unet, *text_encoders(pipe)]
        data = {
            "mean": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2)),
            "std": torch.full((4, 4, 8, 8), 0.1),
            "drawing": torch.arange(4),
            "color": torch.tensor([0, 1, 2, 0]),
        }
        drawings = [{"concept": c, "style": "noto"} for c in ("cat", "cat", "tiger", "cup")]
        losses = []
        for step, loss, save_state in pocket.train_unet(
            pipe, data, drawings, steps=5, batch_size=2, state=state
        ):
            losses.append(loss)
            if step + 1 == until < 5:
                return losses, load(save({k: v.contiguous() for k, v in save_state().items()}))
        return losses, torch.cat(
            [p.detach().flatten() for part in parts for p in part.parameters()]
        )

    losses, weights = train()
    first, state = train(until=2)
    second, resumed = train(state)
    assert first + second == losses and torch.equal(weights, resumed)
    assert torch.equal(train(train(until=2)[1])[1], weights)


def test_the_tokenizer_is_the_same_in_every_run_and_knows_its_words():
    one, *others = (
        pocket.build_tokenizer(captions)
        for captions in (tiny.CAPTIONS, tiny.CAPTIONS, tiny.CAPTIONS[::-1])
    )
    assert all(one.get_vocab() == other.get_vocab() for other in others)
    assert one.tokenize("a tiger, noto style") == [
        "a</w>",
        "tiger</w>",
        ",</w>",
        "noto</w>",
        "style</w>",
    ]
    assert (
        one.unk_token_id not in one("An elephant's 12 ears?!", add_special_tokens=False).input_ids
    ), "other words are spelt"


def test_drawings_are_read_from_packages(recipe):
    packages = recipe[0] / "packages"
    icons = emoji.fetch_icons(*emoji.STYLES["openmoji"], packages)
    assert icons["ball"] == icons["sphere"] and "lost" not in icons
    square, tall = (
        emoji.render(emoji.fetch_icons(*emoji.STYLES[style], packages)["pole"])
        for style in ("openmoji", "noto")
    )
    assert square.shape == tall.shape == (128, 128, 4)

    def columns(image):
        return np.nonzero(image[..., 3].max(0))[0]

    assert (
        63 <= columns(square).mean() <= 64
        and 63 <= columns(tall).mean() <= 64
        and len(columns(tall)) < len(columns(square))
    ), "centred, not stretched"


def test_a_package_that_npm_cannot_fetch_says_why(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 404 no such thing >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(
        RuntimeError, match="npm could not fetch @nobody/nothing@1.0: 404 no such thing"
    ):
        emoji.fetch_icons("@nobody/nothing", "1.0", tmp_path / "packages")


def test_the_committed_card_is_that_of_the_committed_files(tmp_path):
    text = (ROOT / "data" / "README.md").read_text()
    for style, (package, version) in (emoji.STYLES | emoji.ATTACKER_STYLES).items():
        assert f"| `{style}` | `{package}` {version} |" in text
    assert all(
        (ROOT / "data" / "licences" / name).is_file()
        for name in ("Apache-2.0.txt", "MIT-fluent-emoji.txt")
    )
    metrics = ROOT / "data" / "pocket-sd" / "metrics.json"
    shutil.copy(ROOT / "data" / "README.md", tmp_path / "README.md")
    pocket.fill_card(tmp_path / "README.md", json.loads(metrics.read_text()))
    assert (tmp_path / "README.md").read_text() == text
    size = sum(
        f.stat().st_size
        for part in ("pocket-sd", "pocket-judge")
        for f in (ROOT / "data" / part).rglob("*")
        if f.is_file()
    )
    assert size <= 30e6
    with open(ROOT / "data" / "pocket-concepts.csv", newline="") as table:
        assert [row["concept"] for row in csv.DictReader(table)] == list(
            json.loads(metrics.read_text())["per concept"]
        )


def test_the_siblings_card_is_that_of_its_files_and_meets_the_bars(tmp_path):
    folder, text = ROOT / "data" / "pocket-sdxl", (ROOT / "data" / "README.md").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    shutil.copy(ROOT / "data" / "README.md", tmp_path / "README.md")
    pocket.fill_card(tmp_path / "README.md", metrics, mark="figures-sdxl")
    assert (tmp_path / "README.md").read_text() == text
    for part, made in metrics["protocol"]["weights"].items():
        assert digest(ROOT / "data" / part) == made, part
    assert (
        metrics["concepts"]["score"] >= 0.95
        and metrics["styles"]["score"] >= 0.9
        and metrics["strong concepts"] >= 0.9
    )
    assert pocket.megabytes(folder, ROOT / "data" / "pocket-judge") <= 30
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a dog", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
