"""UCE on pipelines of both families."""

import copy

import pytest
import tiny
import torch
from methods.vectors import outputs, positions

from mu.methods.closed_form import EditConfig, concept_vectors, key_values, rece, uce
from mu.models import encode_prompts, load_pipeline, predict


def test_concept_vectors_are_the_positions_of_the_text(pipe):
    states = encode_prompts(pipe, ["a photo of a cat", "a cat", " "])[
        "encoder_hidden_states"
    ].double()
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("a photo of a cat").input_ids)
    assert tokens[5] == "cat</w>"
    assert len(tokens) == 7  # start, a, photo, of, a, cat, end
    for name, expected in (("last", states[0, 5:6]), ("rest", states[0, 5:]), ("all", states[0])):
        torch.testing.assert_close(
            positions(pipe, "a photo of a cat", name), expected, rtol=0, atol=1e-5
        )
    torch.testing.assert_close(positions(pipe, "a cat", "last"), states[1, 2:3], rtol=0, atol=1e-5)
    for blank in (
        "",
        " ",
    ):  # start-of-text is its last token; zeros of an SDXL for "" are no target
        torch.testing.assert_close(positions(pipe, blank, "last"), states[2, :1], rtol=0, atol=1e-5)
        torch.testing.assert_close(positions(pipe, blank, "rest"), states[2], rtol=0, atol=1e-5)
        assert positions(pipe, blank, "last").norm() > 1
    with pytest.raises(ValueError, match="'first'.*last, rest, all"):
        concept_vectors(pipe, ["a cat"], "first")


def test_this_sdxl_encodes_the_empty_prompt_as_zeros(xl):
    assert encode_prompts(xl, [""])["encoder_hidden_states"].abs().max() == 0


def test_only_keys_and_values_of_cross_attention_change(pipe):
    before = {name: p.clone() for name, p in pipe.unet.state_dict().items()}
    changes = uce(pipe, "a cat", " ", ["a cup"])
    cross = {
        f"{name}.{kind}.weight"
        for name, module in pipe.unet.named_modules()
        if name.endswith("attn2")
        for kind in ("to_k", "to_v")
    }
    assert set(changes) == cross
    assert (
        len(cross) == 2 * sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules()) > 4
    )
    for name, p in pipe.unet.state_dict().items():
        assert torch.equal(p, before[name]) == (name not in cross), name
        if name in cross:
            assert changes[name] == pytest.approx(
                ((p - before[name]).norm() / before[name].norm()).item(), rel=1e-4
            )
    assert not any(p.requires_grad for p in pipe.unet.parameters())


@pytest.mark.parametrize("tokens", ["last", "rest", "all"])
def test_concepts_take_the_keys_and_values_of_their_targets(pipe, tokens):
    """Several concepts, each with a target of another length, aligned at the first position."""
    frozen = copy.deepcopy(pipe.unet)
    forget = ["a cat", "a photo of a tiger"]
    replace = ["a banana", " "]
    preserve = ["a cup"]
    c = [positions(pipe, text, tokens) for text in forget]
    targets = [positions(pipe, text, tokens) for text in replace]
    if tokens == "rest":  # last tokens: cat 2, banana 2; tiger 5, start-of-text 0
        assert len(c[1]) == len(c[0]) - 3 == len(targets[1]) - 5
        targets[1] = targets[1][:-5]
    kept = positions(pipe, "a cup", "last" if tokens == "last" else "all")
    uce(pipe, forget, replace, preserve, config=EditConfig(ridge=1e-8, keep=1.0, tokens=tokens))

    def result(x):
        return outputs(pipe.unet, x)

    def original(x):
        return outputs(frozen, x)

    if tokens == "last":  # three vectors, independent: all are met
        for x, y in zip(c, targets, strict=True):
            torch.testing.assert_close(result(x), original(y), rtol=1e-4, atol=1e-4)
            assert (original(x) - original(y)).abs().max() > 0.05
        torch.testing.assert_close(result(kept), original(kept), rtol=1e-4, atol=1e-4)
    else:  # more vectors than dimensions: the least-squares compromise, nearer to the targets
        x, y = torch.cat(c), torch.cat(targets)
        assert (result(x) - original(y)).norm() < 0.8 * (original(x) - original(y)).norm()
        system = 1e-8 * torch.eye(x.shape[1]).double() + x.T @ x + kept.T @ kept
        for name, w in key_values(frozen).items():
            w = w.double()
            expected = (1e-8 * w + w @ y.T @ x + w @ kept.T @ kept) @ torch.linalg.inv(system)
            torch.testing.assert_close(
                key_values(pipe.unet)[name].double(), expected, rtol=1e-3, atol=1e-4
            )


def test_the_preserved_stay_nearer_than_the_forgotten_move(pipe):
    frozen = copy.deepcopy(pipe.unet)
    unpreserved = copy.deepcopy(pipe)
    uce(unpreserved, "a cat", " ", config=EditConfig(tokens="last"))
    uce(pipe, "a cat", " ", ["a tiger", "a cup"], config=EditConfig(keep=10.0, tokens="last"))

    def moved(p, text):
        return (
            outputs(p.unet, positions(p, text, "last"))
            - outputs(frozen, positions(p, text, "last"))
        ).norm()

    for text in ("a tiger", "a cup"):
        assert 10 * moved(pipe, text) < moved(pipe, "a cat")
        assert 5 * moved(pipe, text) < moved(unpreserved, text)


def test_keep_is_one_over_the_number_of_preserved_texts_and_at_least_a_tenth(xl):
    start = copy.deepcopy(xl.unet.state_dict())
    words = [
        "tiger",
        "banana",
        "cup",
        "photo",
        "drawing",
        "blue",
        "style",
        "noto",
        "of",
        "on",
        "background",
        "a cup",
    ]
    for number, keep in ((1, 1.0), (4, 0.25), (12, 0.1)):
        results = []
        for kwargs in ({}, {"keep": keep}, {"keep": keep * 1.5}):
            xl.unet.load_state_dict(start)
            uce(xl, "a cat", " ", words[:number], config=EditConfig(tokens="last", **kwargs))
            results.append(tiny.weights(xl.unet))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
    xl.unet.load_state_dict(start)
    last = EditConfig(tokens="last")
    uce(xl, "a cat", " ", "tiger", last)  # a single text is a list of one, not of letters
    one = tiny.weights(xl.unet)
    xl.unet.load_state_dict(start)
    uce(xl, ["a cat"], [" "], ["tiger"], last)
    assert torch.equal(one, tiny.weights(xl.unet))


def test_the_order_of_concepts_does_not_matter(pipe):
    other, frozen = copy.deepcopy(pipe), copy.deepcopy(pipe.unet)
    forget = ["a cat", "a tiger", "a banana"]
    replace = [" ", "a cup", "a photo"]
    preserve = ["noto style", "a drawing", ""]
    uce(pipe, forget, replace, preserve)
    uce(other, forget[::-1], replace[::-1], preserve[::-1])
    torch.testing.assert_close(tiny.weights(pipe.unet), tiny.weights(other.unet), rtol=0, atol=1e-5)
    list(rece(pipe, frozen, forget, replace, preserve, epochs=1))
    list(rece(other, frozen, forget[::-1], replace[::-1], preserve[::-1], epochs=1))
    torch.testing.assert_close(tiny.weights(pipe.unet), tiny.weights(other.unet), rtol=0, atol=1e-4)


def noise(pipe, unet, text, added=None):
    """Return ε for a text, with SDXL's added embeddings from the text `added`."""
    g = torch.Generator().manual_seed(0)
    conditioning = encode_prompts(pipe, [added or text]) | {
        "encoder_hidden_states": encode_prompts(pipe, [text])["encoder_hidden_states"]
    }
    with torch.no_grad():
        return predict(
            unet, torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), conditioning
        )


def test_predictions_for_the_concept_become_those_of_the_target(xl):
    """Tokens "all" map every position: the prediction follows, except SDXL's pooled embedding."""
    frozen = copy.deepcopy(xl.unet)
    uce(xl, "a photo of a cat", "a tiger", config=EditConfig(tokens="all", ridge=1e-6))
    expected = noise(xl, frozen, "a tiger")
    torch.testing.assert_close(
        noise(xl, xl.unet, "a photo of a cat", added="a tiger"), expected, rtol=0, atol=1e-4
    )
    assert (noise(xl, frozen, "a photo of a cat", added="a tiger") - expected).abs().max() > 1e-2
    assert (noise(xl, xl.unet, "a photo of a cat") - expected).abs().max() > 1e-3


def test_texts_with_a_common_start_need_only_the_rest(xl):
    """ "a cat" and "a tiger" differ from their last token on (causal encoder), which "rest" maps.

    Their common start moves a little unless it is preserved.
    """
    frozen = copy.deepcopy(xl.unet)
    torch.testing.assert_close(
        positions(xl, "a cat", "all")[:2], positions(xl, "a tiger", "all")[:2], rtol=0, atol=1e-5
    )
    target = noise(xl, frozen, "a tiger")

    def far(unet):
        return (noise(xl, unet, "a cat", added="a tiger") - target).abs().max().item()

    before = far(frozen)
    uce(xl, "a cat", "a tiger", ["a"], config=EditConfig(ridge=1e-6))
    assert far(xl.unet) < 0.02 * before
    xl.unet.load_state_dict(frozen.state_dict())
    uce(xl, "a cat", "a tiger", config=EditConfig(ridge=1e-6))
    assert 0.05 * before < far(xl.unet) < 0.5 * before


def test_defaults_are_the_published_values(xl):
    frozen, results = copy.deepcopy(xl.unet), []
    published = EditConfig(ridge=0.5, erase=1.0, tokens="rest")
    for kwargs in (
        {},
        dict(replace=" ", preserve=[], config=published),
        dict(config=EditConfig(ridge=0.4)),
        dict(replace="a"),
        dict(config=EditConfig(tokens="last")),
    ):
        xl.unet.load_state_dict(frozen.state_dict())
        uce(xl, "a cat", **kwargs)
        results.append(tiny.weights(xl.unet))
    assert [torch.equal(results[0], other) for other in results[1:]] == [True, False, False, False]
    assert len(list(rece(xl, frozen, "a cat"))) == 3
    assert torch.equal(*(concept_vectors(xl, ["a cat"], *t)[0] for t in ((), ("rest",))))


def test_an_edit_works_on_half_precision_and_under_autocast(sd_folder):
    full = load_pipeline(str(sd_folder))
    uce(full, "a cat", "a tiger", ["a cup"])
    for dtype, kwargs, atol in (
        (torch.float16, {}, 1e-3),
        (torch.bfloat16, {}, 1e-2),
        (torch.float32, {"precision": "bf16"}, 1e-6),
    ):
        pipe = load_pipeline(str(sd_folder), **kwargs)
        pipe.unet.to(dtype)
        with torch.enable_grad():
            uce(pipe, "a cat", "a tiger", ["a cup"])
        assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
        for name, w in key_values(pipe.unet).items():
            torch.testing.assert_close(w.float(), key_values(full.unet)[name], rtol=0, atol=atol)


def test_an_edit_leaves_trainable_weights_trainable(xl):
    xl.unet.requires_grad_(True)
    parameters, frozen = list(xl.unet.parameters()), copy.deepcopy(xl.unet)
    uce(xl, "a cat")
    list(rece(xl, frozen, "a cat", epochs=1))
    assert all(
        p is q and q.requires_grad and q.is_leaf and q.grad is None
        for p, q in zip(parameters, xl.unet.parameters(), strict=True)
    )
