"""Phases and the defender's validation: when a phase ends, what is kept, what a resume repeats."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from flat import DEFAULTS, objective
from plain import denoising_loss

from mu.draws import Data
from mu.guards import calm, limit
from mu.losses import draw_minibatch, image_losses
from mu.objective import Objective, Weights
from mu.parallel import Runtime
from mu.phases import Phase, unlearn_in_phases
from mu.pool import Member, Plan
from mu.sampling import Sampling, prompt_gains, sample_latents
from mu.state import State
from mu.train import add_limited, unlearn
from mu.validation import FIXED, Exam, Found, Measured, Validation, Validator, fixed_draws

ASCENT = dict(retain=1.0, ascent=1.0, retain_batch_size=4, trajectory_steps=4, trajectory_reuse=3)
ASCENT |= dict(drift_terms=("related", "empty", "sampled"))
WARM = ASCENT | dict(
    self_destruct=4.0, inner_lr=1e-2, inner_optimizer="adam", inner_steps=2, horizon=8
)
SHORT = Validation(
    every=2,
    depths=(1, 2),
    lr=1e-2,
    batch_size=2,
    images=6,
    pictures=3,
    sampling_steps=2,
    gain_steps=3,
)
LOST, HARMED = Validation().lost, Validation().harmed  # gains of pictures that are just kept
IMAGES = {name: torch.full((10,), 0.1) for name in FIXED}


def phases(*steps, **options):
    """Return a phase of ascent and, for more numbers of steps, phases with attackers."""
    made = [Phase("ascend", steps[0], objective(**ASCENT), lr=1e-3)]
    return made + [Phase("grow", n, objective(**WARM), lr=2e-3, **options) for n in steps[1:]]


def make_state(seed=3):
    return State(tiny.make_unet(), "f", lr=1e-3, seed=seed, ema=0.5)


def loop(state, sets, plan, validation=SHORT, **options):
    unet_frozen = tiny.frozen(tiny.make_unet())
    fixed = (state, unet_frozen, tiny.make_scheduler(), Data(*sets))
    return unlearn_in_phases(*fixed, plan, validation=validation, **options)


def measured(related=0.0, unrelated=0.0, losses=IMAGES, least=LOST):
    """Return what ten pictures show, these shares of them lost (or harmed, as `least` says)."""
    shares = {"related": related, "unrelated": unrelated}
    tenths = {name: torch.arange(10) < 10 * share for name, share in shares.items()}
    return Measured(
        losses, {name: torch.where(lost, 0.9 * least, least) for name, lost in tenths.items()}
    )


def pretend(monkeypatch, related, unrelated=None, before=None):
    """Let validations find these shares of lost pictures, by step; `before` is at θ."""
    unrelated, before = unrelated or {}, before or {}

    def found(validator):
        step = validator.state.step
        after = measured(related.get(step, 0.0), unrelated.get(step, 0.0))
        at_theta = measured(*before.get(step, ()), least=HARMED)
        return Found(at_theta, {("all images", 2): after}, {}, 5)

    monkeypatch.setattr(Validator, "validate", found)


def comparable(records):
    return [(r.step, r.losses, r.passes) for r in records]


def test_one_phase_without_validation_is_the_loop(sets):
    one, other = make_state(), make_state()
    found = comparable(loop(one, sets, phases(4), Validation(every=0)))
    fixed = (other, tiny.frozen(tiny.make_unet()), tiny.make_scheduler(), Data(*sets))
    expected = comparable(unlearn(*fixed, objective(**ASCENT), steps=4))
    assert found == expected
    assert torch.equal(tiny.weights(one.unet), tiny.weights(other.unet))


def test_phases_follow_each_other_with_their_own_objective_and_learning_rate(sets):
    state, rates = make_state(), []
    for record in loop(state, sets, phases(3, 4), Validation(every=0)):
        rates.append(state.optimizer.param_groups[0]["lr"])
        assert ("related after" in record.losses) == (record.step > 3)
    assert rates == [1e-3] * 3 + [2e-3] * 4
    assert (state.phase, state.phase_start) == (2, 7)


def test_the_learning_rate_is_annealed_to_zero(sets):
    state, rates = make_state(), []
    for _ in loop(state, sets, phases(1, 4, anneal=True), Validation(every=0)):
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize("until, steps", [(0.5, 4), (0.9, 7)])
def test_a_phase_ends_when_the_attack_breaks_enough(sets, until, steps, monkeypatch):
    harm = dict.fromkeys((2, 4, 6), 0.9)  # lowers the score only
    pretend(monkeypatch, {2: 0.1, 4: 0.6, 6: 0.6}, unrelated=harm)
    state = make_state()
    records = list(loop(state, sets, phases(1, 6, until=until)))
    assert len(records) == steps
    assert [r.step for r in records if "validation score" in r.losses] == [2, 4, 6][: steps // 2]
    assert state.best.step == 4


@pytest.mark.parametrize(
    "scores, ended",
    [
        ({2: 0.3, 4: 0.2, 6: 0.2}, [6]),  # none better since step 2, patience 4
        ({2: 0.3, 4: 0.4, 6: 0.2}, [8]),
        ({2: 0.3, 4: 0.2, 6: 0.9}, [6, 10]),  # good enough for the next phase, which has its own
        ({2: 0.3, 4: 0.4, 6: 0.5, 8: 0.6}, [9, 14]),
    ],
)
def test_a_training_that_improves_no_more_ends(sets, scores, ended, monkeypatch):
    pretend(monkeypatch, scores)
    state, found = make_state(), phases(1, 8, 9, until=0.8, patience=4)
    starts = {record.step: state.phase_start for record in loop(state, sets, found)}
    assert list(starts) == list(range(1, ended[-1] + 1))
    assert sorted({start for start in starts.values() if start > 1}) == ended
    assert state.phase == len(found)


def test_a_phase_without_attackers_is_not_validated(sets, monkeypatch):
    pretend(monkeypatch, dict.fromkeys(range(9), 0.5))
    state = make_state()
    records = list(loop(state, sets, phases(4, 3)))
    assert [r.step for r in records if "validation score" in r.losses] == [6]
    assert state.best.step == 6


def with_healing(*steps, **last):
    """Return phases of which the last starts from the best average and has no attackers."""
    found = phases(*steps)
    healing = Objective(Weights(0.0, learn_unrelated=1.0))
    return [*found, Phase("heal", 3, healing, 1e-3, from_best=True, **last)]


@pytest.mark.parametrize("healed, best", [(0.9, 8), (0.5, 4)])
def test_healing_starts_from_the_best_average(sets, monkeypatch, healed, best):
    """What it makes of that is the result only if it validates better."""
    pretend(monkeypatch, {2: 0.1, 4: 0.6, 6: 0.2, 8: healed, 10: 0.1})
    state, kept, weights, steps = make_state(), None, None, []
    for record in loop(state, sets, with_healing(1, 6)):
        steps.append(record.step)
        if record.step == 7:  # the last phase has begun
            kept = [p.clone() for p in state.best.weights]
            weights = [p.clone() for p in state.parameters]
            assert (state.phase, state.best.step) == (2, 4)
            assert not state.optimizer.state
            assert len(state.pool) == 0
    assert steps == list(range(1, 11))
    assert all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))
    assert state.best.step == best


def test_healing_is_what_patience_leads_to(sets, monkeypatch):
    pretend(monkeypatch, {2: 0.3, 4: 0.2, 6: 0.2})
    found = phases(1, 8, 9, until=0.8, patience=4)
    state, plan = make_state(), [*found, with_healing(1)[-1]]
    starts = {record.step: state.phase_start for record in loop(state, sets, plan)}
    assert max(starts) == 9, "6 steps until the patience ends, 3 of healing"
    assert starts[6] == starts[9 - 1] == 6


@pytest.mark.parametrize("healed", [True, False])
@pytest.mark.parametrize("stopped", [2, 3, 4, 5, 7])
def test_a_killed_run_resumes_to_the_same_bits(sets, stopped, healed):
    plan, whole = with_healing(3, 4) if healed else phases(3, 4), make_state()
    records = comparable(loop(whole, sets, plan))
    state = make_state()
    first = []
    for record in loop(state, sets, plan):
        first.append(record)
        if record.step == stopped:
            break
    saved = {name: value.clone() for name, value in state.tensors().items()}
    state = make_state(seed=8)
    state.load(saved)
    assert comparable(first) + comparable(loop(state, sets, plan)) == records
    assert torch.equal(tiny.weights(whole.release()), tiny.weights(state.release()))
    assert whole.best.step == state.best.step


def test_a_validation_changes_nothing_and_repeats_itself(sets):
    state = make_state()
    list(loop(state, sets, phases(2), Validation(every=0)))
    frozen = tiny.frozen(tiny.make_unet())
    fixed = (state, frozen, tiny.make_scheduler(), Data(*sets), SHORT, Runtime())
    before = {name: value.clone() for name, value in state.tensors().items()}
    one, other = Validator(*fixed).validate(), Validator(*fixed).validate()
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name
    pairs = [(one.before, other.before)] + [(m, other.after[w]) for w, m in one.after.items()]
    for found, again in pairs:
        for values, repeated in zip(found, again, strict=True):
            for name, value in values.items():
                assert torch.equal(value, repeated[name])
    assert one.passes == other.passes
    for found in one.after.values():
        assert not torch.equal(one.before.losses["forget"], found.losses["forget"])


def test_a_validation_attacks_with_all_images_and_with_those_of_one_prompt(sets):
    """Its numbers are those of two attacks written by hand, at each depth."""
    state, scheduler, losses = make_state(), tiny.make_scheduler(), {}
    frozen = tiny.frozen(tiny.make_unet())
    found = Validator(state, frozen, scheduler, Data(*sets), SHORT, Runtime()).validate()
    batches = fixed_draws(Data(*sets), scheduler, SHORT).batches
    chosen = sets[0].prompt[SHORT.seed % len(sets[0].prompt)]
    one_prompt = sets[0].subset(torch.nonzero(sets[0].prompt == chosen).flatten())
    for attack, images in {"all images": sets[0], "one prompt": one_prompt}.items():
        unet = tiny.make_unet()
        adam = torch.optim.Adam(unet.parameters(), lr=SHORT.lr)
        generator = torch.Generator().manual_seed(SHORT.seed + 1)
        for step in SHORT.depths:
            adam.zero_grad()
            denoising_loss(unet, draw_minibatch(images, scheduler, 2, generator)).backward()
            adam.step()
            losses[attack, step] = image_losses(unet, batches)
    assert list(found.after) == list(losses)
    for where, expected in losses.items():
        for name in expected:
            torch.testing.assert_close(found.after[where].losses[name], expected[name])


def test_more_pictures_show_harm_before_an_attack(sets):
    state, frozen = make_state(), tiny.frozen(tiny.make_unet())
    more = replace(SHORT, pictures_before=7)
    fixed = (state, frozen, tiny.make_scheduler(), Data(*sets))
    found, few = (Validator(*fixed, v, Runtime()).validate() for v in (more, SHORT))
    assert {len(gains) for gains in found.before.gains.values()} == {7}
    assert torch.equal(found.before.losses["related"], few.before.losses["related"])
    assert list(found.after) == list(few.after)
    for where, measured in few.after.items():
        assert torch.equal(found.after[where].gains["related"], measured.gains["related"])


def test_one_prompt_needs_no_second_attack(sets):
    first = torch.nonzero(sets[0].prompt == sets[0].prompt[0]).flatten()
    assert list(SHORT.attacks(sets[0].subset(first))) == ["all images"]


def test_pictures_that_their_prompts_do_not_explain_are_lost():
    after = {("all images", 50): measured(0.5, 0.2), ("one prompt", 50): measured(1.0)}
    worse = IMAGES | {"related": torch.tensor([0.5, 0.7])}
    after["one prompt", 50] = after["one prompt", 50]._replace(losses=worse)
    found = Found(measured(0.1, 0.2, least=HARMED), after, {"forget 0": 0.6}, 0)
    shown = found.losses(LOST, HARMED)
    assert shown["validation related lost"] == found.lost("related", LOST) == 0.75
    assert shown["validation unrelated lost"] == pytest.approx(0.1)
    assert shown["validation related harmed before"] == pytest.approx(0.1)
    assert shown["validation unrelated harmed before"] == pytest.approx(0.2)
    assert shown["validation lost, all images, 50"] == 0.5
    assert shown["validation lost, one prompt, 50"] == 1.0
    assert shown["validation related after"] == pytest.approx(0.35)
    assert shown["validation score"] == pytest.approx(0.75 - 0.1 - 2 * 0.3)
    assert shown["validation cosine forget 0"] == 0.6
    assert found.lost("related", 0.8 * LOST) == 0


def test_a_validation_attacks_the_average(sets):
    state = make_state()
    list(loop(state, sets, phases(3), Validation(every=0)))
    fixed = (tiny.frozen(tiny.make_unet()), tiny.make_scheduler(), Data(*sets), SHORT)
    found = Validator(state, *fixed, Runtime()).validate()
    batches = fixed_draws(Data(*sets), tiny.make_scheduler(), SHORT).batches
    with state.averaged() as unet:
        expected = image_losses(unet, batches)
    assert torch.equal(found.before.losses["related"], expected["related"])


def test_a_validation_finds_the_members_that_go_its_way(sets):
    state, scheduler = make_state(), tiny.make_scheduler()
    start = [p.detach().clone() for p in state.parameters]
    adam = torch.optim.Adam(state.parameters, lr=SHORT.lr)
    generator = torch.Generator().manual_seed(SHORT.seed + 1)
    for _ in range(min(SHORT.depths)):
        denoising_loss(state.unet, draw_minibatch(sets[0], scheduler, 2, generator)).backward()
        adam.step()
        adam.zero_grad()
    moved = [p.detach() - s for p, s in zip(state.parameters, start, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(state.parameters, start)
    state.pool["forget 0"] = Member(Plan(9), 2, coordinates=moved)
    state.pool["forget 1"] = Member(Plan(9), 2, coordinates=[-delta for delta in moved])
    state.pool["unrelated 0"] = Member(Plan(9), 0)
    frozen = tiny.frozen(tiny.make_unet())
    found = Validator(state, frozen, scheduler, Data(*sets), SHORT, Runtime()).validate()
    assert set(found.cosines) == {"forget 0", "forget 1"}
    assert found.cosines["forget 0"] == pytest.approx(1.0, abs=1e-3)
    assert -1 < found.cosines["forget 1"] < 0  # that with the nearest of two attacks


def test_the_result_is_the_best_average(sets, monkeypatch):
    pretend(monkeypatch, {2: 0.2, 4: 0.7, 6: 0.4})
    state = make_state()
    for record in loop(state, sets, phases(1, 6)):
        if record.step == 4:
            with state.averaged() as unet:
                expected = tiny.weights(unet).clone()
    assert not torch.equal(tiny.weights(state.unet), expected)
    assert torch.equal(tiny.weights(state.release()), expected)


@pytest.mark.parametrize(
    "harm",
    [
        {"before": {4: (0.6, 0.0), 6: (0.6, 0.0)}},
        {"before": {4: (0.0, 0.6), 6: (0.0, 0.6)}},
        {"unrelated": {4: 0.6, 6: 0.6}},
    ],
)
def test_harm_lowers_the_score(harm, sets, monkeypatch):
    """A model that breaks without an attack, or loses unrelated pictures to one, is no result."""
    pretend(monkeypatch, dict.fromkeys((2, 4, 6), 0.9), **harm)
    state = make_state()
    list(loop(state, sets, phases(1, 5)))
    assert (state.best.step, state.best.score) == (2, pytest.approx(0.9))


def test_pictures_are_those_of_guided_ddim_by_hand(sets):
    unet, scheduler, data = tiny.make_unet(seed=5), tiny.make_scheduler(), Data(*sets)
    embeds = data.retain_related.conditioning["encoder_hidden_states"][:1].repeat(9, 1, 1)
    empty = data.unconditional["encoder_hidden_states"].expand_as(embeds)
    start = torch.randn(9, *data.retain_related.mean.shape[1:])
    fixed = (scheduler, {"encoder_hidden_states": embeds}, data.unconditional)
    found = sample_latents(unet, *fixed, start, Sampling(4.0, 3))
    z = start
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise, without = unet(z, t, embeds).sample, unet(z, t, empty).sample
            z = scheduler.step(without + 4.0 * (noise - without), t, z).prev_sample
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-5)


def test_the_gain_of_a_prompt_is_the_share_of_the_loss_that_it_saves(sets):
    unet, scheduler, data = tiny.make_unet(seed=5), tiny.make_scheduler(), Data(*sets)
    pictures, embeds = data.retain_related.mean[:1].repeat(9, 1, 1, 1), None
    embeds = data.retain_related.conditioning["encoder_hidden_states"][:1].repeat(9, 1, 1)
    empty = data.unconditional["encoder_hidden_states"].expand_as(embeds)
    noises, expected = torch.randn(2, *pictures.shape[1:]), 0.0
    fixed = (scheduler, {"encoder_hidden_states": embeds}, data.unconditional)
    found = prompt_gains(unet, *fixed, pictures, noises)
    with torch.no_grad():
        for noise, t in zip(noises, (250, 750), strict=True):
            t = torch.full((9,), t)
            noisy = scheduler.add_noise(pictures, noise.expand_as(pictures), t)
            full, without = (
                (unet(noisy, t, prompts).sample - noise).pow(2).mean((1, 2, 3))
                for prompts in (embeds, empty)
            )
            expected += (1 - full / without) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_original_keeps_all_its_pictures(sets):
    """Also those that it denoises no better with their prompts."""
    unet, frozen = tiny.make_unet(), tiny.frozen(tiny.make_unet())
    fixed = (tiny.make_scheduler(), Data(*sets), SHORT)
    test = Exam(unet, (frozen, *fixed[:2]), SHORT)
    gains = test.original
    assert min(gains) < 0 < max(gains)
    same = test.measure()
    assert same.lost("related", LOST) == same.lost("unrelated", LOST) == 0.0
    test.original = gains.abs() + 1.0
    other = test.measure()
    assert other.lost("related", LOST) == other.lost("unrelated", LOST) == 1.0


def test_meta_clip_bounds_the_gradient_after_the_attack(sets):
    """A large bound changes nothing; a small one lets the terms at θ decide."""
    weights = {}
    for clip in (0.0, 1e9, 1e-9):
        state = State(tiny.make_unet(), "f", lr=1e-3, optimizer="sgd", seed=3)
        options = WARM | dict(self_destruct=400.0, meta_clip=clip)
        fixed = (state, tiny.frozen(tiny.make_unet()), tiny.make_scheduler(), Data(*sets))
        what = replace(objective(**options), clip=math.inf)
        records = list(unlearn(*fixed, what, steps=1))
        weights[clip] = tiny.weights(state.unet).clone()
        assert ("norm after" in records[0].losses) == bool(clip)
    torch.testing.assert_close(weights[0.0], weights[1e9], rtol=1e-5, atol=1e-6)
    assert (weights[1e-9] - weights[0.0]).norm() > 0.01 * records[0].losses["norm after"] * 1e-3


@pytest.mark.parametrize("largest, factor", [(0.5, 0.25), (2.0, 1.0), (3.0, 1.0)])
def test_a_gradient_is_limited_by_the_norm_of_another(largest, factor):
    gradient, other = [torch.tensor([6.0, 8.0]), torch.zeros(2)], [torch.tensor([3.0, 4.0])]
    expected = [factor * g for g in gradient]
    assert limit(gradient, other, largest) == pytest.approx((10.0, 5.0))
    torch.testing.assert_close(gradient, expected)


def test_what_the_attack_destroys_and_what_it_keeps_are_limited_apart():
    """A steep gradient of self-destruction leaves that of the kept losses as it is."""
    steep, kept = [torch.tensor([300.0, 400.0])], [torch.tensor([0.0, 6.0])]
    losses = {"related drift": 0.03}
    for bound, factor in ((math.inf, 1.0), (0.015, 0.5)):  # twice the bound halves the first
        gradient = [torch.tensor([3.0, 4.0])]
        what = replace(objective(meta_clip=1.5, retain=1.0), drift_bound=bound)
        parts = ([g.clone() for g in part] for part in (steep, kept))
        norms = add_limited(gradient, *parts, what, losses)
        expected = torch.tensor([3.0, 4.0]) + 1.5 * factor * torch.tensor([3.0, 4.0])
        torch.testing.assert_close(gradient[0], expected + torch.tensor([0.0, 6.0]))
        assert norms == {"norm": 5.0, "norm after": 500.0, "norm after keep": 6.0}
    gradient = [torch.tensor([3.0, 4.0])]
    assert add_limited(gradient, None, kept, objective(), losses) == {}
    assert gradient[0].tolist() == [3.0, 10.0]


def test_meta_clip_shrinks_with_the_drift():
    """With the mean drift on what is related, or that on the rest, whichever is larger."""
    related = {"related drift": 0.03, "sampled related, empty drift": 0.05}
    rest = {"unrelated drift": 0.01, "sampled unrelated drift": 0.02, "any drift": 0.0}
    losses = {"related": 9.0} | related | rest
    assert calm(losses, math.inf) == calm(losses, 0.04) == calm({"forget": 1.0}, 0.0) == 1.0
    assert calm(losses, 0.02) == pytest.approx(0.5)
    assert calm(losses | dict.fromkeys(related, 0.0), 0.005) == pytest.approx(0.5)
    assert calm({"related drift": 0.0}, 0.015) == 1.0


def test_a_model_that_drifts_is_mended_before_it_learns_to_break(sets):
    """Far beyond the bound, a step is that of the terms at θ."""

    def weights(**options):
        state = State(tiny.make_unet(seed=5), "f", lr=1e-3, optimizer="sgd", seed=3)
        fixed = (state, tiny.frozen(tiny.make_unet()), tiny.make_scheduler(), Data(*sets))
        what = replace(objective(**WARM | options), clip=math.inf)
        (record,) = unlearn(*fixed, what, steps=1)
        assert record.losses["related drift"] > 0
        return tiny.weights(state.unet).clone()

    bounded = weights(meta_clip=1.5, drift_bound=1e-9)
    torch.testing.assert_close(bounded, weights(meta_clip=1e-9), rtol=0, atol=1e-7)
    assert not torch.allclose(bounded, weights(meta_clip=1.5), rtol=0, atol=1e-7)


def test_a_drift_bound_needs_a_clip_and_a_drift(sets):
    plan = [Phase("grow", 2, objective(**WARM, drift_bound=0.1), lr=1e-3)]
    with pytest.raises(ValueError, match="drift_bound is 0.1, .* set meta_clip and retain"):
        next(loop(make_state(), sets, plan))


def test_defaults_are_one_cold_step():
    assert DEFAULTS["inner_steps"] == 1
    assert objective().inner.horizon == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"depths": ()}, "depths .* such as .50, 100."),
        ({"depths": (0, 50)}, "depths .* such as .50, 100."),
        ({"pictures": 0}, "pictures is 0, .* such as 16"),
    ],
)
def test_a_validation_that_cannot_run_is_refused(sets, wrong, message):
    state, validation = make_state(), replace(SHORT, **wrong)
    with pytest.raises(ValueError, match=message):
        next(loop(state, sets, phases(4), validation))
    assert state.step == 0


def test_phases_of_other_batches_sample_anew(sets):
    """Trajectories of the phase before have other sizes; rows must not be cut from them."""
    plan, sizes = phases(4, 3), []
    larger = WARM | dict(batch_size=5, retain_batch_size=7, trajectory_reuse=8)
    plan[1] = replace(plan[1], objective=objective(**larger))
    state = make_state()
    for record in loop(state, sets, plan, Validation(every=0)):
        points = {use: len(found[0]) for use, found in state.trajectories.items()}
        sizes.append(points)
        assert all(math.isfinite(loss) for loss in record.losses.values())
    assert sizes[-1] == {"concept": 8 * 5, "sampled": 8 * 4}


def test_a_record_shows_what_a_phase_ends_by(sets):
    records = list(loop(make_state(), sets, phases(2, 4)))
    scores = [r.losses["validation score"] for r in records if "validation score" in r.losses]
    assert len(scores) == 2
    state = make_state()
    list(loop(state, sets, phases(2, 4)))
    assert state.best.score == max(scores)


def test_a_validation_that_does_not_divide_is_refused_before_the_first_step(sets):
    state = make_state()
    validation = replace(SHORT, batch_size=3)
    with pytest.raises(ValueError, match="batch_size 3 .* choose a multiple of 2"):
        next(loop(state, sets, phases(4), validation, runtime=Runtime(accumulation=2)))
    assert state.step == 0
