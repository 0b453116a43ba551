"""The loops: against plain loops and hand-made gradients, and what they must never do."""

import copy
import dataclasses
import gc
import math

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from flat import unlearn
from safetensors.torch import load, save

import mu.attackers
import mu.draws
import mu.train
from mu.attackers import draw_choice
from mu.losses import draw_minibatch
from mu.state import State
from mu.train import Record, finetune
from mu.trainable import trainable

FULL = dict(
    retain=1.0,
    relearn=0.3,
    self_destruct=4.0,
    clean=1.0,
    inner_steps=(1, 2),
    inner_lr=(1e-4, 4e-4),
    inner_optimizer="adam",
    inner_batch_size=4,
    trajectory_reuse=4,
    batch_size=1,
)


def run(state, sets, steps, unet_frozen=None, **options):
    """All records of an `unlearn` loop from fresh components."""
    return list(
        unlearn(
            state,
            unet_frozen or tiny.frozen(tiny.make_unet()),
            tiny.make_scheduler(),
            *sets,
            steps=steps,
            **options,
        )
    )


def facts(records):
    """What has to be the same in two runs: all but the time."""
    return [(r.step, r.losses, r.passes) for r in records]


# --- the objective -------------------------------------------------------------------------------------------------


def plain_esd(sets, steps, seed, lr, eta=1.0, guidance=3.0, batch_size=4, subset="u"):
    """ESD with diffusers and torch alone."""
    forget, unconditional = sets[0], sets[3]["encoder_hidden_states"]
    unet, unet_frozen, scheduler = (
        tiny.make_unet(),
        tiny.frozen(tiny.make_unet()),
        tiny.make_scheduler(),
    )
    parameters = list(trainable(unet, subset).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, fused=True)
    g = torch.Generator().manual_seed(1000 * seed)
    empty = unconditional.expand(batch_size, -1, -1)
    for _ in range(steps):
        c = forget.conditioning["encoder_hidden_states"][
            torch.randint(len(forget.prompts), (batch_size,), generator=g)
        ]
        both = torch.cat([empty, c])
        scheduler.set_timesteps(50)
        stop = torch.randint(50, (batch_size,), generator=g)
        latents = torch.randn(batch_size, 4, 8, 8, generator=g)
        z = latents.clone()
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps[: stop.max()]):
                predicted = unet(torch.cat([latents, latents]), t, both).sample
                latents = scheduler.step(
                    predicted[:batch_size]
                    + guidance * (predicted[batch_size:] - predicted[:batch_size]),
                    t,
                    latents,
                ).prev_sample
                z[stop == i + 1] = latents[stop == i + 1]
            t = (scheduler.timesteps[stop] + torch.randint(20, (batch_size,), generator=g)).clamp(
                max=999
            )
            predicted = unet_frozen(torch.cat([z, z]), torch.cat([t, t]), both).sample
            target = predicted[:batch_size] - eta * (
                predicted[batch_size:] - predicted[:batch_size]
            )
        optimizer.zero_grad()
        (unet(z, t, c).sample - target).pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return tiny.weights(unet)


@pytest.mark.parametrize("eta, guidance, seed", [(1.0, 3.0, 0), (2.0, 5.0, 3)])
def test_without_meta_weights_it_is_plain_esd_bit_for_bit(sets, eta, guidance, seed):
    unet = tiny.make_unet()
    start = tiny.weights(unet)
    records = run(
        State(unet, "u", lr=1e-3, seed=seed),
        sets,
        2,
        eta=eta,
        guidance=guidance,
        retain=0.0,
        relearn=0.0,
        self_destruct=0.0,
        clean=0.0,
        ascent=0.0,
    )
    assert [list(r.losses) for r in records] == [["unlearn"]] * 2
    expected = plain_esd(sets, 2, seed, 1e-3, eta, guidance)
    assert torch.equal(tiny.weights(unet), expected) and not torch.equal(expected, start)


def test_retention_leaves_the_draws_of_unlearning_alone(sets):
    seen = []
    for options in (
        dict(),
        dict(retain=2.0),
        dict(retain=1.0, relearn=1.0, self_destruct=1.0, inner_lr=1e-3),
    ):
        unet = tiny.make_unet()
        state, drawn = State(unet, "u", lr=1e-3, seed=4), []
        for _ in unlearn(
            state, tiny.frozen(unet), tiny.make_scheduler(), *sets, steps=2, batch_size=2, **options
        ):
            drawn.append(state.trajectory)
        seen.append(
            (
                drawn,
                state.generators["unlearn"].get_state(),
                state.generators["retain"].get_state(),
                tiny.weights(unet),
            )
        )
    for drawn, of_unlearn, _of_retain, weights in seen[1:]:
        assert torch.equal(of_unlearn, seen[0][1])
        assert torch.equal(
            drawn[0][0], seen[0][0][0][0]
        )  # latents of the first step: the weights are still the same
        for (_, timesteps, prompt), (_, timesteps0, prompt0) in zip(
            drawn, seen[0][0], strict=False
        ):
            assert torch.equal(timesteps, timesteps0) and torch.equal(prompt, prompt0)
        assert not torch.equal(weights, seen[0][3])
    assert torch.equal(seen[1][2], seen[2][2])  # and the meta terms leave those of retention alone


def frozen_elsewhere():
    """A frozen UNet that is not where training starts, so that retention pulls from the first step on."""
    unet, g = tiny.make_unet(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g)
    return tiny.frozen(unet)


def by_hand(
    sets,
    seed,
    step,
    *,
    unlearn,
    eta,
    retain,
    ascent,
    relearn,
    self_destruct,
    clean,
    inner_steps,
    inner_lr,
    order,
    trajectory,
    retain_prompts=None,
    drift_terms=("related", "unrelated", "empty", "any"),
    timestep=None,
    gradient_norm=0.0,
    alignment=0.0,
):
    """The gradient of the documented objective at the first weights, written out term by term."""
    forget, related, unrelated, unconditional = sets
    unet, unet_frozen, scheduler = tiny.make_unet(), frozen_elsewhere(), tiny.make_scheduler()
    theta = trainable(unet, "u")
    g_retain, g_meta = (torch.Generator().manual_seed(1000 * seed + i) for i in (1, 2))

    def draw(concepts, g):
        return draw_minibatch(concepts, scheduler, 5, g, timestep)

    def loss(batch, weights):  # L(weights; batch)
        z, t, c = (
            batch.inputs.latents,
            batch.inputs.timesteps,
            batch.inputs.conditioning["encoder_hidden_states"],
        )
        return (
            (torch.func.functional_call(unet, weights, (z, t, c)).sample - batch.noise)
            .pow(2)
            .mean()
        )

    z, t, prompt = trajectory
    c = forget.conditioning["encoder_hidden_states"][prompt]
    with torch.no_grad():
        empty = unet_frozen(
            z, t, unconditional["encoder_hidden_states"].expand(len(z), -1, -1)
        ).sample
        target = empty - eta * (unet_frozen(z, t, c).sample - empty)
    b_related, b_unrelated = draw(related, g_retain), draw(unrelated, g_retain)
    total = (
        unlearn * (torch.func.functional_call(unet, theta, (z, t, c)).sample - target).pow(2).mean()
    )

    def drift(z, t, c):
        with torch.no_grad():
            target = unet_frozen(z, t, c).sample
        return (torch.func.functional_call(unet, theta, (z, t, c)).sample - target).pow(2).mean()

    def inputs(batch):
        return (
            batch.inputs.latents,
            batch.inputs.timesteps,
            batch.inputs.conditioning["encoder_hidden_states"],
        )

    z, t, _ = inputs(b_unrelated)
    nothing = unconditional["encoder_hidden_states"].expand(3, -1, -1)
    drifts = {
        "related": inputs(b_related),
        "unrelated": inputs(b_unrelated),
        "empty": (z[::2], t[::2], nothing),
    }
    total = total + retain / 3 * sum(
        drift(*parts) for name, parts in drifts.items() if name in drift_terms
    )
    if retain_prompts:
        some = retain_prompts["encoder_hidden_states"][torch.randint(4, (3,), generator=g_retain)]
        total = total + retain / 3 * drift(z[::2], t[::2], some)
    if ascent:
        total = total - ascent * loss(draw(forget, g_meta), theta)

    cleaning = clean and step % 3 == 2
    fine_tuned = dict(theta)
    for _ in range(inner_steps):
        inner = loss(draw(unrelated if cleaning else forget, g_meta), fine_tuned)
        gradient = torch.autograd.grad(
            inner, list(fine_tuned.values()), create_graph=order == "second"
        )
        fine_tuned = {
            name: p - inner_lr * (g if order == "second" else g.detach())
            for (name, p), g in zip(fine_tuned.items(), gradient, strict=False)
        }
    b_forget = draw(forget, g_meta)
    if cleaning:
        total = total + clean * 0.5 * (
            loss(b_related, fine_tuned)
            - loss(b_related, theta)
            + loss(b_unrelated, fine_tuned)
            - loss(b_unrelated, theta)
        )
    else:
        total = (
            total
            - relearn * loss(b_forget, fine_tuned)
            - self_destruct * (loss(b_related, fine_tuned) - loss(b_related, theta))
        )
    if gradient_norm or alignment:
        one, other = (
            torch.autograd.grad(
                loss(draw(concepts, g_meta), theta), list(theta.values()), create_graph=True
            )
            for concepts in (forget, related)
        )
        total = (
            total
            + gradient_norm * sum(a.pow(2).sum() for a in one)
            + alignment * sum((a * b).sum() for a, b in zip(one, other, strict=False))
        )
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=False))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    "step, options",
    [
        (0, dict()),
        (0, dict(unlearn=0.0, retain=0.0, self_destruct=0.0)),
        (0, dict(unlearn=0.0, retain=0.0, relearn=0.0)),
        (0, dict(ascent=0.7, eta=2.0)),
        (2, dict(clean=1.5)),
        (1, dict(clean=1.5)),
        (2, dict(clean=0.0)),
        (0, dict(drift_terms=("related",), timestep=400)),
        (0, dict(drift_terms=("empty", "unrelated"))),
        (0, dict(gradient_norm=3.0, alignment=0.0)),
        (0, dict(gradient_norm=0.0, alignment=20.0)),
        (
            0,
            dict(
                retain_prompts={
                    "encoder_hidden_states": torch.linspace(-1, 1, 4)[:, None, None].expand(
                        4, tiny.LENGTH, 16
                    )
                }
            ),
        ),
    ],
)
def test_one_step_is_the_gradient_of_the_documented_objective(sets, order, step, options):
    weights = (
        dict(
            unlearn=5.0, eta=1.0, retain=0.8, ascent=0.0, relearn=0.5, self_destruct=2.0, clean=0.0
        )
        | options
    )
    seed, inner = 2, dict(inner_steps=2, inner_lr=0.1, order=order)
    state = State(tiny.make_unet(), "u", lr=1.0, optimizer="sgd", seed=seed)
    state.step = step
    # one trajectory for both, so that only the objective is compared (trajectories have their own tests)
    g = torch.Generator().manual_seed(8)
    state.trajectory = (
        torch.randn(12, 4, 8, 8, generator=g),
        torch.randint(1000, (12,), generator=g),
        torch.randint(2, (12,), generator=g),
    )
    some = slice(4 * step, 4 * step + 4)
    start = {name: p.detach().clone() for name, p in state.named.items()}
    if step == 0:  # here the loop draws anew, and draws this
        drawn = state.trajectory[:2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mu.draws, "sample_trajectory", lambda *_, **__: drawn)
            (record,) = run(
                state,
                sets,
                1,
                frozen_elsewhere(),
                trajectory_reuse=3,
                inner_batch_size=5,
                retain_batch_size=5,
                clip=math.inf,
                **weights,
                **inner,
            )
    else:
        (record,) = run(
            state,
            sets,
            step + 1,
            frozen_elsewhere(),
            trajectory_reuse=3,
            inner_batch_size=5,
            retain_batch_size=5,
            clip=math.inf,
            **weights,
            **inner,
        )
    expected = by_hand(
        sets, seed, step, trajectory=[x[some] for x in state.trajectory], **weights, **inner
    )
    found = {name: start[name] - p.detach() for name, p in state.named.items()}  # learning rate 1
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert difference.norm() < 2e-5 * size and size > 0.01
    assert record.step == step + 1


def displacement(sets, **options):
    state = State(tiny.make_unet(), "f", lr=1.0, optimizer="sgd", seed=1)
    start = tiny.weights(state.unet)
    (record,) = run(state, sets, 1, frozen_elsewhere(), unlearn=0.0, clip=math.inf, **options)
    return (tiny.weights(state.unet) - start).norm(), record.losses


@pytest.mark.parametrize("inner_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("bracket", [dict(self_destruct=1.0), dict(clean=1.0, clean_every=1)])
def test_a_bracket_pushes_nothing_where_the_attack_changes_nothing(sets, bracket, inner_optimizer):
    """Common random numbers: at inner learning rate 0 both terms of the bracket are the same to the last digits."""
    moved, losses = displacement(
        sets, inner_lr=0.0, inner_steps=2, inner_optimizer=inner_optimizer, **bracket
    )
    one_term, _ = displacement(sets, retain=2.0)
    assert one_term > 0.1 and moved < 1e-6 * one_term
    for name in ("related", "unrelated") if "clean" in bracket else ("related",):
        assert losses[f"{name} after"] == pytest.approx(losses[name], rel=1e-6)
    pushed, losses = displacement(sets, inner_lr=0.1, inner_steps=2, **bracket)
    assert pushed > 1e-2 * one_term and losses["related after"] != pytest.approx(
        losses["related"], rel=1e-4
    )


def test_bracket_without_weight_decay_leaves_adamw_in_place(sets):
    """To the extent of the learning rate times rounding over epsilon: with a sizeable epsilon, nothing."""
    state = State(tiny.make_unet(), "f", lr=1e-3, seed=1)
    state.optimizer.param_groups[0]["weight_decay"] = 0.0
    state.optimizer.param_groups[0]["eps"] = 1.0
    start = tiny.weights(state.unet)
    run(state, sets, 3, unlearn=0.0, self_destruct=1.0, inner_lr=0.0)
    torch.testing.assert_close(tiny.weights(state.unet), start, rtol=0, atol=1e-8)


def test_looking_at_the_gradients_changes_nothing_but_the_record(sets):
    options = dict(retain=1.0, relearn=1.0, self_destruct=1.0, inner_lr=0.1, retain_batch_size=6)
    seen, unseen = (State(tiny.make_unet(), "u", lr=1e-3, seed=3) for _ in range(2))
    looked, plain = run(seen, sets, 5, angle_every=2, **options), run(unseen, sets, 5, **options)
    assert torch.equal(tiny.weights(seen.unet), tiny.weights(unseen.unet))
    assert [{"inner product", "cosine"} <= set(r.losses) for r in looked] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert [r.passes - q.passes for r, q in zip(looked, plain, strict=False)] == [2, 0, 2, 0, 2]
    for record, other in zip(looked, plain, strict=False):
        assert {
            n: v for n, v in record.losses.items() if n not in ("inner product", "cosine")
        } == other.losses and -1 <= record.losses.get("cosine", 0) <= 1
    unet, g, scheduler = (
        tiny.make_unet(),
        torch.Generator().manual_seed(3004),
        tiny.make_scheduler(),
    )  # the first by hand, of 8 and 6 images
    theta = list(trainable(unet, "u").values())

    def gradient(b):
        return torch.cat(
            [
                x.flatten()
                for x in torch.autograd.grad(
                    (
                        unet(
                            b.inputs.latents,
                            b.inputs.timesteps,
                            b.inputs.conditioning["encoder_hidden_states"],
                        ).sample
                        - b.noise
                    )
                    .pow(2)
                    .mean(),
                    theta,
                )
            ]
        )

    one, other = (
        gradient(draw_minibatch(sets[0], scheduler, 8, g)),
        gradient(draw_minibatch(sets[1], scheduler, 6, g)),
    )
    assert looked[0].losses["inner product"] == pytest.approx((one @ other).item(), rel=1e-4)
    assert looked[0].losses["cosine"] == pytest.approx(
        torch.nn.functional.cosine_similarity(one, other, 0).item(), rel=1e-4
    )


def test_controls_that_cannot_be_computed_are_refused(sets):
    for options, words in (
        (dict(drift_terms=("relatives",)), "unknown drift term 'relatives': choose related"),
        (dict(alignment=1.0, loss_scale=1024.0), "no float16"),
    ):
        with pytest.raises(ValueError, match=words):
            run(State(tiny.make_unet(), "u"), sets, 1, **options)
    alone = run(
        State(tiny.make_unet(), "u"), sets, 1, unlearn=0.0, gradient_norm=1.0
    )  # nothing else has a weight
    assert list(alone[0].losses) == ["expansion"] and alone[0].losses["expansion"] > 0


def test_a_bounded_loss_is_not_pushed_further(sets):
    free, losses = displacement(sets, relearn=1.0, inner_lr=1e-3)
    bounded, _ = displacement(sets, relearn=1.0, inner_lr=1e-3, bound=losses["forget after"] * 0.9)
    still_free, _ = displacement(
        sets, relearn=1.0, inner_lr=1e-3, bound=losses["forget after"] * 1.1
    )
    assert bounded == 0 and still_free == free > 0


def test_the_gradient_is_clipped_as_a_whole(sets):
    state = State(tiny.make_unet(), "f", lr=1.0, optimizer="sgd")
    start = tiny.weights(state.unet)
    run(
        state,
        sets,
        1,
        unlearn=0.0,
        retain=1.0,
        relearn=1.0,
        self_destruct=3.0,
        inner_lr=0.1,
        clip=0.01,
    )
    assert (tiny.weights(state.unet) - start).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_control_is_ascent_without_an_inner_loop(sets):
    state = State(tiny.make_unet(), "f", lr=0.05, optimizer="sgd", seed=1)
    records = run(state, sets, 8, unlearn=0.0, ascent=1.0, inner_batch_size=16)
    assert records[-1].losses["forget"] > records[0].losses["forget"] + 0.1
    assert {r.passes for r in records} == {1}


# --- the loop ------------------------------------------------------------------------------------------------------


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


def test_a_frozen_record_a_step_after_the_update(sets):
    unet = tiny.make_unet()
    state, last, seen = State(unet, "u", lr=1e-3), tiny.weights(unet), []
    loop = unlearn(
        state, tiny.frozen(unet), tiny.make_scheduler(), *sets, steps=3, trajectory_reuse=3
    )
    assert torch.equal(tiny.weights(unet), last)  # nothing before it is asked for
    for record in loop:
        now = tiny.weights(unet)
        assert not torch.equal(now, last) and record.step == state.step
        last = now
        seen.append(record)
    assert [r.step for r in seen] == [1, 2, 3] and all(
        isinstance(r, Record) and r.seconds > 0 for r in seen
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].step = 5
    assert (
        list(unlearn(state, tiny.frozen(unet), tiny.make_scheduler(), *sets, steps=3)) == []
    )  # done is done


def test_losses_are_those_before_the_update(sets, noise_scheduler):
    state = State(tiny.make_unet(), "f", lr=1e-2, optimizer="adam", seed=6)
    batch = draw_minibatch(sets[0], noise_scheduler, 8, torch.Generator().manual_seed(6003))
    expected = (
        (
            state.unet(
                batch.inputs.latents,
                batch.inputs.timesteps,
                batch.inputs.conditioning["encoder_hidden_states"],
            ).sample
            - batch.noise
        )
        .pow(2)
        .mean()
        .item()
    )
    (record,) = finetune(state, noise_scheduler, sets[0], steps=1)
    assert record.losses == {"finetune": expected}


@pytest.mark.parametrize(
    "order, inner_steps, extra", [("first", 1, 0), ("first", 3, 0), ("second", 3, 3 + 3)]
)
def test_passes_are_counted_and_are_as_few_as_documented(sets, order, inner_steps, extra):
    unet = tiny.make_unet()
    unet_frozen, counted = tiny.frozen(unet), []
    for net in (unet, unet_frozen):
        net.register_forward_hook(lambda *_: counted.append(1))
    before = len(unet._forward_hooks)
    state = State(unet, "x", lr=1e-4)
    drawn = torch.Generator().manual_seed(0)
    torch.randint(2, (4,), generator=drawn)
    trajectory = int(torch.randint(50, (2, 4), generator=drawn).max())
    found = []
    for record in unlearn(
        state,
        unet_frozen,
        tiny.make_scheduler(),
        *sets,
        steps=2,
        batch_size=4,
        trajectory_reuse=2,
        retain=1.0,
        relearn=1.0,
        self_destruct=1.0,
        inner_steps=inner_steps,
        inner_lr=1e-4,
        order=order,
    ):
        found.append(record.passes)
        assert record.passes == len(counted)
        counted.clear()
    each = (
        1 + (inner_steps + 1) + 1 + extra
    )  # at θ, at θ_FT, the frozen UNet; for the exact order M products and M (M − 1) / 2 replays
    assert found == [each + trajectory, each]
    assert len(unet._forward_hooks) == before


def test_memory_is_flat_and_the_unet_is_never_copied(sets, monkeypatch):
    unet = tiny.make_unet()
    unet_frozen, state = tiny.frozen(unet), State(unet, "f", lr=1e-4)
    made, steppers = [], []
    real_unet, real_inner = UNet2DConditionModel.__init__, mu.attackers.make_optimizer
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("something was deep-copied"))
    monkeypatch.setattr(
        UNet2DConditionModel,
        "__init__",
        lambda self, *a, **k: made.append(1) or real_unet(self, *a, **k),
    )
    monkeypatch.setattr(
        mu.attackers, "make_optimizer", lambda *a, **k: steppers.append(1) or real_inner(*a, **k)
    )
    sizes = []
    gc.collect()
    gc.freeze()  # what is there now is neither counted nor looked through
    for _ in unlearn(
        state,
        unet_frozen,
        tiny.make_scheduler(),
        *sets,
        steps=4,
        batch_size=1,
        retain=1.0,
        relearn=1.0,
        self_destruct=1.0,
        inner_steps=2,
        inner_lr=1e-4,
        inner_optimizer="adam",
    ):
        gc.collect()
        alive = [
            o for o in gc.get_objects() if issubclass(type(o), (torch.Tensor, torch.nn.Module))
        ]
        sizes.append((len(alive), sum(o.numel() for o in alive if isinstance(o, torch.Tensor))))
        del alive
    gc.unfreeze()
    assert sizes[1][0] > 2 * 100  # AdamW's moments, at least
    assert len(set(sizes[1:])) == 1, (
        sizes
    )  # from the second step on (the first one makes AdamW's moments)
    assert not made and len(steppers) <= 2


def test_numbers_pairs_and_lists():
    g = torch.Generator().manual_seed(0)
    assert (
        draw_choice(3, g) == 3
        and draw_choice(1e-5, g, log=True) == 1e-5
        and draw_choice(0.0, g, log=True) == 0.0
    )
    steps = [draw_choice((2, 5), g) for _ in range(400)]
    assert set(steps) == {2, 3, 4, 5} and all(60 < steps.count(k) < 140 for k in (2, 3, 4, 5))
    rates = torch.tensor([draw_choice((1e-6, 1e-4), g, log=True) for _ in range(2000)])
    assert rates.min() >= 1e-6 and rates.max() <= 1e-4
    assert abs(rates.log10().mean() + 5) < 0.05 and abs((rates < 1e-5).float().mean() - 0.5) < 0.05
    assert {draw_choice(["sgd", "adam"], g) for _ in range(50)} == {"sgd", "adam"}


def test_unknown_optimisers_and_orders_are_refused(sets):
    unet = tiny.make_unet()
    with pytest.raises(ValueError, match="'lion'.*adamw, adam, sgd"):
        State(unet, optimizer="lion")
    with pytest.raises(ValueError, match="'everything'.*x, u, f"):
        State(unet, "everything")
    start = tiny.weights(unet)
    for options, message in [
        (dict(inner_optimizer="lion"), "'lion'.*sgd, adam"),
        (dict(inner_optimizer=["sgd", "lion"]), "'lion'.*sgd, adam"),
        (dict(order="third"), "'third': choose first or second"),
        (dict(order="second", inner_optimizer="adam"), "choose inner_optimizer sgd"),
    ]:
        with pytest.raises(ValueError, match=message):
            for seed in range(8):
                run(State(unet, seed=seed), sets, 1, unlearn=0.0, relearn=1.0, **options)
        assert torch.equal(tiny.weights(unet), start)


# --- what is not finite --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(sets, noise_scheduler):
    state = State(tiny.make_unet(), "f", lr=1e25, optimizer="sgd")
    kept = []
    with pytest.raises(
        FloatingPointError, match=r"finetune is \w+ in step 2; the weights of step 1 are kept"
    ):
        for _ in finetune(state, noise_scheduler, sets[0], steps=5):
            kept.append(tiny.weights(state.unet))
    assert len(kept) == 1 and state.step == 1 and torch.equal(tiny.weights(state.unet), kept[0])


@pytest.mark.parametrize(
    "options, bad",
    [
        (dict(relearn=1.0, inner_lr=1e25, inner_steps=2), "forget after"),
        (dict(clean=1.0, clean_every=1, inner_lr=1e25, inner_steps=2), "related after"),
    ],
)
def test_an_inner_loop_that_diverges_stops_and_keeps_the_weights(sets, options, bad):
    state = State(tiny.make_unet(), "f", lr=1e-3)
    state.trajectory = None
    start = tiny.weights(state.unet)
    with pytest.raises(FloatingPointError, match=bad):
        run(state, sets, 3, unlearn=0.0, **options)
    assert (
        state.step == 0
        and torch.equal(tiny.weights(state.unet), start)
        and not state.optimizer.state
    )
    assert all(p.grad is None for p in state.parameters) and not state.unet._forward_hooks


def test_weights_that_ask_for_nothing_are_refused(sets):
    with pytest.raises(ValueError, match="every weight is 0.*unlearn, retain"):
        run(State(tiny.make_unet(), "x"), sets, 1, unlearn=0.0)


def test_a_gradient_that_is_not_finite_stops_as_well(sets, monkeypatch):
    """Every loss is finite, and yet the step would destroy the weights."""
    real = mu.train.gradients
    monkeypatch.setattr(
        mu.train, "gradients", lambda *a, **k: [g * math.nan for g in real(*a, **k)]
    )
    state = State(tiny.make_unet(), "f", lr=1e-3)
    start = tiny.weights(state.unet)
    with pytest.raises(FloatingPointError, match="step 1"):
        run(state, sets, 1, unlearn=0.0, retain=1.0)
    assert (
        state.step == 0
        and torch.equal(tiny.weights(state.unet), start)
        and not state.optimizer.state
    )
    assert all(p.grad is None for p in state.parameters)


# --- going on ------------------------------------------------------------------------------------------------------


def continued(make_state, loop, steps):
    """Records and weights of `steps` steps in one go, and with a stop half way from which only bytes are left."""
    whole = make_state()
    records = list(loop(whole, steps))
    first = make_state()
    half = list(loop(first, steps // 2))
    left = save({name: t.contiguous() for name, t in first.tensors().items()})
    del first
    second = make_state()
    with torch.no_grad():
        for p in second.parameters:
            p.add_(1)  # whatever it held before
    second.load(load(left))
    assert second.step == steps // 2
    return (records, tiny.weights(whole.unet)), (
        half + list(loop(second, steps)),
        tiny.weights(second.unet),
    )


def test_unlearning_goes_on_with_the_same_numbers(sets):
    (records, whole), (again, resumed) = continued(
        lambda: State(tiny.make_unet(), "u", lr=1e-3, seed=5),
        lambda state, steps: run(state, sets, steps, **FULL),
        6,
    )
    assert facts(records) == facts(again) and [r.step for r in again] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(whole, resumed)
    assert (
        records[3].passes < 15 < records[4].passes
    )  # stopped inside a pool of trajectories, and a new one came later
    assert "unrelated after" in records[2].losses and "forget after" in records[3].losses


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_fine_tuning_goes_on_with_the_same_numbers(sets, noise_scheduler, optimizer):
    (records, whole), (again, resumed) = continued(
        lambda: State(tiny.make_unet(), "f", lr=1e-3, optimizer=optimizer, seed=5),
        lambda state, steps: list(finetune(state, noise_scheduler, sets[0], steps=steps)),
        6,
    )
    assert facts(records) == facts(again) and len(again) == 6 and torch.equal(whole, resumed)


def test_a_state_of_other_weights_is_refused(unet):
    saved = State(unet, "x").tensors()
    with pytest.raises(ValueError, match="first difference: "):
        State(unet, "u").load(saved)


def test_seeds_differ_and_repeat(sets, noise_scheduler):
    def weights(seed):
        state = State(tiny.make_unet(), "f", lr=1e-3, seed=seed)
        list(finetune(state, noise_scheduler, sets[0], steps=1))
        return tiny.weights(state.unet)

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
