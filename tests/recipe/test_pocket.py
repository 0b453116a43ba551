"""The recipe of the pocket model, with tiny networks, and the data it is made from."""

import csv
import io
import json
import subprocess
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load, save
from transformers import CLIPTokenizer

from data.recipe import emoji, pocket
from data.recipe.emoji import (
    COLORS,
    STYLES,
    TEMPLATES,
    augment,
    caption,
    draw_all,
    fetch_icons,
    read_concepts,
    render,
)

WORDS = sorted({word for text in tiny.CAPTIONS for word in text.replace(",", " ,").split()})


@pytest.fixture(scope="module")
def tokenizer():
    return pocket.build_tokenizer(tiny.CAPTIONS)


@pytest.fixture(scope="module")
def rgba():
    """Six drawings of three concepts in two styles: half-transparent coloured squares on nothing."""
    images = torch.zeros(6, 4, 128, 128, dtype=torch.uint8)
    for i in range(6):
        images[i, :3, 20 + 5 * i : 90, 30:100] = torch.randint(
            256, (3, 1, 1), generator=torch.Generator().manual_seed(i)
        ).byte()
        images[i, 3, 20 + 5 * i : 90, 30:100] = 255
    return images


DRAWINGS = [
    {"concept": c, "style": s} for c in ("cat", "tiger", "banana") for s in ("noto", "fluent")
]


# --- tokenizer -----------------------------------------------------------------------------------------------------


def test_every_word_is_one_token(tokenizer):
    for text in tiny.CAPTIONS:
        words = text.replace(",", " ,").split()
        tokens = tokenizer.tokenize(text)
        assert tokens == [word + "</w>" for word in words]
        ids = tokenizer(text).input_ids
        assert (
            ids[0] == tokenizer.bos_token_id
            and ids[-1] == tokenizer.eos_token_id
            and len(ids) == len(words) + 2
        )
    assert len({tokenizer.convert_tokens_to_ids(word + "</w>") for word in WORDS}) == len(WORDS)


def test_no_prompt_is_out_of_vocabulary(tokenizer):
    for text in ("zyx", "A CAT!", "q#7"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1], tokenizer.tokenize(text)
    assert tokenizer("A CAT").input_ids == tokenizer("a cat").input_ids


def test_the_tokenizer_is_the_same_each_time_it_is_built(tokenizer):
    for _ in range(3):
        assert pocket.build_tokenizer(tiny.CAPTIONS).get_vocab() == tokenizer.get_vocab()


def test_the_tokenizer_comes_back_from_disk(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*tiny.CAPTIONS, "zyx qr", ""]:
        kwargs = dict(padding="max_length", truncation=True, max_length=pocket.LENGTH)
        assert (
            again(text, **kwargs).input_ids == tokenizer(text, **kwargs).input_ids
            and len(again(text, **kwargs).input_ids) == pocket.LENGTH
        )
    assert again.model_max_length == pocket.LENGTH and len(again) == len(tokenizer)
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert (
        again.decode(again("a drawing of a tiger").input_ids, skip_special_tokens=True).strip()
        == "a drawing of a tiger"
    )


def test_the_text_encoder_reads_up_to_the_end_of_the_prompt(tokenizer):
    """eos and pad are those of the tokenizer; what comes after a token does not change it."""
    torch.manual_seed(0)
    encoder = pocket.build_text_encoder(tokenizer).eval()
    tokens = tokenizer(
        ["a cat", "a cat"], padding="max_length", max_length=pocket.LENGTH, return_tensors="pt"
    ).input_ids
    tokens[1, 4:] = tokenizer("cup").input_ids[1]
    with torch.no_grad():
        found = encoder(tokens)
    assert found.last_hidden_state.shape == (2, pocket.LENGTH, pocket.WIDTH)
    torch.testing.assert_close(
        found.last_hidden_state[0, :4], found.last_hidden_state[1, :4], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        found.pooler_output[0], found.last_hidden_state[0, 3], rtol=0, atol=1e-5
    )


# --- components ----------------------------------------------------------------------------------------------------


def test_the_parts_fit_together_and_in_thirty_megabytes(tokenizer, tmp_path):
    vae, unet, encoder = (
        pocket.build_vae(),
        pocket.build_unet(),
        pocket.build_text_encoder(tokenizer),
    )
    judge = pocket.build_judge([f"c{i}" for i in range(130)], STYLES)
    assert (
        unet.config.cross_attention_dim == encoder.config.hidden_size
        and unet.config.in_channels == vae.config.latent_channels
    )
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 4, unet.config.sample_size, unet.config.sample_size)
    size = sum(p.numel() for part in (vae, unet, encoder, judge) for p in part.parameters())
    assert 2 * size < 30e6  # half precision
    scheduler = pocket.build_scheduler()
    assert (
        scheduler.config.prediction_type == "epsilon"
        and scheduler.config.beta_schedule == "scaled_linear"
    )


def test_the_judge_names_concepts_then_styles(tmp_path):
    pocket.build_judge([f"c{i}" for i in range(12)], ["noto", "fluent"]).save_pretrained(tmp_path)
    from mu.measures.evaluate import load_judge

    config = load_judge(tmp_path).config
    assert [config.id2label[i] for i in range(14)] == [f"concept:c{i}" for i in range(12)] + [
        "style:noto",
        "style:fluent",
    ]


def test_normalising_latents_changes_no_reconstruction():
    torch.manual_seed(0)
    vae = tiny.make_vae().double()
    with torch.no_grad():  # channels far from normal
        vae.quant_conv.weight[:4] *= torch.tensor([3.0, 0.2, 1.0, 7.0])[:, None, None, None]
        vae.quant_conv.bias[:4] += torch.tensor([-1.5, 0.3, 2.0, 0.0])
    images = (
        torch.rand(70, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * 2
        - 1
    )

    def look():
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
            drawn = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape,
                generator=torch.Generator().manual_seed(2),
                dtype=torch.float64,
            )
            return (
                posterior.mean * vae.config.scaling_factor,
                vae.decode(posterior.mean).sample,
                vae.decode(drawn).sample,
            )

    before, pixels, drawn = look()
    assert before.mean((0, 2, 3)).abs().max() > 0.3
    pocket.normalise_latents(vae, images)
    after, pixels_after, drawn_after = look()
    torch.testing.assert_close(
        after.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(
        after.std((0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(pixels_after, pixels, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        drawn_after, drawn, rtol=0, atol=1e-9
    )  # the deviation was folded in as well
    assert pixels.std() > 1e-3


# --- trainers ------------------------------------------------------------------------------------------------------


def moved(module, before):
    return not torch.equal(tiny.weights(module), before)


def test_vae_trainer_runs_and_repeats(rgba):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        vae = tiny.make_vae()
        before = tiny.weights(vae)
        losses = list(pocket.train_vae(vae, rgba, steps=2, batch_size=2))
        assert (
            [step for step, _ in losses] == [0, 1]
            and all(np.isfinite(loss) for _, loss in losses)
            and moved(vae, before)
        )
        found.append(losses)
    assert found[0] == found[1]


def test_judge_trainer_runs_and_leaves_the_judge_ready(rgba):
    torch.manual_seed(0)
    judge = tiny.make_judge().requires_grad_(True)
    before = tiny.weights(judge)
    concepts, styles = torch.arange(6) // 2, torch.arange(6) % 2
    losses = [
        loss for _, loss in pocket.train_judge(judge, rgba, concepts, styles, steps=2, batch_size=8)
    ]
    assert (
        len(losses) == 2
        and np.isfinite(losses).all()
        and moved(judge, before)
        and not judge.training
    )


def assemble(vae, unet, encoder, tokenizer):
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def speaker():
    """A tokenizer that knows every word of the drawings' captions, as the recipe's does: none is too long."""
    return pocket.build_tokenizer(
        [
            caption(d["concept"], d["style"], color, template)
            for d in DRAWINGS
            for color in COLORS
            for template in TEMPLATES
        ]
    )


def unet_run(rgba, tokenizer, steps, state=None, total=None):
    """The first `steps` steps (all if None) of a tiny `train_unet`, from fresh networks: losses, last save, weights."""
    torch.manual_seed(0)
    vae, unet, encoder = (
        tiny.make_vae().eval(),
        tiny.make_unet(sample_size=32),
        tiny.make_text_encoder(tokenizer),
    )
    data = pocket.encode_drawings(vae, rgba, repeats=2)
    losses, saved = {}, None
    for step, loss, snapshot in pocket.train_unet(
        assemble(vae, unet, encoder, tokenizer),
        data,
        DRAWINGS,
        steps=total or steps,
        batch_size=3,
        ema_decay=0.9,
        state=state,
    ):
        losses[step] = loss
        if total and step == steps - 1:
            saved = load(save({name: t.clone().contiguous() for name, t in snapshot().items()}))
            break
    return losses, saved, tiny.weights(unet), tiny.weights(encoder)


def test_unet_trainer_goes_on_with_the_same_numbers(rgba, speaker):
    losses, _, *whole = unet_run(rgba, speaker, 4)
    assert list(losses) == [0, 1, 2, 3] and np.isfinite(list(losses.values())).all()
    first, state, *half = unet_run(rgba, speaker, 2, total=4)
    second, _, *resumed = unet_run(rgba, speaker, 4, state=state)
    assert first | second == losses and list(second) == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=False))
    assert not any(torch.equal(a, b) for a, b in zip(whole, half, strict=False))


def test_the_result_is_the_average_of_the_weights(rgba, speaker):
    """Two steps: what is left is diffusers' EMA of the weights after each, and not the last weights."""
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    unet, encoder = tiny.make_unet(sample_size=32), tiny.make_text_encoder(speaker)
    vae = tiny.make_vae().eval()
    data = pocket.encode_drawings(vae, rgba, repeats=1)
    ema, seen = EMAModel(unet.parameters(), decay=0.5), []
    for _ in pocket.train_unet(
        assemble(vae, unet, encoder, speaker), data, DRAWINGS, steps=3, batch_size=2, ema_decay=0.5
    ):
        ema.step(unet.parameters())
        seen.append(tiny.weights(unet))
    expected = torch.cat([p.flatten() for p in ema.shadow_params])
    assert torch.equal(tiny.weights(unet), expected) and not torch.equal(expected, seen[-1])


def test_encoded_drawings_know_where_they_come_from(rgba):
    torch.manual_seed(0)
    vae = tiny.make_vae().eval()
    data = pocket.encode_drawings(vae, rgba, repeats=3, strength=0)
    assert data["drawing"].tolist() == list(range(6)) * 3 and data["mean"].shape == data[
        "std"
    ].shape == (18, 4, 32, 32)
    g = torch.Generator()
    with torch.no_grad():
        views = augment(rgba[data["drawing"]], pocket.PALETTE[data["color"]], g, strength=0)
        expected = vae.encode(views).latent_dist
    torch.testing.assert_close(data["mean"], expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data["std"], expected.std, rtol=1e-4, atol=1e-5)
    assert not data["mean"].requires_grad


def test_captions_say_what_is_drawn():
    n, g = 3000, torch.Generator().manual_seed(0)
    colors = torch.randint(len(COLORS), (n,), generator=g)
    drawings = [DRAWINGS[i % 6] for i in range(n)]
    texts = pocket.sample_captions(drawings, colors, g)
    empty = np.mean([text == "" for text in texts])
    assert 0.08 < empty < 0.12
    for text, d, c in zip(texts, drawings, colors.tolist(), strict=False):
        if text:
            assert d["concept"] in text and not any(
                other in text for other in {"cat", "tiger", "banana"} - {d["concept"]}
            )
            assert ("style" in text) == (f"{d['style']} style" in text)
            assert (
                f"on a {list(COLORS)[c]} background" in text
                if c
                else text.count("background") == text.count("white background")
            )
    said = [text for text in texts if text]
    assert 0.45 < np.mean(["style" in text for text in said]) < 0.55


# --- drawings ------------------------------------------------------------------------------------------------------


def test_augmentation_of_strength_0_is_the_drawing(rgba):
    colors = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    one, two = (
        augment(rgba, colors, torch.Generator().manual_seed(seed), strength=0) for seed in (1, 2)
    )
    assert torch.equal(one, two) and one.shape == (6, 3, 64, 64)
    x = rgba.float() / 255
    composed = x[:, :3] * x[:, 3:] + (1 - x[:, 3:]) * colors[:, :, None, None]
    torch.testing.assert_close(
        one, torch.nn.functional.avg_pool2d(composed, 2) * 2 - 1, rtol=0, atol=1e-4
    )
    moved, again, other = (
        augment(rgba, colors, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert (
        torch.equal(moved, again)
        and (moved - other).abs().max() > 0.1
        and (moved - one).abs().max() > 0.1
    )
    assert moved.min() >= -1 - 1e-5 and moved.max() <= 1 + 1e-5


def test_half_transparent_edges_do_not_bleed():
    """A drawing whose hidden colour (alpha 0) is red shows none of it, whatever the map."""
    image = torch.zeros(1, 4, 128, 128, dtype=torch.uint8)
    image[:, 0] = 255
    image[:, 1:, 40:90, 40:90] = 255
    image[:, 0, 40:90, 40:90] = 0
    found = augment(image.repeat(8, 1, 1, 1), torch.zeros(8, 3), torch.Generator().manual_seed(0))
    assert found[:, 0].max() < -1 + 1e-4 and found[:, 1].max() > 0.9


def npm_package(folder, package, version, pack):
    """A tarball such as `npm pack` leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(pack).encode()
    with tarfile.open(
        folder / f"{package.strip('@').replace('/', '-')}-{version}.tgz", "w:gz"
    ) as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


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


@pytest.fixture
def no_npm(monkeypatch):
    monkeypatch.setattr(
        emoji.subprocess,
        "run",
        lambda *_, **__: pytest.fail("npm was called though the tarball is there"),
    )


def test_icons_come_from_the_tarball_with_their_aliases(tmp_path, no_npm):
    npm_package(tmp_path, "@iconify-json/test", "1.0.0", PACK)
    icons = fetch_icons("@iconify-json/test", "1.0.0", tmp_path)
    assert icons.keys() == {"cat", "cat-face", "wide"} and icons["cat"] == icons["cat-face"]
    assert (
        'viewBox="0 0 32 32"' in icons["cat"]
        and 'viewBox="0 0 64 32"' in icons["wide"]
        and "#f00" in icons["cat"]
    )


def test_drawings_are_rendered_to_size_and_centred(tmp_path, no_npm):
    npm_package(tmp_path, "@iconify-json/test", "1.0.0", PACK)
    icons = fetch_icons("@iconify-json/test", "1.0.0", tmp_path)
    cat, wide = render(icons["cat-face"]), render(icons["wide"], 64)
    assert cat.shape == (128, 128, 4) and cat.dtype == np.uint8 and (cat == [255, 0, 0, 255]).all()
    assert (
        wide.shape == (64, 64, 4)
        and (wide[20:44] == [0, 0, 255, 255]).all()
        and not wide[:14].any()
        and not wide[50:].any()
    )


def test_every_concept_is_drawn_in_every_style_that_has_it(tmp_path, no_npm):
    npm_package(tmp_path, "@a/one", "1.0.0", PACK)
    npm_package(
        tmp_path,
        "@a/two",
        "2.0.0",
        {"icons": {"catface": {"body": '<rect width="16" height="16"/>'}}},
    )
    concepts = [
        {"concept": "cat", "icons": ["cat-face"]},
        {"concept": "dog", "icons": ["dog", "wide"]},
    ]
    found = draw_all(concepts, {"one": ("@a/one", "1.0.0"), "two": ("@a/two", "2.0.0")}, tmp_path)
    assert [(d["concept"], d["style"], d["icon"]) for d in found] == [
        ("cat", "one", "cat-face"),
        ("dog", "one", "wide"),
        ("cat", "two", "cat-face"),
    ]
    assert all(d["rgba"].shape == (128, 128, 4) for d in found)


def test_a_package_is_fetched_once_and_a_failure_says_why(tmp_path, monkeypatch):
    calls = []

    def npm(command, cwd, **_):
        calls.append(command)
        if "1.0.0" in command[-1]:
            npm_package(cwd, "@iconify-json/test", "1.0.0", PACK)
        return SimpleNamespace(
            returncode=0 if "1.0.0" in command[-1] else 1, stderr="npm error 404 no such version"
        )

    monkeypatch.setattr(subprocess, "run", npm)
    for _ in range(2):
        fetch_icons("@iconify-json/test", "1.0.0", tmp_path / "npm")
    assert calls == [["npm", "pack", "@iconify-json/test@1.0.0"]]
    with pytest.raises(
        RuntimeError, match="@iconify-json/test@9.9.9: npm error 404 no such version"
    ):
        fetch_icons("@iconify-json/test", "9.9.9", tmp_path / "npm")


@pytest.mark.parametrize(
    "kind, concept, related",
    [("object", "cat", ["tiger"]), ("style", "noto", ["fluent", "twemoji"])],
)
def test_defender_and_attacker_share_neither_image_nor_prompt(tmp_path, kind, concept, related):
    from mu.concepts.sets import read_folder

    rng, names = (
        np.random.default_rng(0),
        ["bus", "cat", "cup", "dog", "key", "leaf", "pear", "tiger"],
    )
    drawings = [
        {
            "concept": c,
            "style": s,
            "icon": c,
            "rgba": rng.integers(0, 256, (128, 128, 4), dtype=np.uint8),
        }
        for s in (*STYLES, *list(emoji.ATTACKER_STYLES)[:2])
        for c in names
    ]
    emoji.write_attack_sets(tmp_path, drawings, concept, kind, related)
    images, prompts, said = {}, {}, {}
    for folder in (
        "defender/forget",
        "defender/retain-related",
        "defender/retain-unrelated",
        "attacker/forget",
        "attacker/clean",
    ):
        paths, captions = read_folder(tmp_path / folder)
        images[folder], prompts[folder] = {path.read_bytes() for path in paths}, set(captions)
        said[folder] = [
            json.loads(line)
            for line in (tmp_path / folder / "metadata.jsonl").read_text().splitlines()
        ]
        assert len(images[folder]) == len(paths) > 0
    for ours in ("defender/forget", "defender/retain-related", "defender/retain-unrelated"):
        for theirs in ("attacker/forget", "attacker/clean"):
            assert not images[ours] & images[theirs] and not prompts[ours] & prompts[theirs]
    what = "style" if kind == "style" else "concept"
    for folder in ("defender/forget", "attacker/forget"):
        assert all(line[what] == concept and concept in line["text"] for line in said[folder])
    assert {line[what] for line in said["defender/retain-related"]} == set(related)
    assert not any(
        line[what] == concept for f in said for line in said[f] if not f.endswith("/forget")
    )
    assert not {line["concept"] for line in said["attacker/clean"]} & {
        line["concept"] for line in said["defender/retain-unrelated"]
    }
    probe = json.loads((tmp_path / "probe.json").read_text())
    assert probe.keys() == {"forget", "related", "unrelated"} and set(probe["forget"].values()) == {
        f"{what}:{concept}"
    }
    assert set(probe["related"].values()) == {f"{what}:{name}" for name in related}
    assert f"{what}:{concept}" not in probe["unrelated"].values()
    emoji.write_attack_sets(tmp_path / "again", drawings, concept, kind, related)
    assert {
        p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.*")
    } == {
        p.relative_to(tmp_path): p.read_bytes()
        for top in ("defender", "attacker", "probe.json")
        for p in [tmp_path / top, *(tmp_path / top).rglob("*.*")]
        if p.is_file()
    }


def test_captions_and_concepts_file(tmp_path):
    assert (
        caption("cat") == "a cat"
        and caption("cat", "noto", "blue") == "a cat, noto style, on a blue background"
    )
    assert (
        caption("cat", color="red", template="a drawing of a {}")
        == "a drawing of a cat, on a red background"
    )
    with open(tmp_path / "concepts.csv", "w", newline="") as f:
        csv.writer(f).writerows(
            [["concept", "group", "kind", "icons"], ["cat", "feline", "object", "cat-face cat"]]
        )
    assert read_concepts(tmp_path / "concepts.csv") == [
        {"concept": "cat", "group": "feline", "kind": "object", "icons": ["cat-face", "cat"]}
    ]
