"""Controls without a simulated attack, and the angle of the forget and related gradients."""

import pytest
import tiny
import torch
from flat import META, run
from plain import denoising_loss, generator

from mu.losses import draw_minibatch
from mu.state import State
from mu.trainable import trainable

ANGLE = {"inner product", "cosine"}


def test_recording_the_angle_changes_nothing_but_the_record(sets):
    options = META | dict(inner_lr=0.1, retain_batch_size=6, trajectory_steps=4)
    with_angle, without = (State(tiny.make_unet(), "u", lr=1e-3, seed=3) for _ in range(2))
    measured = run(with_angle, sets, 5, angle_every=2, **options)
    plain = run(without, sets, 5, **options)
    assert torch.equal(tiny.weights(with_angle.unet), tiny.weights(without.unet))
    assert [set(r.losses) >= ANGLE for r in measured] == [True, False, True, False, True]
    pairs = list(zip(measured, plain, strict=True))
    assert [r.passes - q.passes for r, q in pairs] == [2, 0, 2, 0, 2]
    for record, other in pairs:
        assert {n: v for n, v in record.losses.items() if n not in ANGLE} == other.losses
        assert -1 <= record.losses.get("cosine", 0) <= 1


def test_the_angle_is_that_of_the_two_gradients(sets):
    options = META | dict(inner_lr=0.1, retain_batch_size=6, trajectory_steps=4)
    state = State(tiny.make_unet(), "u", lr=1e-3, seed=3)
    (record,) = run(state, sets, 1, angle_every=2, **options)
    unet, g, scheduler = tiny.make_unet(), generator(3004), tiny.make_scheduler()
    theta = list(trainable(unet, "u").values())

    def gradient(concept_set, n):
        loss = denoising_loss(unet, draw_minibatch(concept_set, scheduler, n, g))
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, theta)])

    one, other = gradient(sets[0], 8), gradient(sets[1], 6)
    cosine = torch.nn.functional.cosine_similarity(one, other, 0).item()
    assert record.losses["inner product"] == pytest.approx((one @ other).item(), rel=1e-4)
    assert record.losses["cosine"] == pytest.approx(cosine, rel=1e-4)


def test_controls_that_cannot_be_computed_are_refused(sets):
    for options, message in (
        (dict(drift_terms=("relatives",)), "unknown drift term 'relatives': choose related"),
        (dict(alignment=1.0, loss_scale=1024.0), "no float16"),
    ):
        with pytest.raises(ValueError, match=message):
            run(State(tiny.make_unet(), "u"), sets, 1, **options)


def test_a_control_can_be_the_only_term(sets):
    (record,) = run(State(tiny.make_unet(), "u"), sets, 1, unlearn=0.0, gradient_norm=1.0)
    assert list(record.losses) == ["expansion"]
    assert record.losses["expansion"] > 0


def test_gradient_ascent_needs_no_inner_loop(sets):
    state = State(tiny.make_unet(), "f", lr=0.05, optimizer="sgd", seed=1)
    records = run(state, sets, 8, unlearn=0.0, ascent=1.0, inner_batch_size=16)
    assert records[-1].losses["forget"] > records[0].losses["forget"] + 0.1
    assert {r.passes for r in records} == {1}
