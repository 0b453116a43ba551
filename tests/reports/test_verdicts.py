"""Sentences on attacks: where the defence fails, and which attacks prove nothing."""

import pandas as pd
import pytest
from attack_files import SCORES, write_attacks

from mu.measures.attack_results import read_attacks
from mu.measures.comparison import attack_table, gains
from mu.reports.verdicts import destruction_verdict, verdict


def test_the_first_sentence_names_the_failures_of_the_defence(tmp_path):
    rows, budget, _ = read_attacks(write_attacks(tmp_path))
    first, second, third = verdict(attack_table(rows, budget), gains(rows))
    assert first.startswith("Meta-unlearning fails against 1 of 3 attacks")
    assert "sly (80% after 100 steps). The strongest is sly, 95 % interval" in first
    assert "full" not in first
    assert "full (90% after 50 steps)" in second
    assert "say nothing about the defence: words" in second
    assert "under 1 of 3 attacks: full." in third

    def sentences(part):
        return verdict(attack_table(part, budget), gains(part))

    harmless = sentences(rows[rows.name != "sly"])
    assert harmless[0].startswith("None of 2 attacks brings the concept back")
    assert len(sentences(rows[rows.model == "meta-unlearned"])) == 1
    message = "no attack on a model 'meta-unlearned': the table has unlearned"
    with pytest.raises(ValueError, match=message):
        sentences(rows[rows.model == "unlearned"])


def test_an_attack_that_fails_on_the_plain_model_may_work_on_another(tmp_path):
    edited = {
        "words": {"edited": {0: 0.0, 50: 0.7}},
        "full": {"edited": {0: 0.0, 50: 0.1}},
        "merged": {"edited": {0: 1.0, 50: 1.0}, "unlearned": {0: 0.1, 50: 0.2}},
    }
    both = {name: SCORES.get(name, {}) | edited.get(name, {}) for name in {**SCORES, **edited}}
    rows, budget, _ = read_attacks(write_attacks(tmp_path, both))
    second = verdict(attack_table(rows, budget), gains(rows))[1]
    assert "say nothing about the defence: merged, words." in second
    assert "merged on edited (100%); words on edited (70%)" in second


def test_clear_self_destruction_is_named_first():
    destroyed = pd.DataFrame(
        {
            "attack": ["full", "full", "sly", "sly"],
            "model": ["meta-unlearned", "unlearned"] * 2,
            "self-destruct index": [0.6, 0.1, 0.6, 0.1],
            "low": [0.1, 0.2, 0.1, 0.1],
        }
    )
    sentence = destruction_verdict(destroyed)
    names = "full (60%), sly (60%)"
    assert sentence.endswith(
        f"under 2 of 2 attacks: {names}; not clearly, or not at all, under: none."
    )
    assert destruction_verdict(destroyed, "ascent only") == ""
    assert f"not at all, under: {names}." in destruction_verdict(destroyed.assign(low=-0.1))
