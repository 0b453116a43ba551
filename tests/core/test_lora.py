"""LoRA and weights of half precision: adapters only, with or without a second UNet."""

import copy

import pytest
import tiny
import torch
from flat import assert_close, distance, train_short
from plain import generator

from mu.frozen import frozen_copy, reference
from mu.losses import draw_minibatch
from mu.models import load_pipeline, predict
from mu.state import State
from mu.trainable import trainable, without_lora


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.fixture
def output(sets, noise_scheduler):
    """Return a function that gives a UNet's prediction for a fixed minibatch."""
    inputs = draw_minibatch(sets[0], noise_scheduler, 4, generator()).inputs
    return lambda unet: predict(unet, *inputs).detach()


def test_lora_trains_only_adapters(sets):
    unet = tiny.make_unet()
    state = State(unet, "lora", lr=0.5, optimizer="sgd", rank=2)
    assert state.named
    assert all("lora_" in name for name in state.named)
    assert count(state.parameters) < 0.2 * count(unet.parameters())
    base = {name: p.clone() for name, p in unet.named_parameters() if "lora_" not in name}
    moved, _ = train_short(sets, state=state, frozen="none")
    assert moved.norm() > 0
    trained = dict(unet.named_parameters())
    assert all(torch.equal(trained[name], p) for name, p in base.items())


def test_without_adapters_the_unet_is_the_original(sets, output):
    unet, original = tiny.make_unet(), tiny.frozen(tiny.make_unet())
    state = State(unet, "lora", lr=0.5, optimizer="sgd", rank=2)
    train_short(sets, state=state, frozen="none")
    assert (output(unet) - output(original)).abs().max() > 1e-3
    with reference(unet, None) as frozen:
        torch.testing.assert_close(output(frozen), output(original), rtol=0, atol=1e-6)
    trained = output(unet)
    fused = without_lora(copy.deepcopy(unet), fuse=True)
    torch.testing.assert_close(output(fused), trained, rtol=0, atol=1e-5)
    names = {n for n, _ in original.named_parameters()}
    assert {n for n, _ in fused.named_parameters()} == names, "parameters of adapters are left"
    torch.testing.assert_close(output(without_lora(unet)), output(original), rtol=0, atol=1e-6)


def test_lora_needs_no_second_unet(sets):
    """Adapters switched off give the numbers of a frozen copy."""
    with_copy = train_short(sets, subset="lora")
    without = train_short(sets, subset="lora", frozen="none")
    assert_close(with_copy, without, 1e-4)
    assert [r.passes for r in with_copy[1]] == [r.passes for r in without[1]]


def test_adapters_are_drawn_from_the_seed():
    one, same, other = (
        State(tiny.make_unet(), "lora", seed=seed, rank=2).parameters for seed in (1, 1, 2)
    )
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_drawing_adapters_leaves_the_global_random_state(unet):
    before = torch.random.get_rng_state()
    State(unet, "lora", seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(0)
    tiny.make_unet()
    drawn = torch.random.get_rng_state()
    torch.manual_seed(0)
    State(tiny.make_unet(), "lora", seed=9)
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_half_precision_weights_are_for_adapters_only(sd_folder):
    unet = load_pipeline(str(sd_folder), dtype="half", precision="no").unet
    assert unet.dtype == torch.bfloat16
    message = "subset 'f' would train weights in torch.bfloat16: load them in float32"
    with pytest.raises(ValueError, match=message):
        trainable(unet, "f")
    assert {p.dtype for p in trainable(unet, "lora", 2).values()} == {torch.float32}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dtype="quarter"), "'quarter': choose full"),
        (dict(precision="fp16"), "'fp16' needs a GPU.*no or bf16"),
        (dict(family="sdxl"), "is of family 'sd', the parameters are for 'sdxl': choose"),
    ],
)
def test_loading_refuses_unknown_options(sd_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(sd_folder), **options)


def test_a_missing_reference_is_refused(sets):
    with pytest.raises(ValueError, match="unet_frozen=None needs adapters: train subset 'lora'"):
        train_short(sets, frozen="none")
    with pytest.raises(ValueError, match="'some': choose same, half, or none"):
        frozen_copy(tiny.make_unet(), "some")


def test_a_frozen_unet_in_half_precision_is_close(sets):
    unet = tiny.make_unet()

    def size(net):
        return sum(p.numel() * p.element_size() for p in net.parameters())

    assert size(frozen_copy(unet, "half")) == size(unet) / 2
    assert not any(p.requires_grad for p in frozen_copy(unet).parameters())
    whole, other = train_short(sets), train_short(sets, frozen="half")
    assert_close(whole, other, 0.05)
    assert distance(whole, other) >= 1e-6
