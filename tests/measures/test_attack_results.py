"""Reading attacks of one protocol, and what an attacker with a limited budget achieves."""

import pandas as pd
import pytest
from attack_files import SCORES, edit_attack, write_attacks

from mu.measures.attack_results import best_restart, read_attacks, trained_alike, within_budget
from mu.measures.comparison import attack_table, self_destruction


@pytest.fixture
def found(tmp_path):
    return read_attacks(write_attacks(tmp_path))


@pytest.mark.parametrize(
    "fact, other", [("sampling_steps", 25), ("judge", "another"), ("probe_seeds", "1,1")]
)
def test_attacks_of_two_protocols_are_refused(tmp_path, fact, other):
    write_attacks(tmp_path)
    write_attacks(tmp_path, {"late": SCORES["full"]}, **{fact: other})
    with pytest.raises(ValueError, match=f"protocols differ.*{fact} is"):
        read_attacks(tmp_path)
    assert len(read_attacks(tmp_path, ["full", "sly"])[2]) == 2


def test_a_missing_attack_is_named_with_the_available_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="no attack at all"):
        read_attacks(tmp_path)
    write_attacks(tmp_path)
    with pytest.raises(FileNotFoundError, match="no attack other: .*full, sly, words"):
        read_attacks(tmp_path, ["full", "other"])


def test_an_attack_without_step_0_is_refused(tmp_path):
    write_attacks(tmp_path, {"late": {"unlearned": {50: 0.5, 100: 0.6}}})
    with pytest.raises(ValueError, match="late was not evaluated before the attack: add step 0"):
        read_attacks(tmp_path, ["late"])


def test_a_model_retrained_between_two_attacks_is_refused(tmp_path):
    write_attacks(tmp_path, {"one": SCORES["full"]}, weights={"unlearned-0": "a (1)"})
    write_attacks(tmp_path, {"two": SCORES["full"]}, weights={"unlearned-0": "a (2)"})
    message = r"unlearned-0 is not the same model in one and two \(a \(1\), a \(2\)\)"
    with pytest.raises(ValueError, match=message):
        read_attacks(tmp_path, ["one", "two"])


def test_related_images_may_have_no_score(tmp_path):
    def remove_score(row):
        if row["group"] == "related":
            row["hit"] = float("nan")

    edit_attack(write_attacks(tmp_path), "full", remove_score)
    rows, budget, _ = read_attacks(tmp_path, ["full"])
    assert attack_table(rows, budget).related.isna().all()
    assert self_destruction(rows, rows).empty


def test_concept_images_without_a_score_are_refused(tmp_path):
    def remove_score(row):
        if row["group"] == "forget" and (row["run"], row["step"]) == ("unlearned-0", 0):
            row["hit"] = float("nan") if row["seed"] == 3 else row["hit"]

    edit_attack(write_attacks(tmp_path), "sly", remove_score)
    with pytest.raises(ValueError, match="1 images of 'sly' have no score"):
        read_attacks(tmp_path)


def test_only_attacks_trained_as_clean_are_compared_with_it():
    clean = {"kind": "fine-tuning", "subset": "f", "rank": 16, "lr": 6e-5}
    clean |= {"optimizer": "adam", "batch_size": 8}
    cards = {
        "full": clean | {"others": "x"},
        "fast": clean | {"lr": 2e-4},
        "words": {"lr": 6e-5},
    }
    assert trained_alike(cards, clean) == ["full"]


def test_the_best_restart_costs_as_much_as_all_restarts(found):
    rows, budget, _ = found
    worse, more = rows.assign(attack_seed=1, hit=0), budget.assign(attack_seed=1)
    best, costs = best_restart(pd.concat([rows, worse]), pd.concat([budget, more]), ["sly"])

    def of_sly(table):
        return table[table.name == "sly"].reset_index(drop=True)

    pd.testing.assert_frame_equal(of_sly(rows), of_sly(best), check_dtype=False)
    spent, single = of_sly(costs), of_sly(budget)
    assert spent.seconds.max() == 2 * single.seconds.max()
    assert spent.images.max() == 12
    assert len(spent) == len(single)
    of_full = rows[rows.name == "full"]
    assert len(best[best.name == "full"]) == 2 * len(of_full), "other attacks keep both seeds"


@pytest.mark.parametrize(
    "limits, steps",
    [
        ({}, [0, 50, 100]),
        ({"steps": 60}, [0, 50]),
        ({"seconds": 5}, [0, 50]),
        ({"images": 11}, [0]),
        ({"images": 12, "seconds": 1}, [0]),
    ],
)
def test_a_budget_limits_the_steps(found, limits, steps):
    rows, budget = within_budget(*found[:2], **limits)
    assert sorted(rows.step.unique()) == sorted(budget.step.unique()) == steps
    assert len(rows) == len(found[0]) * len(steps) // 3
    table = attack_table(rows, budget).set_index(["attack", "model"])
    peaks = {0: 0, 50: 0.3, 100: 0.8}
    assert table.peak[("sly", "meta-unlearned")] == peaks[steps[-1]]
