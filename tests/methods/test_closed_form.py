"""UCE and RECE: results worked out by hand, optimality of the objectives, both model families."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from mu.methods.closed_form import (
    RECE,
    EditConfig,
    adversarial_vectors,
    concept_vectors,
    edit_matrices,
    key_values,
    rece,
    uce,
)
from mu.models import encode_prompts, load_pipeline, predict_noise


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    folder = request.getfixturevalue(f"{request.param}_folder")
    return load_pipeline(str(folder), precision="no")


@pytest.fixture
def xl(sdxl_folder):
    return load_pipeline(str(sdxl_folder), precision="no")


class Attention(nn.Module):
    """A stand-in UNet: `attn2.to_k`, `attn2.to_v`, and two matrices that no edit may change."""

    def __init__(self, key, value):
        super().__init__()
        self.attn1, self.attn2 = nn.ModuleDict(), nn.ModuleDict()
        for part, name, w in (
            (self.attn2, "to_k", key),
            (self.attn2, "to_v", value),
            (self.attn1, "to_k", key),
            (self.attn2, "to_q", key),
        ):
            part[name] = nn.Linear(w.shape[1], w.shape[0], bias=False).to(w.dtype)
            part[name].weight.data.copy_(w)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edit(w, c, targets, kept, **kwargs):
    w = w.clone()
    with torch.no_grad():
        changes = edit_matrices({"w": w}, c, targets, kept, EditConfig(**dict(keep=0.1) | kwargs))
    return w, changes["w"]


def outputs(unet, vectors):
    """Return keys and values of vectors (n, width), all matrices side by side."""
    return torch.cat([vectors @ w.detach().double().T for w in key_values(unet).values()], -1)


def test_uce_by_hand():
    """λ = ½, e = 1, p = 2; W₀ (3, 2); one concept (1, 1) that becomes (0, 2), one kept (0, 1).

    A = ½ I + (1, 1)ᵀ(1, 1) + 2 (0, 1)ᵀ(0, 1) = [3/2 1; 1 7/2], determinant 17/4,
    A⁻¹ = 4/17 [7/2 −1; −1 3/2].
    W₀ = [1 0; 0 1; 2 −1]; v* = W₀ (0, 2) = (0, 2, −2); v = W₀ (0, 1) = (0, 1, −1).
    ½ W₀ + v* (1, 1) + 2 v (0, 1) = [1/2 0; 0 1/2; 1 −1/2] + [0 0; 2 2; −2 −2] + [0 0; 0 2; 0 −2]
    = [1/2 0; 2 9/2; −1 −9/2].
    Times A⁻¹: rows 4/17 · (7/4, −1/2), (7 − 9/2, −2 + 27/4), (−7/2 + 9/2, 1 − 27/4).
    """
    w, change = edit(
        double([[1, 0], [0, 1], [2, -1]]),
        double([[1, 1]]),
        double([[0, 2]]),
        double([[0, 1]]),
        keep=2.0,
    )
    torch.testing.assert_close(
        w, double([[7 / 17, -2 / 17], [10 / 17, 19 / 17], [4 / 17, -23 / 17]]), rtol=0, atol=1e-12
    )
    moved = double([[-10, -2], [10, 2], [-30, -6]]) / 17  # W − W₀; ‖W₀‖² = 7
    assert change == pytest.approx((moved.square().sum() / 7).sqrt().item(), abs=1e-12)


def test_uce_of_one_concept_without_others_by_hand():
    """c = (2, 0) becomes (0, 1): W c = W₀ c + e‖c‖² / (λ + e‖c‖²) · W₀ (c* − c).

    The factor is 4 / (1 + 4). Vectors orthogonal to c keep their output.
    """
    w, _ = edit(
        double([[3, 5]]), double([[2, 0]]), double([[0, 1]]), double([[0, 0]])[:0], ridge=1.0
    )
    assert (w @ double([2, 0])).item() == pytest.approx(6 + 0.8 * (5 - 6))
    assert (w @ double([0, 1])).item() == pytest.approx(5)
    stronger, _ = edit(
        double([[3, 5]]),
        double([[2, 0]]),
        double([[0, 1]]),
        double([[0, 0]])[:0],
        ridge=1.0,
        erase=4.0,
    )
    assert (stronger @ double([2, 0])).item() == pytest.approx(6 + 16 / 17 * (5 - 6))


def test_adversarial_vector_by_hand():
    """Keys [2], before [1]; values [1], before [3]: (λ + 4 + 1) c' = (2·1 + 1·3) c.

    So c' = 5 c / (5 + λ); λ = 5, c = 4 give c' = 2. Keys and values should be (4, 12) and are
    (4, 2): (12 − 2)² = 100 of 16 + 144 is missing.
    """
    now, before = Attention(double([[2]]), double([[1]])), Attention(double([[1]]), double([[3]]))
    found, recovered = adversarial_vectors(now, before, double([[4], [8]])[:1], ridge=5.0)
    assert found.tolist() == [[pytest.approx(2.0)]]
    assert recovered == pytest.approx(1 - 100 / 160)
    # two dimensions: WᵀW = I for keys, diag(4, 0) for values; WᵀW⁰ = [0 1; 1 0] for keys,
    # [2 0; 0 0] for values; c' = diag(5, 1)⁻¹ [0 1; 1 0] c + (2/5 c₁, 0)
    now = Attention(double([[1, 0], [0, 1]]), double([[2, 0]]))
    before = Attention(double([[0, 1], [1, 0]]), double([[1, 0]]))
    found, _ = adversarial_vectors(now, before, double([[10, 5], [0, 1]]), ridge=1e-12)
    torch.testing.assert_close(
        found, double([[5 / 5 + 2 / 5 * 10, 10], [1 / 5, 0]]), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("kept", [0, 3])
def test_uce_minimises_its_objective(kept):
    w0 = random(5, 6)
    c = random(2, 6, seed=1)
    targets = random(2, 6, seed=2)
    k = random(kept, 6, seed=3)
    ridge, erase, keep = 0.3, 0.7, 0.2
    w, _ = edit(w0, c, targets, k, ridge=ridge, erase=erase, keep=keep)

    def objective(w):
        def part(x, y):
            return (x @ w.T - y @ w0.T).square().sum()

        return erase * part(c, targets) + keep * part(k, k) + ridge * (w - w0).square().sum()

    (gradient,) = torch.autograd.grad(objective(w.requires_grad_()), w)
    assert (
        gradient.abs().max()
        < 1e-10
        < 0.1
        < torch.autograd.grad(objective(start := w0.clone().requires_grad_()), start)[0].abs().max()
    )
    for seed in range(5):
        assert objective(w + 0.01 * random(5, 6, seed=seed)) > objective(w)


def test_adversarial_vectors_minimise_their_objective():
    now = Attention(random(3, 4), random(2, 4, seed=1))
    before = Attention(random(3, 4, seed=2), random(2, 4, seed=3))
    c = random(2, 4, seed=4)
    ridge = 0.3
    found, recovered = adversarial_vectors(now, before, c, ridge)

    def missed(x):
        return (outputs(now, x) - outputs(before, c)).square().sum()

    (gradient,) = torch.autograd.grad(
        missed(found.requires_grad_()) + ridge * found.square().sum(), found
    )
    assert gradient.abs().max() < 1e-10
    assert recovered == pytest.approx(
        1 - (missed(found) / outputs(before, c).square().sum()).item()
    )
    same, all_of_it = adversarial_vectors(
        before, before, c, 1e-10
    )  # an unedited UNet takes c for c
    torch.testing.assert_close(same, c, rtol=0, atol=1e-6)
    assert all_of_it == pytest.approx(1)


def test_as_the_ridge_vanishes_concepts_become_their_targets_and_the_kept_stay():
    w0 = random(5, 9)
    c = random(3, 9, seed=1)
    targets = random(3, 9, seed=2)
    k = random(4, 9, seed=3)
    miss = []
    for ridge in (1.0, 1e-2, 1e-9):
        w, _ = edit(w0, c, targets, k, ridge=ridge)
        miss.append((w @ c.T - w0 @ targets.T).norm().item())
    assert miss[0] > miss[1] > 1e-3
    assert miss[2] < 1e-6
    assert (w @ k.T - w0 @ k.T).norm() < 1e-6 < (w - w0).norm()


def test_the_preserved_move_less_the_more_they_weigh():
    w0 = random(5, 9)
    c = random(1, 9, seed=1)
    targets = random(1, 9, seed=2)
    k = random(4, 9, seed=3)
    moved = []
    for keep in (0.0, 1.0, 100.0):
        w, _ = edit(w0, c, targets, k, ridge=0.1, keep=keep)
        moved.append(((w - w0) @ k.T).norm().item())
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0
    assert moved[2] < 0.05 * ((w - w0) @ c.T).norm()


def test_near_equal_states_need_float64():
    """Thirty states that differ by 1e-4, like CLIP's padding tokens, need more than float32."""
    c = random(1, 40) + 1e-4 * random(30, 40, seed=1)
    w0, targets, ridge = random(5, 40, seed=2), random(30, 40, seed=3), 1e-9
    exact = None
    for dtype in (torch.float64, torch.float32):
        w, x, y = w0.to(dtype), c.to(dtype), targets.to(dtype)
        found = (ridge * w + w @ y.T @ x) @ torch.linalg.inv(
            ridge * torch.eye(40, dtype=dtype) + x.T @ x
        )
        exact = found if exact is None else exact

    def off(w):
        return ((w.double() - exact).norm() / exact.norm()).item()

    assert off(found) > 0.1  # what a float32 solve gives
    assert off(edit(w0.float(), c, targets, c[:0], ridge=ridge)[0]) < 1e-4


def positions(pipe, text, tokens):
    return concept_vectors(pipe, [text], tokens)[0]


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


def test_force_zeros_of_sdxl_is_really_met(xl):
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
        return predict_noise(
            unet, torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), conditioning
        )


def test_the_unet_then_predicts_for_the_concept_what_it_did_for_the_target(xl):
    """Tokens "all" map every position: the prediction follows, except SDXL's pooled embedding."""
    frozen = copy.deepcopy(xl.unet)
    uce(xl, "a photo of a cat", "a tiger", config=EditConfig(tokens="all", ridge=1e-6))
    expected = noise(xl, frozen, "a tiger")
    torch.testing.assert_close(
        noise(xl, xl.unet, "a photo of a cat", added="a tiger"), expected, rtol=0, atol=1e-4
    )
    assert (noise(xl, frozen, "a photo of a cat", added="a tiger") - expected).abs().max() > 1e-2
    assert (noise(xl, xl.unet, "a photo of a cat") - expected).abs().max() > 1e-3


def test_a_concept_and_target_that_begin_alike_need_only_the_rest(xl):
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


def test_rece_is_rounds_of_adversarial_vectors_and_edits(pipe):
    frozen = copy.deepcopy(pipe.unet)
    uce(pipe, "a cat", " ", ["a cup"])
    c = positions(pipe, "a cat", "all")
    targets = positions(pipe, " ", "all")
    kept = positions(pipe, "a cup", "all")
    expected = {name: w.detach().clone() for name, w in key_values(pipe.unet).items()}
    original = {name: w.double() for name, w in key_values(frozen).items()}
    eye = torch.eye(c.shape[1]).double()
    records = rece(pipe, frozen, "a cat", " ", ["a cup"], epochs=2)
    for epoch in (1, 2):
        w = {name: x.double() for name, x in expected.items()}
        coefficient = torch.linalg.inv(0.1 * eye + sum(x.T @ x for x in w.values())) @ sum(
            x.T @ original[name] for name, x in w.items()
        )
        c2 = c @ coefficient.T
        inverse = torch.linalg.inv(0.1 * eye + c2.T @ c2 + 0.1 * kept.T @ kept)
        expected = {
            name: ((0.1 * x + x @ targets.T @ c2 + 0.1 * x @ kept.T @ kept) @ inverse).float()
            for name, x in w.items()
        }
        record = next(records)
        assert record.epoch == epoch
        assert set(record.changes) == set(expected)
        assert 0 < record.recovered < 1
        assert record.adversarial == pytest.approx((c2.norm() / c.norm()).item(), rel=1e-4)
        for name, x in key_values(pipe.unet).items():
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)
    assert next(records, None) is None


def test_rece_makes_the_concept_harder_to_reach(xl):
    frozen = copy.deepcopy(xl.unet)
    before = tiny.weights(frozen)
    uce(xl, "a cat", config=EditConfig(tokens="all"))
    records = list(rece(xl, frozen, "a cat", epochs=4))
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    assert records[-1].recovered < 0.9 * records[0].recovered
    assert torch.equal(before, tiny.weights(frozen))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(forget=[]), "nothing to forget.*at least one"),
        (dict(forget=["a cat", " "]), "nothing to forget.*blank"),
        (
            dict(forget=["a cat", "a cup"], replace=["a tiger"]),
            "1 texts replace 2 concepts.*one for each",
        ),
        (
            dict(forget=["a cat", "A cup "], preserve=["a tiger", "a CUP"]),
            "forgotten and kept: a cup; remove",
        ),
        (dict(forget="a cat", replace="a Cat"), "forgotten and kept: a cat; remove"),
        (dict(forget="a cat", tokens="first"), "'first': choose last, rest, all"),
        (dict(forget="a cat " * 20), "at most 20"),
        (dict(forget="a cat", ridge=0.0), "ridge, erase > 0 .*ridge=0.0"),
        (dict(forget="a cat", erase=0.0), "erase=0.0"),
        (dict(forget="a cat", preserve=["a cup"], keep=-0.1), "keep=-0.1"),
    ],
)
def test_errors_name_value_and_fix_and_leave_the_unet(xl, kwargs, message):
    before = tiny.weights(xl.unet)
    texts = {name: kwargs[name] for name in kwargs.keys() & {"forget", "replace", "preserve"}}
    config = {name: kwargs[name] for name in kwargs.keys() - texts.keys()}
    with pytest.raises(ValueError, match=message):
        uce(xl, **texts, config=EditConfig(**config))
    with pytest.raises(ValueError, match=message):
        list(rece(xl, xl.unet, **texts, config=replace(RECE, **config)))
    assert torch.equal(before, tiny.weights(xl.unet))


def test_a_result_that_is_not_finite_is_refused_before_anything_is_edited(sd_folder):
    pipe = load_pipeline(str(sd_folder))
    *_, last = key_values(pipe.unet).values()
    last[0, 0] = torch.inf
    before = tiny.weights(pipe.unet)
    with pytest.raises(ValueError, match="to_v.weight would hold NaN.*float32"):
        uce(pipe, "a cat")
    assert torch.equal(before, tiny.weights(pipe.unet))


def test_a_unet_without_cross_attention_or_another_frozen_one_is_refused(pipe):
    other = tiny.make_unet(cross_attention_dim=48)
    with pytest.raises(ValueError, match="copy of the UNet from before"):
        list(rece(pipe, other, "a cat"))
    plain = SimpleNamespace(
        unet=tiny.make_unet(
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
    )
    with pytest.raises(ValueError, match="no attn2.to_k.*cross attention"):
        uce(plain, "a cat")
