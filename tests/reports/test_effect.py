"""Targets over all methods: what is drawn before and under attack, and what an attack destroys."""

import numpy as np
import pandas as pd
import pytest

from mu.reports.effect import effect_targets, lost_concepts, relative_concept

SHARES = {  # (method, model) → share of (concept, related, unrelated) drawn after 50 steps
    ("uce", "unlearned"): (0.8, 1.0, 1.0),
    ("uce", "meta-unlearned"): (0.0, 0.2, 1.0),
    ("esd-f-1", "unlearned"): (0.4, 0.9, 1.0),
    ("esd-f-1", "meta-unlearned"): (0.2, 0.4, 0.8),
}


def lines(method, model, attack, step, shares, pictures=10):
    for group, share in zip(("forget", "related", "unrelated"), shares, strict=True):
        for training in ("0", "1"):
            for seed in range(pictures):
                row = dict(group=group, training=training, asked=group, seed=seed)
                row |= dict(method=method, model=model, attack=attack, step=step)
                yield row | {"attack_seed": "0", "hit": float(seed < share * pictures)}


@pytest.fixture
def rows():
    found, intact = [], (0.0, 1.0, 1.0)
    for (method, model), shares in SHARES.items():
        found += lines(method, model, "none", 0, intact)
        for attack in ("HRM-m", "HRM-s", "CLEAN"):
            found += lines(method, model, attack, 0, intact)
        found += lines(method, model, "HRM-m", 50, shares)
        found += lines(method, model, "HRM-s", 50, shares)
        found += lines(method, model, "CLEAN", 50, intact)
    return pd.DataFrame(found)


def results(rows):
    return effect_targets(rows).set_index("target")


def test_the_concept_is_relative_to_plain_unlearning(rows):
    ratio = relative_concept(rows).ratio
    assert ratio["HRM-m", 50, "uce"] == 0
    assert ratio["HRM-s", 50, "esd-f-1"] == pytest.approx(0.5)


def test_a_plain_model_that_does_not_relearn_has_no_ratio(rows):
    never = (rows.method == "uce") & (rows.group == "forget")
    ratio = relative_concept(rows.assign(hit=rows.hit.mask(never, 0.0))).ratio
    assert np.isnan(ratio["HRM-m", 50, "uce"])


def test_losses_are_paired_with_plain_unlearning(rows):
    table = lost_concepts(rows, "related").set_index(["attack", "step", "method"])
    uce = table.loc["HRM-m", 50, "uce"]
    assert uce["meta-unlearned"] == pytest.approx(0.8)
    assert uce.beyond == pytest.approx(0.8)
    assert uce.low < 0.8 < uce.high
    assert table.beyond["HRM-m", 50, "esd-f-1"] == pytest.approx(0.5)
    assert table.beyond["CLEAN", 50, "uce"] == 0


def test_targets_name_the_method_that_decides(rows):
    found = results(rows)
    mean = "HRM-m, 50 steps: concept, meta-unlearned ÷ unlearned, mean of the methods, at most 0.15"
    assert found.result[mean] == pytest.approx(0.1 / 0.6)
    assert found.met[mean] == "✗"
    least = "HRM-s, 50 steps: related lost beyond unlearned, smallest of the methods, at least 0.50"
    assert found.result[least] == "0.5 (ESD-f-1)"
    unrelated = "HRM-m, 50 steps: unrelated lost, largest of the methods, at most 0.10"
    assert (found.result[unrelated], found.met[unrelated]) == ("0.2 (ESD-f-1)", "✗")
    clean = "CLEAN, 50 steps: related lost, largest of the methods, at most 0.05"
    assert found.met[clean] == "✓"


@pytest.mark.parametrize("missing", ["unlearned", "meta-unlearned"])
def test_a_variant_alone_has_no_loss_beyond_the_other(rows, missing):
    assert lost_concepts(rows[rows.model != missing], "related").empty


def test_an_attack_without_its_first_step_is_left_out(rows):
    started = rows[(rows.attack != "HRM-m") | (rows.step > 0)]
    assert set(lost_concepts(started, "related").attack) == {"HRM-s", "CLEAN"}


@pytest.mark.parametrize("attack", ["HRM-m", "HRM-s", "CLEAN"])
def test_targets_without_an_attack_are_left_out(rows, attack):
    assert not any(attack in target for target in results(rows[rows.attack != attack]).index)
    assert len(results(rows[rows.attack == "none"])) == 3
