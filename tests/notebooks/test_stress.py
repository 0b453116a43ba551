"""A small version of `make stress`: two kills."""

import pytest
from stress import stress

pytestmark = pytest.mark.notebooks


def test_killed_notebooks_end_with_the_same_results(tmp_path):
    outcomes = list(stress(tmp_path, 2, ("21_meta_unlearn", "30_attack_finetune"), seed=1))
    assert [one.notebook for one in outcomes] == ["21_meta_unlearn", "30_attack_finetune"]
    assert [one.signal for one in outcomes] == ["SIGKILL", "SIGTERM"]
    assert all(0 < one.seconds < one.of + 60 for one in outcomes)
    assert [one.faults for one in outcomes] == [[], []]
