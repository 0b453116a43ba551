"""The objective: plain ESD and SDD, and every term, against reference implementations."""

import math

import pytest
import tiny
import torch
from flat import META, run, train_short, unlearn
from plain import objective_gradient, plain_esd, plain_sdd, shifted_frozen

import mu.draws
from mu.draws import SAMPLED
from mu.state import State

DEFAULTS = dict(
    unlearn=5.0,
    eta=1.0,
    retain=0.8,
    ascent=0.0,
    relearn=0.5,
    self_destruct=2.0,
    keep=0.0,
    learn_related=0.0,
    learn_unrelated=0.0,
    ascent_bound=math.inf,
    clean=0.0,
    inner_steps=2,
    inner_lr=0.1,
    retain_prompts=None,
    drift_terms=("related", "unrelated", "empty", "any"),
    timestep=None,
    gradient_norm=0.0,
    alignment=0.0,
)
# 0.1 L(θ; unrelated) + 0.01 L(θ; related) − 0.1 L(θ_FT; forget) − 0.1 L(θ_FT; related)
# − 0.01 L(θ_FT; unrelated): the weights that the public scripts intend
PUBLIC = dict(retain=0.0, relearn=0.1, self_destruct=0.1, keep=-0.01)
PUBLIC |= dict(learn_related=0.01 - 0.1, learn_unrelated=0.1)
RANDOM_PROMPTS = {
    "encoder_hidden_states": torch.linspace(-1, 1, 4)[:, None, None].expand(4, tiny.LENGTH, 16)
}


@pytest.mark.parametrize("eta, guidance, seed", [(1.0, 3.0, 0), (2.0, 5.0, 3)])
def test_without_meta_weights_it_is_plain_esd_bit_for_bit(sets, eta, guidance, seed):
    unet = tiny.make_unet()
    start = tiny.weights(unet)
    state = State(unet, "u", lr=1e-3, seed=seed)
    off = dict(retain=0.0, relearn=0.0, self_destruct=0.0, clean=0.0, ascent=0.0)
    records = run(state, sets, 2, eta=eta, guidance=guidance, **off)
    assert [list(r.losses) for r in records] == [["unlearn"]] * 2
    expected = plain_esd(sets, 2, seed, 1e-3, eta, guidance)
    assert torch.equal(tiny.weights(unet), expected)
    assert not torch.equal(expected, start)


def test_sdd_is_a_plain_loop(sets):
    """The average samples z_t by guided DDIM; the student gives the target; the average returns."""
    n, grid, decay, lr, guidance = 2, 4, 0.9, 1.0, 3.0
    state = State(tiny.make_unet(), "x", lr=lr, optimizer="sgd", seed=6, ema=decay)
    options = dict(method="sdd", batch_size=n, trajectory_steps=grid, guidance=guidance)
    records = run(state, sets, 3, clip=math.inf, **options)
    losses, trained, teacher = plain_sdd(sets, 3, 6, n, grid, decay, lr, guidance)
    assert [r.losses["unlearn"] for r in records] == pytest.approx(losses, rel=1e-4)
    for name, p in state.named.items():
        torch.testing.assert_close(p.detach(), trained[name].detach(), rtol=0, atol=1e-5)
    released = dict(state.release().named_parameters())
    for name, average in teacher.named_parameters():
        torch.testing.assert_close(released[name].detach(), average, rtol=0, atol=1e-5)
    apart = max((released[name] - p).abs().max() for name, p in trained.items())
    assert apart > 1e-4, "the result is the student, not the average"


def test_sdd_without_an_average_and_unknown_losses_are_refused(sets):
    with pytest.raises(ValueError, match="set ema, e.g. 0.999"):
        train_short(sets, method="sdd")
    with pytest.raises(ValueError, match="unknown loss 'uce': choose esd, sdd"):
        train_short(sets, method="uce")


def test_replace_sets_the_prompt_of_the_target(sets):
    """The empty prompt as `replace` changes nothing; another prompt does."""
    same, empty = train_short(sets), train_short(sets, replace=sets[3])
    other = train_short(sets, replace={name: value + 1 for name, value in sets[3].items()})
    assert torch.equal(same[0], empty[0])
    assert (same[0] - other[0]).norm() >= 1e-3 * same[0].norm()


def collect_draws(sets, options):
    """Return the trajectories of two steps, the generators' states and the weights."""
    unet, drawn = tiny.make_unet(), []
    state = State(unet, "u", lr=1e-3, seed=4)
    fixed = (state, tiny.frozen(unet), tiny.make_scheduler())
    for _ in unlearn(*fixed, *sets, steps=2, batch_size=2, trajectory_steps=8, **options):
        drawn.append(state.trajectories["concept"])
    streams = {name: g.get_state() for name, g in state.generators.items()}
    return drawn, streams, tiny.weights(unet)


def test_other_terms_leave_the_draws_of_unlearning_alone(sets):
    drawn0, streams0, weights0 = collect_draws(sets, {})
    retained = collect_draws(sets, dict(retain=2.0))
    meta = collect_draws(sets, META | dict(inner_lr=1e-3))
    for drawn, streams, weights in (retained, meta):
        assert torch.equal(streams["unlearn"], streams0["unlearn"])
        # only the first step still has equal weights, hence equal latents
        assert torch.equal(drawn[0][0], drawn0[0][0])
        for (_, timesteps, prompt), (_, timesteps0, prompt0) in zip(drawn, drawn0, strict=True):
            assert torch.equal(timesteps, timesteps0)
            assert torch.equal(prompt, prompt0)
        assert not torch.equal(weights, weights0)
    assert torch.equal(retained[1]["retain"], meta[1]["retain"])


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    "step, options",
    [
        (0, dict()),
        (0, dict(unlearn=0.0, retain=0.0, self_destruct=0.0)),
        (0, dict(unlearn=0.0, retain=0.0, relearn=0.0)),
        (0, dict(ascent=0.7, eta=2.0)),
        (0, dict(ascent=0.7, ascent_bound=0.1)),
        (0, dict(keep=3.0)),
        (0, dict(retain=0.0, learn_related=0.4, learn_unrelated=0.7)),
        (0, PUBLIC),
        (2, dict(clean=1.5)),
        (1, dict(clean=1.5)),
        (2, dict(clean=0.0)),
        (0, dict(drift_terms=("related",), timestep=400)),
        (0, dict(drift_terms=("empty", "unrelated"))),
        (0, dict(gradient_norm=3.0, alignment=0.0)),
        (0, dict(gradient_norm=0.0, alignment=20.0)),
        (0, dict(retain_prompts=RANDOM_PROMPTS)),
    ],
)
def test_one_step_follows_the_gradient_of_the_documented_objective(
    sets, monkeypatch, order, step, options
):
    options = DEFAULTS | options | dict(order=order)
    state = State(tiny.make_unet(), "u", lr=1.0, optimizer="sgd", seed=2)
    state.step = step
    # both use this trajectory: trajectories have their own tests
    g = torch.Generator().manual_seed(8)
    state.trajectories["concept"] = (
        torch.randn(12, 4, 8, 8, generator=g),
        torch.randint(1000, (12,), generator=g),
        torch.randint(2, (12,), generator=g),
    )
    drawn = state.trajectories["concept"][:2]
    monkeypatch.setattr(mu.draws, "sample_trajectory", lambda *_, **__: drawn)  # at step 0
    start = {name: p.detach().clone() for name, p in state.named.items()}
    sizes = dict(trajectory_reuse=3, inner_batch_size=5, retain_batch_size=5)
    (record,) = run(state, sets, step + 1, shifted_frozen(), clip=math.inf, **sizes, **options)
    # the loop draws the prompts
    rows = [x[4 * step : 4 * step + 4] for x in state.trajectories["concept"]]
    expected = objective_gradient(sets, 2, step, rows, **options)
    found = {name: start[name] - p.detach() for name, p in state.named.items()}  # learning rate 1
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert difference.norm() < 2e-5 * size
    assert size > 0.01
    assert record.step == step + 1


def test_one_step_follows_the_drift_on_own_samples(sets, monkeypatch):
    """Of 4 rows, 2 have related and 2 unrelated prompts; θ itself samples, at `retain_guidance`."""
    g = torch.Generator().manual_seed(8)
    z, t = torch.randn(4, 4, 8, 8, generator=g), torch.randint(1000, (4,), generator=g)
    state = State(tiny.make_unet(), "u", lr=1.0, optimizer="sgd", seed=2)
    asked, start = [], {name: p.detach().clone() for name, p in state.named.items()}

    def sample(unet, _, conditioning, unconditional, generator, trajectory, shape):
        asked.append((unet, trajectory.guidance, conditioning["encoder_hidden_states"]))
        return z, t

    monkeypatch.setattr(mu.draws, "sample_trajectory", sample)
    options = dict(unlearn=0.0, retain=3.0, drift_terms=("sampled",), retain_batch_size=7)
    (record,) = run(state, sets, 1, shifted_frozen(), clip=math.inf, retain_guidance=4.0, **options)
    ((unet, guidance, states),) = asked
    assert unet is state.unet and guidance == 4.0
    for rows, concept_set in ((states[:2], sets[1]), (states[2:], sets[2])):
        known = concept_set.conditioning["encoder_hidden_states"]
        assert all(any(torch.equal(row, one) for one in known) for row in rows)
    reference, frozen = tiny.make_unet(), shifted_frozen()
    empty = sets[3]["encoder_hidden_states"].expand(4, -1, -1)
    drifts = []
    for half in (slice(0, 2), slice(2, 4)):
        for c in (states, empty):
            with torch.no_grad():
                target = frozen(z[half], t[half], c[half]).sample
            drifts.append((reference(z[half], t[half], c[half]).sample - target).pow(2).mean())
    trained = dict(reference.named_parameters())
    expected = torch.autograd.grad(sum(drifts) / 2, [trained[name] for name in state.named])
    for (name, p), gradient in zip(state.named.items(), expected, strict=True):
        torch.testing.assert_close(start[name] - p.detach(), gradient, rtol=1e-3, atol=1e-6)
    found = [record.losses[f"{name} drift"] for names in SAMPLED for name in names]
    assert found == pytest.approx([d.item() for d in drifts])


def test_keep_holds_the_own_unrelated_samples_after_the_attack(sets, monkeypatch):
    """An attack at learning rate 0 leaves θ: keep then adds these drifts to the unrelated loss."""
    g = torch.Generator().manual_seed(8)
    z, t = torch.randn(4, 4, 8, 8, generator=g), torch.randint(1000, (4,), generator=g)
    prompts = []

    def sample(unet, _, conditioning, *rest):
        prompts.append(conditioning["encoder_hidden_states"])
        return z, t

    def moved(**options):
        state = State(tiny.make_unet(), "u", lr=1.0, optimizer="sgd", seed=2)
        start = [p.detach().clone() for p in state.parameters]
        (record,) = run(
            state,
            sets,
            1,
            shifted_frozen(),
            clip=math.inf,
            unlearn=0.0,
            retain=3.0,
            self_destruct=1.0,
            inner_lr=0.0,
            retain_batch_size=8,
            **options,
        )
        pairs = zip(state.parameters, start, strict=True)
        return [p.detach() - s for p, s in pairs], record.losses

    monkeypatch.setattr(mu.draws, "sample_trajectory", sample)
    own, losses = moved(keep=2.0, drift_terms=("sampled",))
    parts = [moved(drift_terms=("sampled",))[0]]
    parts += [moved(keep=keep, drift_terms=("related",))[0] for keep in (2.0, 0.0)]
    reference, frozen = tiny.make_unet(), shifted_frozen()
    empty = sets[3]["encoder_hidden_states"].expand(2, -1, -1)
    drifts = []
    for c in (prompts[0][2:], empty):
        with torch.no_grad():
            target = frozen(z[2:], t[2:], c).sample
        drifts.append((reference(z[2:], t[2:], c).sample - target).pow(2).mean())
    found = [losses[f"{name} drift after"] for name in SAMPLED[1]]
    assert found == pytest.approx([d.item() for d in drifts], rel=1e-4)
    trained = dict(reference.named_parameters())
    names = State(tiny.make_unet(), "u", lr=1.0, optimizer="sgd").named
    expected = torch.autograd.grad(2.0 * sum(drifts), [trained[name] for name in names])
    for both, without, kept, neither, gradient in zip(own, *parts, expected, strict=True):
        difference = (both - without) - (kept - neither)
        torch.testing.assert_close(-difference, gradient, rtol=1e-2, atol=1e-5)


def displacement(sets, **options):
    """Return the norm of one SGD step at learning rate 1, and the losses."""
    state = State(tiny.make_unet(), "f", lr=1.0, optimizer="sgd", seed=1)
    start = tiny.weights(state.unet)
    (record,) = run(state, sets, 1, shifted_frozen(), unlearn=0.0, clip=math.inf, **options)
    return (tiny.weights(state.unet) - start).norm(), record.losses


@pytest.mark.parametrize("inner_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("bracket", [dict(self_destruct=1.0), dict(clean=1.0, clean_every=1)])
def test_a_bracket_has_no_gradient_where_the_attack_changes_nothing(sets, bracket, inner_optimizer):
    """Common random numbers: at inner learning rate 0 the bracket's two losses are equal."""
    still = dict(inner_lr=0.0, inner_steps=2, inner_optimizer=inner_optimizer)
    moved, losses = displacement(sets, **still, **bracket)
    one_term, _ = displacement(sets, retain=2.0)
    assert one_term > 0.1
    assert moved < 1e-5 * one_term  # other batches, other rounding
    for name in ("related", "unrelated") if "clean" in bracket else ("related",):
        assert losses[f"{name} after"] == pytest.approx(losses[name], rel=1e-6)
    pushed, losses = displacement(sets, inner_lr=0.1, inner_steps=2, **bracket)
    assert pushed > 1e-2 * one_term
    assert losses["related after"] != pytest.approx(losses["related"], rel=1e-4)


def test_bracket_without_weight_decay_leaves_adamw_in_place(sets):
    """AdamW divides rounding errors by epsilon: a large epsilon keeps them small."""
    state = State(tiny.make_unet(), "f", lr=1e-3, seed=1)
    state.optimizer.param_groups[0]["weight_decay"] = 0.0
    state.optimizer.param_groups[0]["eps"] = 1.0
    start = tiny.weights(state.unet)
    run(state, sets, 3, unlearn=0.0, self_destruct=1.0, inner_lr=0.0)
    torch.testing.assert_close(tiny.weights(state.unet), start, rtol=0, atol=1e-8)


def test_a_loss_above_the_bound_has_no_gradient(sets):
    options = dict(relearn=1.0, inner_lr=1e-3)
    free, losses = displacement(sets, **options)
    bounded, _ = displacement(sets, bound=losses["forget after"] * 0.9, **options)
    still_free, _ = displacement(sets, bound=losses["forget after"] * 1.1, **options)
    assert bounded == 0
    assert still_free == free > 0


def test_the_gradient_is_clipped_as_a_whole(sets):
    state = State(tiny.make_unet(), "f", lr=1.0, optimizer="sgd")
    start = tiny.weights(state.unet)
    weights = dict(unlearn=0.0, retain=1.0, relearn=1.0, self_destruct=3.0)
    run(state, sets, 1, inner_lr=0.1, clip=0.01, **weights)
    assert (tiny.weights(state.unet) - start).norm() == pytest.approx(0.01, rel=1e-3)


def test_weights_that_are_all_zero_are_refused(sets):
    with pytest.raises(ValueError, match="every weight is 0.*unlearn, retain"):
        run(State(tiny.make_unet(), "x"), sets, 1, unlearn=0.0)
