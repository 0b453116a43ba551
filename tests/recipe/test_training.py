"""The trainers: reproducible, resumable with the same numbers, and what they leave behind."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load, save

from data.recipe import training
from data.recipe.emoji import COLORS, TEMPLATES, augment, caption
from data.recipe.training import Schedule
from mu.models import load_pipeline, text_encoders
from mu.notebooks.sizes import build_tokenizer

CONCEPTS = ("cat", "tiger", "banana")
DRAWINGS = [{"concept": c, "style": s} for c in CONCEPTS for s in ("noto", "fluent")]


def round_trip(tensors):
    """Return a copy of tensors through safetensors."""
    return load(save({name: t.clone().contiguous() for name, t in tensors.items()}))


# --- autoencoder and judge -------------------------------------------------------------------


def test_normalising_latents_changes_no_reconstruction():
    torch.manual_seed(0)
    vae = tiny.make_vae().double()
    with torch.no_grad():  # channels far from normal
        vae.quant_conv.weight[:4] *= torch.tensor([3.0, 0.2, 1.0, 7.0])[:, None, None, None]
        vae.quant_conv.bias[:4] += torch.tensor([-1.5, 0.3, 2.0, 0.0])
    g = torch.Generator().manual_seed(1)
    images = torch.rand(70, 3, 16, 16, generator=g, dtype=torch.float64) * 2 - 1

    @torch.no_grad()
    def encode_and_decode():
        posterior, g = vae.encode(images).latent_dist, torch.Generator().manual_seed(2)
        mean = posterior.mean
        drawn = mean + posterior.std * torch.randn(mean.shape, generator=g, dtype=torch.float64)
        latents = mean * vae.config.scaling_factor
        return latents, vae.decode(mean).sample, vae.decode(drawn).sample

    before, pixels, drawn = encode_and_decode()
    assert before.mean((0, 2, 3)).abs().max() > 0.3
    training.normalise_latents(vae, images)
    after, pixels_after, drawn_after = encode_and_decode()
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(after.mean((0, 2, 3)), zeros, rtol=0, atol=1e-9)
    torch.testing.assert_close(after.std((0, 2, 3)), ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(pixels_after, pixels, rtol=0, atol=1e-9)
    torch.testing.assert_close(drawn_after, drawn, rtol=0, atol=1e-9)  # the deviation too
    assert pixels.std() > 1e-3


def moved(module, before):
    return not torch.equal(tiny.weights(module), before)


def test_the_autoencoder_trains_reproducibly(rgba):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        vae = tiny.make_vae()
        before = tiny.weights(vae)
        losses = list(training.train_vae(vae, rgba, steps=2, batch_size=2))
        assert [step for step, _ in losses] == [0, 1]
        assert all(np.isfinite(loss) for _, loss in losses)
        assert moved(vae, before)
        runs.append(losses)
    assert runs[0] == runs[1]


def test_the_judge_trains_and_ends_in_evaluation_mode(rgba):
    torch.manual_seed(0)
    judge = tiny.make_judge().requires_grad_(True)
    before = tiny.weights(judge)
    labels = (torch.arange(6) // 2, torch.arange(6) % 2)
    records = training.train_judge(judge, rgba, *labels, steps=2, batch_size=8)
    losses = [loss for _, loss in records]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert moved(judge, before)
    assert not judge.training


# --- latents and captions --------------------------------------------------------------------


def test_encoded_drawings_name_drawing_and_background(rgba):
    torch.manual_seed(0)
    vae = tiny.make_vae().eval()
    data = training.encode_drawings(vae, rgba, repeats=3, strength=0)
    assert data["drawing"].tolist() == list(range(6)) * 3
    assert data["mean"].shape == data["std"].shape == (18, 4, 32, 32)
    colors = training.PALETTE[data["color"]]
    with torch.no_grad():
        views = augment(rgba[data["drawing"]], colors, torch.Generator(), strength=0)
        expected = vae.encode(views).latent_dist
    torch.testing.assert_close(data["mean"], expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data["std"], expected.std, rtol=1e-4, atol=1e-5)
    assert not data["mean"].requires_grad


def test_captions_name_what_is_drawn():
    n, g = 3000, torch.Generator().manual_seed(0)
    colors = torch.randint(len(COLORS), (n,), generator=g)
    drawings = [DRAWINGS[i % 6] for i in range(n)]
    texts = training.sample_captions(drawings, colors, g)
    assert 0.08 < np.mean([text == "" for text in texts]) < 0.12
    for text, d, color in zip(texts, drawings, colors.tolist(), strict=True):
        if not text:
            continue
        assert [concept for concept in CONCEPTS if concept in text] == [d["concept"]]
        assert ("style" in text) == (f"{d['style']} style" in text)
        if color:
            assert f"on a {list(COLORS)[color]} background" in text
        else:
            assert text.count("background") == text.count("white background")
    styled = ["style" in text for text in texts if text]
    assert 0.45 < np.mean(styled) < 0.55


# --- text encoder and UNet -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer that knows every word of the captions: none is too long."""
    captions = [
        caption(d["concept"], d["style"], color, template)
        for d in DRAWINGS
        for color in COLORS
        for template in TEMPLATES
    ]
    return build_tokenizer(captions)


def make_parts(tokenizer, rgba, repeats):
    """Return a fresh tiny pipeline and its encoded drawings."""
    torch.manual_seed(0)
    vae = tiny.make_vae().eval()
    unet = tiny.make_unet(sample_size=32)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny.make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=tiny.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, training.encode_drawings(vae, rgba, repeats=repeats)


def train(pipe, data, drawings, schedule, saved=None, until=None):
    """Train up to step number `until`; returns losses by step, saved state, weights."""
    losses, state = {}, None
    for step, loss, save_state in training.train_unet(pipe, data, drawings, schedule, saved):
        losses[step] = loss
        if step + 1 == until:
            state = round_trip(save_state())
            break
    parts = (pipe.unet, *text_encoders(pipe))
    return losses, state, [tiny.weights(part) for part in parts]


def test_unet_training_resumes_with_the_same_numbers(rgba, tokenizer):
    schedule = Schedule(steps=4, batch_size=3, ema_decay=0.9)

    def run(**options):
        pipe, data = make_parts(tokenizer, rgba, 2)
        return train(pipe, data, DRAWINGS, schedule, **options)

    losses, _, whole = run()
    assert list(losses) == [0, 1, 2, 3]
    assert np.isfinite(list(losses.values())).all()
    first, state, half = run(until=2)
    second, _, resumed = run(saved=state)
    assert first | second == losses
    assert list(second) == [2, 3]
    assert all(map(torch.equal, whole, resumed))
    assert not any(map(torch.equal, whole, half))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_stopped_training_of_each_family_resumes(family, request, monkeypatch):
    folder, sample_captions = request.getfixturevalue(f"{family}_folder"), training.sample_captions

    def short_captions(drawings, *rest):
        """Keep to the words of the tiny tokenizer: it spells others, at more tokens than fit."""
        texts = sample_captions(drawings, *rest)
        return [text and f"a {d['concept']}" for text, d in zip(texts, drawings, strict=True)]

    monkeypatch.setattr(training, "sample_captions", short_captions)
    data = {
        "mean": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2)),
        "std": torch.full((4, 4, 8, 8), 0.1),
        "drawing": torch.arange(4),
        "color": torch.tensor([0, 1, 2, 0]),
    }
    drawings = [{"concept": c, "style": "noto"} for c in ("cat", "cat", "tiger", "cup")]

    def run(**options):
        schedule = Schedule(steps=5, batch_size=2)
        return train(load_pipeline(str(folder)), data, drawings, schedule, **options)

    losses, _, weights = run()
    first, state, _ = run(until=2)
    second, _, resumed = run(saved=state)
    assert first | second == losses
    assert list(second) == [2, 3, 4]
    assert all(map(torch.equal, weights, resumed))


def test_the_result_is_the_running_average_of_the_weights(rgba, tokenizer):
    """The result equals diffusers' EMA of the weights after each step, not the last weights."""
    pipe, data = make_parts(tokenizer, rgba, 1)
    ema, seen = EMAModel(pipe.unet.parameters(), decay=0.5), []
    schedule = Schedule(steps=3, batch_size=2, ema_decay=0.5)
    for _ in training.train_unet(pipe, data, DRAWINGS, schedule):
        ema.step(pipe.unet.parameters())
        seen.append(tiny.weights(pipe.unet))
    expected = torch.cat([p.flatten() for p in ema.shadow_params])
    assert torch.equal(tiny.weights(pipe.unet), expected)
    assert not torch.equal(expected, seen[-1])
