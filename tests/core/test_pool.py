"""Attackers that persist: the special case of the paper, exact displacements, restarts, resume."""

import math

import pytest
import tiny
import torch
from flat import run
from plain import denoising_loss

from mu.attackers import Attacker, Inner, Simulation, Simulator
from mu.losses import denoising, draw_minibatch, gradients, squared_errors
from mu.lowrank import ADAPTED, LowRank, displacement
from mu.parallel import Runtime
from mu.pool import FullWeights, Member, Plan, Storage
from mu.state import State

META = dict(
    retain=1.0,
    relearn=0.3,
    self_destruct=4.0,
    clean=1.0,
    clean_every=3,
    inner_lr=(1e-4, 4e-4),
    inner_optimizer=["sgd", "adam"],
    inner_batch_size=3,
    trajectory_steps=6,
    trajectory_reuse=3,
    retain_batch_size=4,
)
WARM = META | dict(inner_steps=2, horizon=(3, 9), one_prompt=0.5)


def train(sets, steps=9, seed=3, subset="f", state=None, **options):
    """Return state and comparable records of a run."""
    state = state or State(tiny.make_unet(), subset, lr=1e-3, seed=seed, ema=0.9)
    records = [(r.step, r.losses) for r in run(state, sets, steps, **options)]
    return state, records


def equal(one, other):
    """Return whether two lists of tensors are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_horizon_of_the_inner_steps_is_the_cold_loop(sets, steps):
    cold, records = train(sets, **META, inner_steps=steps)
    warm, others = train(sets, **META, inner_steps=steps, horizon=steps)
    assert records == others
    assert equal(cold.parameters, warm.parameters)
    assert not cold.pool
    assert warm.pool and all(m.finished and not m.coordinates for m in warm.pool.values())


def test_a_longer_horizon_is_another_loop(sets):
    _, cold = train(sets, **META, inner_steps=2)
    _, warm = train(sets, **META, inner_steps=2, horizon=4)
    assert cold[:2] == warm[:2], "the first visits start at θ"
    assert cold[-1] != warm[-1]


def visit(state, horizon, batches, measured, rank=0, runtime=None):
    """Visit one member with given minibatches; returns the gradient, the losses and the member."""
    inner = Inner(2, 1e-3, "adam", 3, horizon=horizon, bound=math.inf)
    simulator = Simulator(state, inner, runtime or Runtime())
    member = state.pool.setdefault("forget 0", Member(Plan(horizon, [], rank, 5, "adam", 1e-3)))
    attacker = Attacker("forget", {name: 1.0 for name in measured})
    terms = [denoising(batch, name) for name, batch in measured.items()]
    simulation = Simulation(batches, measured, attacker, member)
    (_, gradient), losses = simulator.gradients(simulation, terms)
    return gradient, losses, member


def minibatches(sets, noise_scheduler, count):
    g = torch.Generator().manual_seed(8)
    return [draw_minibatch(sets[0], noise_scheduler, 3, g) for _ in range(count)]


@pytest.mark.parametrize("runtime", [Runtime(), Runtime(snapshot="cpu")])
def test_visits_at_a_constant_theta_are_one_long_attack(sets, noise_scheduler, runtime):
    *batches, outer = minibatches(sets, noise_scheduler, 5)
    state = State(tiny.make_unet(), "f", lr=0.0)
    start = [p.detach().clone() for p in state.parameters]
    for part in (batches[:2], batches[2:]):
        gradient, losses, member = visit(state, 9, part, {"related": outer}, runtime=runtime)
        assert equal(state.parameters, start), "θ is restored bit for bit"
    assert member.steps == 4

    real = torch.optim.Adam(state.parameters, lr=1e-3, fused=True)
    for batch in batches:
        denoising_loss(state.unet, batch).backward()
        real.step()
        real.zero_grad()
    moved = [p.detach() - s for p, s in zip(state.parameters, start, strict=True)]
    for found, expected in zip(member.coordinates, moved, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        losses["related after"], denoising_loss(state.unet, outer).item(), rtol=1e-4, atol=1e-6
    )
    expected = torch.autograd.grad(denoising_loss(state.unet, outer), state.parameters)
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


def test_delta_is_the_exact_difference_to_theta(sets, noise_scheduler, monkeypatch):
    *batches, outer = minibatches(sets, noise_scheduler, 3)
    state = State(tiny.make_unet(), "f", lr=0.0)
    seen = []

    class Spy(FullWeights):
        def leave(self, start):
            seen.extend(p.detach() - s for p, s in zip(self.parameters, start, strict=True))
            super().leave(start)

    monkeypatch.setattr("mu.attackers.FullWeights", Spy)
    _, _, member = visit(state, 9, batches, {"related": outer})
    assert equal(member.coordinates, seen)
    assert sum(delta.abs().sum() for delta in member.coordinates) > 0


def test_the_bracket_is_zero_without_a_displacement(sets):
    weights = dict(retain=0.0, unlearn=0.0, relearn=0.0, self_destruct=4.0, clean=2.0)
    options = META | weights | dict(inner_lr=0.0, inner_optimizer="sgd", inner_steps=2, horizon=50)
    state = State(tiny.make_unet(), "f", lr=1e-2, optimizer="sgd", seed=3)
    start = [p.detach().clone() for p in state.parameters]
    _, records = train(sets, steps=6, state=state, **options)
    for _, losses in records:
        assert losses["related"] == pytest.approx(losses["related after"], rel=1e-5)
    for p, s in zip(state.parameters, start, strict=True):
        torch.testing.assert_close(p.detach(), s, rtol=0, atol=1e-6)


def test_a_displaced_attacker_makes_the_bracket_act(sets):
    weights = dict(retain=0.0, unlearn=0.0, relearn=0.0, self_destruct=4.0, clean=0.0)
    options = META | weights | dict(inner_lr=1e-2, inner_steps=2, horizon=50)
    state, _ = train(sets, steps=3, **options)
    assert not equal(state.parameters, list(tiny.make_unet().parameters()))


def plans(state):
    """Return what each member of the pool has drawn."""
    return {slot: (member.plan, member.steps) for slot, member in state.pool.items()}


def test_order_and_restarts_depend_on_the_seed_alone(sets):
    one, records = train(sets, steps=14, **WARM)
    again, others = train(sets, steps=14, **WARM)
    assert plans(one) == plans(again)
    assert records == others
    moved, _ = train(sets, steps=14, **WARM | dict(self_destruct=9.0, retain=3.0, unlearn=0.5))
    assert plans(one) == plans(moved), "weights change no restart"
    other, _ = train(sets, steps=14, seed=4, **WARM)
    assert plans(one) != plans(other)
    assert set(one.pool) == {"forget 0", "forget 1", "unrelated 0"}


def test_attackers_take_turns_and_restart_after_their_horizon(sets):
    steps = {slot: [] for slot in ("forget 0", "forget 1", "unrelated 0")}
    options = META | dict(inner_steps=2, horizon=6)
    state = State(tiny.make_unet(), "f", lr=1e-3, seed=3)
    for step in range(1, 19):
        train(sets, steps=step, state=state, **options)
        slot = ("forget 0", "forget 1", "unrelated 0")[(step - 1) % 3]
        steps[slot].append(state.pool[slot].steps)
    for counts in steps.values():
        first = counts.index(6)  # the first horizon is cut
        assert counts[first + 1 : first + 4] == [2, 4, 6][: len(counts) - first - 1]


def test_one_prompt_attackers_see_one_prompt(sets):
    options = WARM | dict(one_prompt=1.0)
    state, _ = train(sets, **options)
    for number in range(2):
        seen = sets[0].prompt[state.pool[f"forget {number}"].plan.images]
        assert len(set(seen.tolist())) == 1
    assert state.pool["unrelated 0"].plan.images == []
    state, _ = train(sets, **options | dict(one_prompt=0.0))
    assert all(m.plan.images == [] for m in state.pool.values())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("stopped", [4, 7])
def test_a_killed_run_resumes_to_the_same_bits(sets, stopped, rank):
    options = WARM | dict(inner_rank=(rank,), lora_lr=1e-3)
    whole, records = train(sets, steps=11, **options)
    state, first = train(sets, steps=stopped, **options)
    saved = {name: value.clone() for name, value in state.tensors().items()}
    state = State(tiny.make_unet(1), "f", lr=1e-3, seed=9, ema=0.9)
    state.load(saved)
    state, rest = train(sets, steps=11, state=state, **options)
    assert first + rest == records
    assert equal(whole.parameters, state.parameters)
    assert plans(whole) == plans(state)
    for slot, member in whole.pool.items():
        assert equal(member.coordinates, state.pool[slot].coordinates)


def test_a_lora_attacker_follows_the_gradients_of_its_factors(sets, noise_scheduler):
    """Against autograd through W + B A."""
    state = State(tiny.make_unet(), "f", lr=0.0)
    member = Member(Plan(9, rank=2, seed=5, optimizer="sgd", lr=0.1))
    attack = LowRank(member, state.named, Storage())
    start = [p.detach().clone() for p in state.parameters]
    attack.enter(start)
    assert equal(state.parameters, start), "B is 0"
    with torch.no_grad():
        for b in attack.factors[1::2]:
            b.normal_(generator=torch.Generator().manual_seed(1))
    attack.enter(start)

    (batch,) = minibatches(sets, noise_scheduler, 1)
    factors = [f.detach().clone().requires_grad_() for f in attack.factors]
    names = [name for name in state.named if name.endswith(ADAPTED)]
    pairs = zip(factors[::2], factors[1::2], strict=True)
    start_of = dict(zip(state.named, start, strict=True))
    replaced = {
        name: start_of[name] + (b @ a).view_as(start_of[name])
        for name, (a, b) in zip(names, pairs, strict=True)
    }
    latents, timesteps, conditioning = batch.inputs
    predicted = torch.func.functional_call(
        state.unet, replaced, (latents, timesteps, conditioning["encoder_hidden_states"])
    ).sample
    loss = (predicted - batch.target).pow(2).mean()
    expected = [
        f - 0.1 * g for f, g in zip(factors, torch.autograd.grad(loss, factors), strict=True)
    ]

    (found,) = squared_errors(state.unet, [denoising(batch)])
    for p, g in zip(state.parameters, gradients(found, state.parameters), strict=True):
        p.grad = g
    attack.step()
    attack.zero_grad()
    for f, e in zip(attack.factors, expected, strict=True):
        torch.testing.assert_close(f.detach(), e.detach(), rtol=1e-4, atol=1e-6)
    attack.leave(start)
    for delta, p, s in zip(displacement(member, state.named), state.parameters, start, strict=True):
        torch.testing.assert_close(p.detach(), s + delta, rtol=0, atol=1e-6)
    assert all(p.grad is None for p in state.parameters)


def test_a_lora_attacker_needs_attention_matrices(sets):
    with pytest.raises(ValueError, match="inner_rank 0"):
        LowRank(Member(Plan(9, rank=2, optimizer="sgd")), {"conv_in.weight": torch.ones(2)}, None)


def test_half_precision_halves_the_pool_and_changes_little(sets):
    options = WARM | dict(horizon=50, one_prompt=0.0)
    exact, _ = train(sets, **options)
    half, _ = train(sets, **options, half_pool=True)
    for slot, member in exact.pool.items():
        assert {d.dtype for d in half.pool[slot].coordinates} == {torch.bfloat16}
        one = torch.cat([d.flatten() for d in member.coordinates])
        other = torch.cat([d.flatten().float() for d in half.pool[slot].coordinates])
        assert (one - other).norm() < 0.1 * one.norm()


def test_second_order_refuses_attackers_that_go_on(sets):
    options = META | dict(inner_optimizer="sgd", order="second", inner_steps=2, horizon=8)
    with pytest.raises(ValueError, match="horizon 0"):
        train(sets, **options)


def test_a_bound_on_each_image_replaces_that_on_the_mean(sets):
    """A mean above its bound gives no gradient; images below theirs do, others are pulled back."""
    options = META | dict(inner_steps=2, relearn=0.0, self_destruct=5.0, clean=0.0)

    def after(**bounds):
        state, _ = train(sets, steps=1, **options, **bounds)
        return tiny.weights(state.unet).clone()

    mean_only = after(bound=1e-9)
    up, down = (after(bound=1e-9, image_bound=b) - mean_only for b in (1e9, 1e-9))
    assert torch.dot(up.flatten(), down.flatten()) < 0
    assert not torch.equal(after(bound=1e-9, image_bound=1e9), mean_only)
    assert torch.equal(after(bound=1e-9, image_bound=1e9), after(bound=math.inf))


@pytest.mark.parametrize("above, restarts", [(1e-9, True), (1e9, False)])
def test_an_attacker_that_destroyed_itself_restarts_and_clean_does_not(sets, above, restarts):
    options = META | dict(inner_steps=2, horizon=40, pool=1, clean=1.0, inner_batch_size=2)
    state, _ = train(sets, steps=9, restart_above=above, **options)
    assert state.pool["forget 0"].finished == restarts
    assert bool(state.pool["forget 0"].coordinates) != restarts
    assert state.pool["unrelated 0"].steps > 2


@pytest.mark.parametrize(("head_start", "allowed"), [(5, {5}), ((4, 7), {4, 5, 6, 7})])
def test_the_head_start_comes_at_once_and_the_horizon_after_it(sets, head_start, allowed):
    options = META | dict(inner_steps=2, horizon=4, clean=0.0, inner_batch_size=2, pool=1)
    state, lives, last = State(tiny.make_unet(), "f", lr=1e-3, seed=3), [], None
    for step in range(1, 20):
        train(sets, steps=step, state=state, head_start=head_start, **options)
        member = state.pool["forget 0"]
        if member is not last:
            lives.append([])
        last = member
        lives[-1].append(member.steps)
    assert all(life == [life[0], life[0] + 2, life[0] + 4] for life in lives[1:-1])
    assert {life[0] for life in lives} <= allowed
    assert len({life[0] for life in lives}) > 1 or len(allowed) == 1


@pytest.mark.parametrize(
    "option",
    [
        dict(one_prompt=0.5),
        dict(head_start=3),
        dict(inner_rank=(0, 4)),
    ],
)
def test_options_of_attackers_that_persist_need_a_horizon(sets, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is for attackers that persist"):
        train(sets, **META, **option, inner_steps=2)


def test_an_attacker_that_diverges_is_replaced(sets):
    """The saved state after the error holds no attacker with values that are not finite."""
    options = META | dict(inner_lr=1e30, inner_optimizer="sgd", inner_steps=2, horizon=50)
    state = State(tiny.make_unet(), "f", lr=1e-3, seed=3)
    with pytest.raises(FloatingPointError):
        train(sets, state=state, **options)
    assert all(member.finished and not member.coordinates for member in state.pool.values())
