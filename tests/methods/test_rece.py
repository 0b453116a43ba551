"""RECE on pipelines of both families, and refusals of both edits."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from methods.vectors import positions

from mu.methods.closed_form import RECE, EditConfig, key_values, rece, uce
from mu.models import load_pipeline


def test_rece_alternates_adversarial_vectors_and_edits(pipe):
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


def test_non_finite_results_are_refused_before_any_edit(sd_folder):
    pipe = load_pipeline(str(sd_folder))
    *_, last = key_values(pipe.unet).values()
    last[0, 0] = torch.inf
    before = tiny.weights(pipe.unet)
    with pytest.raises(ValueError, match="to_v.weight would hold NaN.*float32"):
        uce(pipe, "a cat")
    assert torch.equal(before, tiny.weights(pipe.unet))


def test_unsuitable_unets_are_refused(pipe):
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
