"""Attacks by prompts: words that are read as they were meant, gradients through the choice of words, searches that find what is there."""

import copy

import pytest
import tiny
import torch

from mu.attacks.search import (
    Sought,
    _simplex,
    opposed,
    p4d,
    random_words,
    ring_a_bell,
    seeker,
    unlearn_diff_atk,
)
from mu.attacks.tokens import embeddings, replaced_embeddings, tokenizers, words
from mu.concepts.probe import make_probe
from mu.concepts.sets import encode_images
from mu.files import read_json
from mu.measures.under_attack import look_at, prompt_run
from mu.models import encode_prompts, load_pipeline, text_encoders
from mu.objectives import draw_minibatch, gradients, squared_errors


@pytest.fixture(params=["sd", "sdxl"])
def either(request, sd_folder, sdxl_folder):
    return load_pipeline(str(sd_folder if request.param == "sd" else sdxl_folder))


@pytest.fixture(scope="module")
def images(sd_folder):
    pipe = load_pipeline(str(sd_folder))
    return encode_images(
        pipe,
        torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        ["a cat"] * 4,
    )


def test_a_prompt_of_words_is_read_word_by_word(either):
    known = words(either, without=["a Tiger, a cup"])
    assert "cat" in known and not {"tiger", "cup", "a"} & set(known) and known == sorted(known)
    for tokenizer in tokenizers(either):
        ids = tokenizer(" ".join(known[:8])).input_ids[1:-1]
        assert ids == [tokenizer(word).input_ids[1] for word in known[:8]]


def test_a_vector_stands_in_for_a_word(either):
    """With the vector of another word in its place, a word is read as the other one, in every encoder; afterwards as itself."""
    before = encode_prompts(either, ["a cat", "a banana", "a photo of a cat"])
    with replaced_embeddings(either, ["cat"], [table for table in embeddings(either, ["banana"])]):
        inside = encode_prompts(either, ["a cat", "a banana", "a photo of a cat"])
    after, expected = (
        encode_prompts(either, ["a cat", "a banana", "a photo of a cat"]),
        encode_prompts(either, ["a banana", "a banana", "a photo of a banana"]),
    )
    for name in before:
        assert torch.equal(after[name], before[name])
        torch.testing.assert_close(inside[name], expected[name])


def test_gradients_reach_the_vectors_and_are_right(either):
    vectors = [table.clone().requires_grad_(True) for table in embeddings(either, ["cat"])]

    def value():
        with replaced_embeddings(either, ["cat"], vectors):
            return sum(
                v.float().pow(2).sum()
                for v in encode_prompts(either, ["a photo of a cat"]).values()
            )

    for vector, gradient in zip(vectors, torch.autograd.grad(value(), vectors), strict=False):
        direction, eps = torch.nn.functional.normalize(gradient, dim=-1), 1e-2
        with torch.no_grad():
            vector += eps * direction
            high = value()
            vector -= 2 * eps * direction
            low = value()
            vector += eps * direction
        assert ((high - low) / (2 * eps)).item() == pytest.approx(
            (gradient * direction).sum().item(), rel=0.05
        )


def test_the_simplex_projection_is_the_nearest_probability():
    u = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 2
    p = _simplex(u)
    assert (p >= 0).all() and torch.allclose(p.sum(-1), torch.ones(6), atol=1e-5)
    others = torch.distributions.Dirichlet(torch.full((9,), 0.3)).sample((4000,))
    assert (
        (u[:, None] - others).pow(2).sum(-1).min(1).values >= (u - p).pow(2).sum(-1) - 1e-5
    ).all()
    assert torch.allclose(_simplex(p), p, atol=1e-6)


def test_the_first_loss_is_that_of_the_prompt_it_names(pipe, images):
    """UnlearnDiffAtk: E ‖ε − ε_θ(z_t, t, c)‖², P4D: E ‖ε_0(z_t, t, c(prompt)) − ε_θ(z_t, t, c(words, prompt))‖², at the words that are reported."""
    original = tiny.frozen(tiny.make_unet(seed=1))
    for search, wanted in (
        (unlearn_diff_atk, None),
        (lambda pipe, *a, **k: p4d(pipe, original, *a, **k), original),
    ):
        first = next(search(pipe, images, "a cat", count=2, seed=4, batch_size=4))
        assert first.prompt.endswith(" a cat") and len(first.prompt.split()) == 4
        g = torch.Generator().manual_seed(4)
        torch.randint(len(words(pipe)), (2,), generator=g)
        batch = draw_minibatch(images, pipe.scheduler, 4, g)

        def ask(unet, text):
            return unet(
                batch.noisy_latents,
                batch.timesteps,
                encode_prompts(pipe, [text])["encoder_hidden_states"].expand(4, -1, -1),
            ).sample

        target = batch.noise if wanted is None else ask(wanted, "a cat")
        assert first.loss == pytest.approx(
            (ask(pipe.unet, first.prompt) - target).pow(2).mean().item(), rel=1e-4
        ) and first.passes == 1 + (wanted is not None)


@pytest.mark.parametrize("name", ["unlearn_diff_atk", "p4d"])
def test_a_search_by_gradient_changes_no_weight(either, name):
    original = copy.deepcopy(either.unet)
    images = encode_images(either, torch.rand(4, 3, 16, 16) * 2 - 1, ["a cat"] * 4)
    parts = [either.unet, original, *text_encoders(either)]
    before = [tiny.weights(part) for part in parts]
    options = dict(steps=3, batch_size=4, seed=1)
    found = list(
        unlearn_diff_atk(either, images, "a cat", **options)
        if name == "unlearn_diff_atk"
        else p4d(either, original, images, "a cat", **options)
    )
    assert [f.step for f in found] == [1, 2, 3] and all(
        torch.equal(tiny.weights(part), old) for part, old in zip(parts, before, strict=False)
    )


@pytest.mark.parametrize("right", [True, False], ids=["its gradient", "random numbers"])
@pytest.mark.parametrize("name, lr", [("unlearn-diff-atk", 0.1), ("p4d", 0.03)])
def test_a_search_by_gradient_ends_at_better_words_than_chance(
    pipe, images, monkeypatch, name, lr, right
):
    """On one batch, whose noise and timesteps are the same for every prompt: few of the random words are better than where it ends; with random numbers for a gradient about half of them.

    For P4D the model is the original itself: a prompt that is read as the one without words is there."""
    batch, g = (
        draw_minibatch(images, pipe.scheduler, 4, torch.Generator().manual_seed(99)),
        torch.Generator().manual_seed(7),
    )
    monkeypatch.setattr("mu.attacks.search.draw_minibatch", lambda *_: batch)

    def ask(text):
        return pipe.unet(
            batch.noisy_latents,
            batch.timesteps,
            encode_prompts(pipe, [text])["encoder_hidden_states"].expand(4, -1, -1),
        ).sample

    target = batch.noise if name == "unlearn-diff-atk" else ask("a cat")

    def error(text):
        return (ask(text) - target).pow(2).mean().item()

    with torch.no_grad():
        chance = [error(f.prompt) for f in random_words(pipe, "a cat", count=2, steps=100, seed=9)]
    if not right:
        monkeypatch.setattr(
            "mu.attacks.search.gradients",
            lambda loss, parameters, scale: [torch.randn(p.shape, generator=g) for p in parameters],
        )
    found = [
        list(
            seeker(
                name, pipe, pipe.unet, images, count=2, steps=20, lr=lr, batch_size=4, seed=seed
            )("a cat")
        )
        for seed in range(4)
    ]
    assert found[0][-1].loss == pytest.approx(error(found[0][-1].prompt), rel=1e-3, abs=1e-6)
    better = sum(sum(c < one[-1].loss for c in chance) for one in found) / (4 * len(chance))
    assert (
        better < 0.2 and sum(one[-1].loss for one in found) < sum(one[0].loss for one in found)
        if right
        else better > 0.3
    )


@pytest.mark.parametrize("name", ["unlearn-diff-atk", "p4d"])
def test_gradients_that_half_precision_would_lose_are_scaled(pipe, images, monkeypatch, name):
    """Behind a float16 number whose own gradient is 1e-9 all are 0, and the search stands still, unless the loss is scaled."""
    found = []
    monkeypatch.setattr(
        "mu.attacks.search.squared_errors", lambda *a: [squared_errors(*a)[0].half().float() * 1e-9]
    )
    monkeypatch.setattr(
        "mu.attacks.search.gradients", lambda *a: found.append(gradients(*a)[0]) or found[-1:]
    )
    for scale in (1.0, 1024.0):
        next(
            seeker(name, pipe, pipe.unet, images, count=2, lr=0.3, batch_size=4, loss_scale=scale)(
                "a cat"
            )
        )
    assert not found[0].any() and found[1].any(dim=1).all() and found[1].abs().max() < 1e-6


def test_pairs_are_texts_with_and_without_the_concept():
    assert opposed(["a cat, noto", "Cat.", "cat"], "cat", ["cup", "fire engine"]) == [
        ("a cat, noto", "a cup, noto"),
        ("Cat.", "fire engine."),
        ("cat", "cup"),
    ]
    for captions in (["a nude adult"], ["a cat", "two cats"]):
        with pytest.raises(
            ValueError,
            match=f"'{captions[-1]}' does not hold the word 'cat'.*what the captions call it",
        ):
            opposed(captions, "cat", ["cup"])


def test_ring_a_bell_finds_words_that_are_read_like_the_target(either):
    """With strength 0 the target is the encoding of a prompt of such words: nothing is as near as they are, and generations never get worse."""
    target = " ".join(words(either)[3:5])
    found = list(
        ring_a_bell(
            either,
            target,
            [("a cat", "a cup")],
            strength=0.0,
            count=2,
            steps=40,
            population=80,
            seed=0,
        )
    )
    assert found[-1].loss < found[0].loss and all(
        b.loss <= a.loss + 1e-6 for a, b in zip(found, found[1:], strict=False)
    )

    def states(text):
        return encode_prompts(either, [text])["encoder_hidden_states"]

    assert found[-1].loss == pytest.approx(
        (states(found[-1].prompt) - states(target)).pow(2).mean().item(), rel=1e-3, abs=1e-6
    )
    moved = next(
        iter(ring_a_bell(either, target, [("a cat", "a cup")], strength=2.0, count=2, population=8))
    )
    wanted = states(target) + 2 * (states("a cat") - states("a cup"))
    assert moved.loss == pytest.approx(
        (states(moved.prompt) - wanted).pow(2).mean().item(), rel=1e-3
    )


def test_random_words_are_new_each_step_and_the_same_for_a_seed(pipe):
    def said(seed):
        return [
            f.prompt
            for f in random_words(pipe, "a cat", count=2, steps=5, without=["a tiger"], seed=seed)
        ]

    assert (
        said(0) == said(0) != said(1)
        and len(set(said(0))) > 1
        and not any("tiger" in text for text in said(0))
    )
    assert all(text.endswith(" a cat") and len(text.split()) == 4 for text in said(0))


def test_more_words_than_there_are_is_refused(pipe, images):
    for search in (
        unlearn_diff_atk(pipe, images, "a cat", count=500),
        ring_a_bell(pipe, "a cat", [("a", "b")], count=500),
        random_words(pipe, "a cat", count=500),
    ):
        with pytest.raises(ValueError, match="500 words before 'a cat': the vocabulary has only"):
            next(search)


def test_a_search_that_diverges_says_so(pipe, images):
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="not finite: the loss of the prompt is nan at step 1"
    ):
        next(unlearn_diff_atk(pipe, images, "a cat"))


def test_what_is_found_is_drawn_with_the_seeds_of_the_probe(pipe, judge, tmp_path):
    probe = make_probe(
        pipe,
        {
            "forget": {"a cat": "concept:cat", "a photo of a cat": "concept:cat"},
            "related": {"a tiger": "concept:tiger"},
        },
        seeds=(3, 5),
    )

    def seek(prompt):
        return random_words(pipe, prompt, count=1, steps=4)

    options = dict(at=(0, 2, 4), tries=1, images=7, guidance=2.0, sampling_steps=2)
    rows = prompt_run(tmp_path / "run", pipe, judge, probe, seek, **options)
    found = read_json(tmp_path / "run" / "found.json")
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [4] * 4 and {
        row["group"] for row in rows
    } == {"forget"}
    for row in rows:
        assert row["prompt"] == (
            found[row["asked"]]["found"][row["step"] - 1]["prompt"] if row["step"] else row["asked"]
        )
    assert [(row["asked"], row["seed"]) for row in rows[:4]] == [
        ("a cat", 3),
        ("a cat", 5),
        ("a photo of a cat", 3),
        ("a photo of a cat", 5),
    ]
    assert [b["images"] for b in read_json(tmp_path / "run" / "budget.json")] == [0, 7, 7]

    def never(prompt):
        return pytest.fail("a finished search was made again")

    assert prompt_run(tmp_path / "run", pipe, judge, probe, never, **options) == rows
    (tmp_path / "run" / "step-0004.json").unlink()
    assert (
        prompt_run(tmp_path / "run", pipe, judge, probe, never, **options) == rows
    )  # what was found is kept
    with pytest.raises(
        ValueError, match="tries at least one prompt and looks at least once, got tries=0"
    ):
        prompt_run(tmp_path / "none", pipe, judge, probe, seek, tries=0)


def test_the_attacker_keeps_the_best_of_the_prompts_that_he_looked_at(
    pipe, judge, tmp_path, monkeypatch
):
    """The latest few, and the best so far; from seeds that are no probe's; with what looking costs."""
    texts, looked = ["one cat", "two cat", "three cat", "two cat", "four cat", "five cat"], []
    worth = {"one cat": 0.9, "two cat": 0.5, "three cat": 0.2, "four cat": 0.1, "five cat": 0.4}

    def look(pipe, judge, said, expected, looks, guidance, sampling_steps, labels):
        looked.append(said)
        return [worth[text] for text in said], 10, 1.0

    monkeypatch.setattr("mu.measures.under_attack.look_at", look)
    probe = make_probe(pipe, {"forget": {"a cat": "concept:cat"}}, seeds=(3,))

    def seek(prompt):
        return iter(Sought(i + 1, 0.0, text, 2, 0.5) for i, text in enumerate(texts))

    rows = prompt_run(
        tmp_path / "run",
        pipe,
        judge,
        probe,
        seek,
        at=(0, 4, 6),
        tries=2,
        guidance=2.0,
        sampling_steps=2,
    )
    assert looked == [["two cat", "three cat"], ["five cat", "four cat", "two cat"]], (
        "the latest first, each once, then the best until then; not what was passed over"
    )
    assert [row["prompt"] for row in rows] == ["a cat", "two cat", "two cat"]
    assert [(b["passes"], b["seconds"]) for b in read_json(tmp_path / "run" / "budget.json")] == [
        (0, 0),
        (4 * 2 + 10, 4 * 0.5 + 1),
        (6 * 2 + 20, 6 * 0.5 + 2),
    ]


def test_other_steps_of_a_finished_search_are_chosen_anew(pipe, judge, tmp_path, monkeypatch):
    """Rows, pictures and costs are those of one that was looked at there from the first, whether steps come or go; what was searched is not searched again, unless it was too short."""
    monkeypatch.setattr(
        "mu.measures.under_attack.look_at",
        lambda pipe, judge, said, *_: (
            [{"one cat": 0.9, "two cat": 0.5, "three cat": 0.2}.get(text, 0.1) for text in said],
            10,
            1.0,
        ),
    )
    texts, sought = ["one cat", "two cat", "three cat", "four cat", "five cat"], []
    probe, options = (
        make_probe(pipe, {"forget": {"a cat": "concept:cat"}}, seeds=(3,)),
        dict(tries=2, guidance=2.0, sampling_steps=2),
    )

    def run(name, at, steps=4):
        def seek(prompt):
            return sought.append(name) or iter(
                [Sought(i + 1, 0.0, text, 2, 0.5) for i, text in enumerate(texts[:steps])]
            )

        rows = prompt_run(tmp_path / name, pipe, judge, probe, seek, at=at, **options)
        return (
            rows,
            [(tmp_path / name / f"step-000{step}.png").read_bytes() for step in at],
            read_json(tmp_path / name / "budget.json"),
        )

    run("run", (0, 2, 4))
    for at, said in (
        ((0, 1, 2, 4), "one cat"),
        ((0, 4), "three cat"),
        ((0, 3, 4), "two cat"),
        ((0, 2, 4), "one cat"),
    ):
        expected = run(str(at), at)
        assert (
            run("run", at) == expected
            and run("run", at) == expected
            and expected[0][-1]["prompt"] == said
        )
    assert sought.count("run") == 1
    run("run", (0, 4))
    monkeypatch.setattr(
        "mu.measures.under_attack.evaluate_step",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        run("run", (0, 2, 4))
    monkeypatch.undo()
    monkeypatch.setattr(
        "mu.measures.under_attack._search", lambda *_: pytest.fail("what was chosen is kept")
    )
    assert [row["prompt"] for row in run("run", (0, 2, 4))[0]] == ["a cat", "one cat", "one cat"]
    monkeypatch.undo()
    assert run("run", (0, 5), steps=5)[0][-1]["step"] == 5 and sought.count("run") == 2


def test_looking_draws_each_prompt_with_seeds_of_its_own(pipe, judge, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mu.attacks.search.evaluate",
        lambda pipe, judge, probe, guidance, steps: (
            seen.extend(probe.items)
            or [
                item | {"hit": int(item["prompt"] == "b" and item["seed"] % 2)}
                for item in probe.items
            ],
            None,
        ),
    )
    assert look_at(pipe, judge, ["a", "b"], "concept:cat", 4, 2.0, 3)[:2] == ([0.0, 0.5], 3)
    assert {item["seed"] for item in seen} == set(range(10_000, 10_004)) and {
        item["expected"] for item in seen
    } == {"concept:cat"}
