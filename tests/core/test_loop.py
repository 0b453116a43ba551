"""The loops: subset, records, passes, memory, refusals, and losses that are not finite."""

import copy
import dataclasses
import gc
import math

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from flat import FULL, META, run, unlearn
from plain import denoising_loss, generator

import mu.attackers
import mu.train
from mu.attackers import draw_choice
from mu.losses import draw_minibatch
from mu.state import State
from mu.train import Record, finetune


@pytest.mark.parametrize("subset", ["x", "u", "f"])
def test_only_the_subset_moves_and_nothing_frozen_gets_a_gradient(sets, subset):
    unet, unet_frozen = tiny.make_unet(), tiny.frozen(tiny.make_unet())
    start = copy.deepcopy(unet.state_dict())
    state = State(unet, subset, lr=1e-2)
    state.optimizer.param_groups[0]["weight_decay"] = 0.1
    chosen = set(state.named)
    for _ in unlearn(state, unet_frozen, tiny.make_scheduler(), *sets, steps=3, **FULL):
        assert all(p.grad is None for p in [*unet.parameters(), *unet_frozen.parameters()])
    for name, p in unet.named_parameters():
        assert torch.equal(p, start[name]) == (name not in chosen), name
    assert all(torch.equal(p, start[name]) for name, p in unet_frozen.named_parameters())
    assert not any(p.requires_grad for p in unet_frozen.parameters())


def test_the_loop_yields_a_frozen_record_after_each_update(sets):
    unet = tiny.make_unet()
    state, last, records = State(unet, "u", lr=1e-3), tiny.weights(unet), []
    fixed = (state, tiny.frozen(unet), tiny.make_scheduler(), *sets)
    loop = unlearn(*fixed, steps=3, trajectory_reuse=3)
    assert torch.equal(tiny.weights(unet), last), "a step ran before it was requested"
    for record in loop:
        now = tiny.weights(unet)
        assert not torch.equal(now, last)
        assert record.step == state.step
        assert isinstance(record, Record)
        assert record.seconds > 0
        last = now
        records.append(record)
    assert [r.step for r in records] == [1, 2, 3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[0].step = 5
    assert list(unlearn(*fixed, steps=3)) == [], "a finished loop went on"


def test_losses_are_those_before_the_update(sets, noise_scheduler):
    state = State(tiny.make_unet(), "f", lr=1e-2, optimizer="adam", seed=6)
    batch = draw_minibatch(sets[0], noise_scheduler, 8, generator(6003))
    expected = denoising_loss(state.unet, batch).item()
    (record,) = finetune(state, noise_scheduler, sets[0], steps=1)
    assert record.losses == {"finetune": expected}


@pytest.mark.parametrize(
    "order, inner_steps, extra", [("first", 1, 0), ("first", 3, 0), ("second", 3, 3 + 3)]
)
def test_passes_are_counted_and_are_as_few_as_documented(sets, order, inner_steps, extra):
    """extra: with exact gradients M products and M (M − 1) / 2 replays."""
    unet = tiny.make_unet()
    unet_frozen, counted = tiny.frozen(unet), []
    for net in (unet, unet_frozen):
        net.register_forward_hook(lambda *_: counted.append(1))
    before = len(unet._forward_hooks)
    state = State(unet, "x", lr=1e-4)
    g = generator(0)
    torch.randint(2, (4,), generator=g)  # the prompts
    trajectory = int(torch.randint(50, (2, 4), generator=g).max())
    options = META | dict(inner_steps=inner_steps, inner_lr=1e-4, order=order)
    options |= dict(batch_size=4, trajectory_reuse=2)
    found = []
    for record in unlearn(state, unet_frozen, tiny.make_scheduler(), *sets, steps=2, **options):
        found.append(record.passes)
        assert record.passes == len(counted)
        counted.clear()
    at_theta, frozen, after_attack = 1, 1, 1
    each = at_theta + frozen + inner_steps + after_attack + extra
    assert found == [each + trajectory, each]
    assert len(unet._forward_hooks) == before


def count_alive():
    """Return the numbers of tensors and modules, and of the tensors' elements, since gc.freeze."""
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), (torch.Tensor, torch.nn.Module))]
    return len(alive), sum(o.numel() for o in alive if isinstance(o, torch.Tensor))


def test_memory_is_flat_and_the_unet_is_never_copied(sets, monkeypatch):
    unet = tiny.make_unet()
    unet_frozen, state = tiny.frozen(unet), State(unet, "f", lr=1e-4)
    unets, optimizers = [], []
    make_unet, make_optimizer = UNet2DConditionModel.__init__, mu.attackers.make_optimizer

    def count_unet(self, *args, **kwargs):
        unets.append(1)
        make_unet(self, *args, **kwargs)

    def count_optimizer(*args, **kwargs):
        optimizers.append(1)
        return make_optimizer(*args, **kwargs)

    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("something was deep-copied"))
    monkeypatch.setattr(UNet2DConditionModel, "__init__", count_unet)
    monkeypatch.setattr(mu.attackers, "make_optimizer", count_optimizer)
    options = META | dict(inner_steps=2, inner_lr=1e-4, inner_optimizer="adam", batch_size=1)
    options |= dict(trajectory_steps=4)
    sizes = []
    gc.collect()
    gc.freeze()  # exclude all present objects from the count
    for _ in unlearn(state, unet_frozen, tiny.make_scheduler(), *sets, steps=4, **options):
        sizes.append(count_alive())
    gc.unfreeze()
    assert sizes[1][0] > 2 * 100, "AdamW's moments are missing"
    assert len(set(sizes[1:])) == 1, sizes  # the first step makes AdamW's moments
    assert not unets
    assert len(optimizers) <= 2


def test_choices_are_single_values_pairs_or_lists():
    g = generator(0)
    assert draw_choice(3, g) == 3
    assert draw_choice(1e-5, g, log=True) == 1e-5
    assert draw_choice(0.0, g, log=True) == 0.0
    steps = [draw_choice((2, 5), g) for _ in range(400)]
    assert set(steps) == {2, 3, 4, 5}
    assert all(60 < steps.count(k) < 140 for k in (2, 3, 4, 5))
    rates = torch.tensor([draw_choice((1e-6, 1e-4), g, log=True) for _ in range(2000)])
    assert rates.min() >= 1e-6
    assert rates.max() <= 1e-4
    assert abs(rates.log10().mean() + 5) < 0.05
    assert abs((rates < 1e-5).float().mean() - 0.5) < 0.05
    assert {draw_choice(["sgd", "adam"], g) for _ in range(50)} == {"sgd", "adam"}


def test_unknown_optimizers_and_subsets_are_refused():
    unet = tiny.make_unet()
    with pytest.raises(ValueError, match="'lion'.*adamw, adam, sgd"):
        State(unet, optimizer="lion")
    with pytest.raises(ValueError, match="'everything'.*x, u, f"):
        State(unet, "everything")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(inner_optimizer="lion"), "'lion'.*sgd, adam"),
        (dict(inner_optimizer=["sgd", "lion"]), "'lion'.*sgd, adam"),
        (dict(order="third"), "'third': choose first or second"),
        (dict(order="second", inner_optimizer="adam"), "choose inner_optimizer sgd"),
    ],
)
def test_unknown_inner_optimizers_and_orders_are_refused(sets, options, message):
    unet = tiny.make_unet()
    start = tiny.weights(unet)
    with pytest.raises(ValueError, match=message):
        for seed in range(8):  # some draw sgd, others lion
            run(State(unet, seed=seed), sets, 1, unlearn=0.0, relearn=1.0, **options)
    assert torch.equal(tiny.weights(unet), start)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(sets, noise_scheduler):
    state = State(tiny.make_unet(), "f", lr=1e25, optimizer="sgd")
    kept = []
    message = r"finetune is \w+ in step 2; the weights of step 1 are kept"
    with pytest.raises(FloatingPointError, match=message):
        for _ in finetune(state, noise_scheduler, sets[0], steps=5):
            kept.append(tiny.weights(state.unet))
    assert len(kept) == 1
    assert state.step == 1
    assert torch.equal(tiny.weights(state.unet), kept[0])


def assert_untouched(state, start):
    """Check that no step, no moment, no gradient and no hook is left of a failed step."""
    assert state.step == 0
    assert torch.equal(tiny.weights(state.unet), start)
    assert not state.optimizer.state
    assert all(p.grad is None for p in state.parameters)
    assert not state.unet._forward_hooks


@pytest.mark.parametrize(
    "options, name",
    [(dict(relearn=1.0), "forget after"), (dict(clean=1.0, clean_every=1), "related after")],
)
def test_a_diverging_simulated_attack_stops_and_keeps_the_weights(sets, options, name):
    state = State(tiny.make_unet(), "f", lr=1e-3)
    start = tiny.weights(state.unet)
    with pytest.raises(FloatingPointError, match=name):
        run(state, sets, 3, unlearn=0.0, inner_lr=1e25, inner_steps=2, **options)
    assert_untouched(state, start)


def test_a_gradient_that_is_not_finite_stops_even_if_the_losses_are(sets, monkeypatch):
    real = mu.train.gradients
    monkeypatch.setattr(
        mu.train, "gradients", lambda *a, **k: [g * math.nan for g in real(*a, **k)]
    )
    state = State(tiny.make_unet(), "f", lr=1e-3)
    start = tiny.weights(state.unet)
    with pytest.raises(FloatingPointError, match="step 1"):
        run(state, sets, 1, unlearn=0.0, retain=1.0)
    assert_untouched(state, start)
