"""Acceptance targets: what was measured, and whether each target is met."""

import pandas as pd
import pytest

from mu.reports.targets import cost_figure, relearning_table, targets_by_seed, targets_table

LOST = "related lost in 100 steps of attack, meta-unlearned − unlearned, at least 0.50"
REVIVAL = "steps to revival at learning rate 6e-05, meta-unlearned ÷ unlearned, at least 4"
ORIGINAL = "original: concept recognised, at least 0.95"


def evaluate(rows, table=targets_table):
    parts = (rows[rows.attack == attack] for attack in ("none", "HRM-m", "CLEAN"))
    return table(*parts, 6e-5).set_index("target")


def test_targets_of_one_method(uce):
    table = evaluate(uce)
    relative = "concept after 100 steps, meta-unlearned ÷ unlearned, at most 0.15"
    assert table.result[relative] == pytest.approx(0.2 / 0.85)
    assert table.result[LOST] == pytest.approx(0.5)
    assert table.met[ORIGINAL] == "✓"
    assert "meta-unlearned: concept after 100 steps of CLEAN, at most 0.05" in table.index


def test_relearning_is_inconclusive_if_it_was_not_evaluated_long_enough(uce):
    table = relearning_table(uce[uce.attack == "HRM-m"]).set_index("model")
    assert table.attacks["unlearned"] == 2
    assert table.relearned["unlearned"] == 2
    assert table["steps to revival"]["meta-unlearned"] == "> 100"
    assert evaluate(uce).met[REVIVAL] == "?"


def test_targets_are_counted_by_seed(uce):
    table = evaluate(uce, targets_by_seed)
    assert table.result.equals(evaluate(uce).result)
    assert table["met by single trainings"][ORIGINAL] == "2 of 2"


def test_a_mean_that_one_training_carries_is_visible(uce):
    lost = (
        (uce.model == "meta-unlearned")
        & (uce.attack == "HRM-m")
        & (uce.step == 100)
        & (uce.group == "related")
    )
    hit = uce.hit.mask(lost & (uce.training == "0"), 0)  # all of them
    kept = hit[lost & (uce.training == "1") & (hit == 0)].index[:1]  # one more than before
    hit[kept] = 1
    table = evaluate(uce.assign(hit=hit), targets_by_seed)
    assert table.met[LOST] == "✓"
    assert table["met by single trainings"][LOST] == "1 of 2"


def test_a_censored_relearning_step_gives_a_lower_bound(results, uce):
    attacked = uce[uce.attack == "HRM-m"]
    early = (attacked.model == "unlearned") & attacked.group.eq("forget") & (attacked.step == 50)
    attacked = attacked.assign(hit=attacked.hit.mask(early, 1))
    attacked = pd.concat([attacked, attacked[attacked.step == 100].assign(step=200)])
    before = results.rows[results.rows.attack == "none"]
    table = targets_table(before, attacked, attacked[:0], 6e-5).set_index("target")
    assert table.result[REVIVAL] == "4 at least: not back in 200"
    assert table.met[REVIVAL] == "✓"


def test_the_cost_figure_has_one_row_per_model(uce):
    fig = cost_figure(uce[uce.attack == "HRM-m"])
    labels = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert labels == ["meta-unlearned", "unlearned"]
    assert len(fig.axes) == 4
