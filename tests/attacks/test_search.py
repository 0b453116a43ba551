"""Attacks by prompts: losses match the equations, searches beat chance, weights stay unchanged."""

import copy

import pytest
import tiny
import torch

from mu.attacks.search import (
    SearchConfig,
    make_search,
    opposed,
    p4d,
    project_to_simplex,
    random_words,
    ring_a_bell,
    unlearn_diff_atk,
)
from mu.attacks.tokens import words
from mu.concepts.sets import encode_images
from mu.losses import draw_minibatch, gradients, squared_errors
from mu.models import encode_prompts, load_pipeline, text_encoders


@pytest.fixture(scope="module")
def images(sd_folder):
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return encode_images(load_pipeline(str(sd_folder)), pixels, ["a cat"] * 4)


def predict(pipe, unet, batch, text):
    """Return ε(z_t, t, c(text)) for a minibatch."""
    encoded = encode_prompts(pipe, [text])["encoder_hidden_states"]
    latents, timesteps, _ = batch.inputs
    rows = encoded.expand(len(latents), -1, -1)
    return unet(latents, timesteps, encoder_hidden_states=rows).sample


def test_the_simplex_projection_is_the_nearest_probability():
    u = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 2
    p = project_to_simplex(u)
    assert (p >= 0).all()
    assert torch.allclose(p.sum(-1), torch.ones(6), atol=1e-5)
    others = torch.distributions.Dirichlet(torch.full((9,), 0.3)).sample((4000,))
    nearest = (u[:, None] - others).pow(2).sum(-1).min(1).values
    assert (nearest >= (u - p).pow(2).sum(-1) - 1e-5).all()
    assert torch.allclose(project_to_simplex(p), p, atol=1e-6)


@pytest.mark.parametrize("name", ["unlearn-diff-atk", "p4d"])
def test_the_first_loss_is_that_of_the_reported_prompt(pipe, images, name):
    """P4D compares with ε_0(z_t, t, c(prompt)), UnlearnDiffAtk with ε."""
    original = tiny.frozen(tiny.make_unet(seed=1))
    config = SearchConfig(count=2, batch_size=4)
    search = make_search(name, pipe, original, images, (), config, seed=4)
    first = next(search("a cat"))
    assert first.prompt.endswith(" a cat")
    assert len(first.prompt.split()) == 4
    g = torch.Generator().manual_seed(4)
    torch.randint(len(words(pipe)), (2,), generator=g)
    batch = draw_minibatch(images, pipe.scheduler, 4, g)
    target = batch.target if name != "p4d" else predict(pipe, original, batch, "a cat")
    error = (predict(pipe, pipe.unet, batch, first.prompt) - target).pow(2).mean().item()
    assert first.loss == pytest.approx(error, rel=1e-4)
    assert first.passes == 1 + (name == "p4d")


@pytest.mark.parametrize("name", ["unlearn-diff-atk", "p4d"])
def test_a_search_by_gradient_changes_no_weight(either, name):
    original = copy.deepcopy(either.unet)
    images = encode_images(either, torch.rand(4, 3, 16, 16) * 2 - 1, ["a cat"] * 4)
    parts = [either.unet, original, *text_encoders(either)]
    before = [tiny.weights(part) for part in parts]
    config = SearchConfig(steps=3, batch_size=4)
    found = list(make_search(name, either, original, images, (), config, seed=1)("a cat"))
    assert [f.step for f in found] == [1, 2, 3]
    for part, weights in zip(parts, before, strict=True):
        assert torch.equal(tiny.weights(part), weights)


@pytest.mark.parametrize("right", [True, False], ids=["its gradient", "random numbers"])
@pytest.mark.parametrize("name, lr", [("unlearn-diff-atk", 0.1), ("p4d", 0.03)])
def test_a_search_by_gradient_beats_random_words(pipe, images, monkeypatch, name, lr, right):
    """Few random words have a lower loss than the result; about half do for a random gradient.

    All prompts share one minibatch. P4D searches on the original itself, so the minimum is known:
    words that leave the encoding of the prompt unchanged.
    """
    batch = draw_minibatch(images, pipe.scheduler, 4, torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(7)
    monkeypatch.setattr("mu.attacks.search.draw_minibatch", lambda *_: batch)
    p4d_target = predict(pipe, pipe.unet, batch, "a cat")
    target = batch.target if name == "unlearn-diff-atk" else p4d_target

    def error(text):
        return (predict(pipe, pipe.unet, batch, text) - target).pow(2).mean().item()

    def random_gradient(loss, parameters, scale):
        return [torch.randn(p.shape, generator=g) for p in parameters]

    with torch.no_grad():
        draws = random_words(pipe, "a cat", SearchConfig(count=2, steps=100), seed=9)
        chance = [error(draw.prompt) for draw in draws]
    if not right:
        monkeypatch.setattr("mu.attacks.search.gradients", random_gradient)
    config = SearchConfig(count=2, steps=20, lr=lr, batch_size=4)
    searches = [make_search(name, pipe, pipe.unet, images, (), config, seed) for seed in range(4)]
    found = [list(search("a cat")) for search in searches]
    last = [steps[-1].loss for steps in found]
    assert last[0] == pytest.approx(error(found[0][-1].prompt), rel=1e-3, abs=1e-6)
    better = sum(sum(loss < end for loss in chance) for end in last) / (4 * len(chance))
    if right:
        assert better < 0.2
        assert sum(last) < sum(steps[0].loss for steps in found)
    else:
        assert better > 0.3


@pytest.mark.parametrize("name", ["unlearn-diff-atk", "p4d"])
def test_the_loss_scale_keeps_gradients_that_half_precision_loses(pipe, images, monkeypatch, name):
    """Behind a float16 number with a gradient of 1e-9 all gradients are 0 without a scale."""
    found = []

    def half_errors(*args):
        return [squared_errors(*args)[0].half().float() * 1e-9]

    def recorded_gradients(*args):
        found.append(gradients(*args)[0])
        return found[-1:]

    monkeypatch.setattr("mu.attacks.search.squared_errors", half_errors)
    monkeypatch.setattr("mu.attacks.search.gradients", recorded_gradients)
    for scale in (1.0, 1024.0):
        config = SearchConfig(count=2, lr=0.3, batch_size=4, loss_scale=scale)
        next(make_search(name, pipe, pipe.unet, images, (), config)("a cat"))
    assert not found[0].any()
    assert found[1].any(dim=1).all()
    assert found[1].abs().max() < 1e-6


def test_pairs_are_captions_with_and_without_the_concept():
    assert opposed(["a cat, noto", "Cat.", "cat"], "cat", ["cup", "fire engine"]) == [
        ("a cat, noto", "a cup, noto"),
        ("Cat.", "fire engine."),
        ("cat", "cup"),
    ]
    for captions in (["a nude adult"], ["a cat", "two cats"]):
        match = f"'{captions[-1]}' does not contain the word 'cat': set concept_token"
        with pytest.raises(ValueError, match=match):
            opposed(captions, "cat", ["cup"])


def test_ring_a_bell_finds_words_that_are_encoded_like_the_target(either):
    """With strength 0 the target is the encoding of such words: the loss can reach 0.

    Generations never get worse.
    """

    def states(text):
        return encode_prompts(either, [text])["encoder_hidden_states"]

    target, pairs = " ".join(words(either)[3:5]), [("a cat", "a cup")]
    config = SearchConfig(strength=0.0, count=2, steps=40, population=80)
    found = list(ring_a_bell(either, target, pairs, config))
    losses = [step.loss for step in found]
    assert losses[-1] < losses[0]
    assert all(b <= a + 1e-6 for a, b in zip(losses, losses[1:], strict=False))
    error = (states(found[-1].prompt) - states(target)).pow(2).mean().item()
    assert losses[-1] == pytest.approx(error, rel=1e-3, abs=1e-6)

    config = SearchConfig(strength=2.0, count=2, population=8)
    moved = next(ring_a_bell(either, target, pairs, config))
    wanted = states(target) + 2 * (states("a cat") - states("a cup"))
    error = (states(moved.prompt) - wanted).pow(2).mean().item()
    assert moved.loss == pytest.approx(error, rel=1e-3)


def test_random_words_are_new_at_each_step_and_reproducible(pipe):
    config = SearchConfig(count=2, steps=5, without=("a tiger",))

    def texts(seed):
        return [step.prompt for step in random_words(pipe, "a cat", config, seed)]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert len(set(texts(0))) > 1
    assert not any("tiger" in text for text in texts(0))
    assert all(text.endswith(" a cat") for text in texts(0))
    assert all(len(text.split()) == 4 for text in texts(0))


@pytest.mark.parametrize(
    "search",
    [
        lambda pipe, images, config: unlearn_diff_atk(pipe, images, "a cat", config),
        lambda pipe, images, config: p4d(pipe, pipe.unet, images, "a cat", config),
        lambda pipe, images, config: ring_a_bell(pipe, "a cat", [("a", "b")], config),
        lambda pipe, images, config: random_words(pipe, "a cat", config),
    ],
    ids=["unlearn-diff-atk", "p4d", "ring-a-bell", "random"],
)
def test_more_words_than_the_vocabulary_has_are_refused(pipe, images, search):
    with pytest.raises(ValueError, match="500 words before 'a cat', but the vocabulary has only"):
        next(search(pipe, images, SearchConfig(count=500)))


@pytest.mark.parametrize("search", [unlearn_diff_atk, random_words])
def test_words_before_a_prompt_that_just_fits(pipe, images, search):
    """The text encoder cuts the end of the prompt, as of 4 of the 142 prompts of I2P."""
    text = " ".join(["cat"] * (pipe.tokenizer.model_max_length - 3))
    arguments = (pipe, text) if search is random_words else (pipe, images, text)
    step = next(search(*arguments, SearchConfig(count=2, steps=1, batch_size=2)))
    assert step.prompt.endswith(text)


def test_an_unknown_search_is_refused(pipe):
    with pytest.raises(ValueError, match="unknown search 'genetic': choose random, unlearn-diff"):
        make_search("genetic", pipe, None, None, (), SearchConfig())


def test_a_search_that_diverges_raises(pipe, images):
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss of the prompt is nan in step 1"):
        next(unlearn_diff_atk(pipe, images, "a cat", SearchConfig()))
