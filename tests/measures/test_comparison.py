"""Attacks compared: peaks, intervals, gains, the strongest, and self-destruction."""

import numpy as np
import pandas as pd
import pytest
from attack_files import SCORES, edit_attack, write_attacks

from mu.measures.attack_results import read_attacks
from mu.measures.comparison import (
    attack_table,
    gains,
    mean_interval,
    self_destruction,
    strongest,
    working,
)
from mu.measures.statistics import interval, student_interval

Z2 = 1.959964**2


@pytest.fixture
def found(tmp_path):
    return read_attacks(write_attacks(tmp_path))


def test_each_attack_is_evaluated_at_its_own_best_step(found):
    rows, budget, _ = found
    table = attack_table(rows, budget).set_index(["attack", "model"])
    assert len(table) == 6
    assert sorted(rows.training.unique()) == ["0", "1"]
    one = table.loc[("full", "unlearned")]
    assert (one.start, one.peak, one.step, one.revived) == (0, 0.9, 50, 50)
    assert one.low < 0.9 <= one.high
    assert one.area == pytest.approx((0.45 * 50 + 0.75 * 50) / 100)
    assert one.related == pytest.approx(0.9)
    assert np.isnan(one.unrelated)
    assert (one.images, one.passes, one.seconds) == (12, 50, 5)
    other = table.loc[("full", "meta-unlearned")]
    assert other.step == 100
    assert other.revived == float("inf")
    at_start = table.loc[("words", "unlearned")]
    assert at_start.step == 0
    assert at_start.images == 0


def test_the_strongest_attack_on_each_model(found):
    best = strongest(attack_table(*found[:2]))
    assert best.attack.to_dict() == {"unlearned": "full", "meta-unlearned": "sly"}
    assert best.peak["meta-unlearned"] == 0.8


def test_gains_are_paired_differences_of_the_peaks(found):
    gain = gains(found[0]).set_index("attack")
    assert gain.gain.to_dict() == pytest.approx({"full": 0.7, "sly": -0.1, "words": 0.2})
    assert gain.low["full"] > 0
    assert (gain.low <= gain.gain).all()
    assert (gain.gain <= gain.high).all()
    assert gains(found[0][found[0].model == "unlearned"]).empty


def test_trainings_with_different_numbers_are_not_paired(found):
    rows = found[0][(found[0].name == "full") & ~found[0].run.eq("meta-1")]
    assert gains(rows)["paired by"].tolist() == ["seed"]


def test_an_attack_works_if_its_interval_is_above_the_unattacked_score(tmp_path):
    """An attack that fails on the plain model may work on another."""
    edited = {
        "words": {"edited": {0: 0.0, 50: 0.7}},
        "full": {"edited": {0: 0.0, 50: 0.1}},
        "merged": {"edited": {0: 1.0, 50: 1.0}, "unlearned": {0: 0.1, 50: 0.2}},
    }
    both = {name: SCORES.get(name, {}) | edited.get(name, {}) for name in {**SCORES, **edited}}
    rows, budget, _ = read_attacks(write_attacks(tmp_path, both))
    works = working(attack_table(rows, budget))
    assert "unlearned" in works["full"]
    assert "edited" not in works["full"]
    assert works["words"] == {"edited": 0.7}
    assert works["merged"] == {"edited": 1.0}, "its own start is not the unattacked score"


def test_a_prompt_search_must_beat_random_prompts(tmp_path):
    words = {
        "random": {"unlearned": {0: 0.0, 50: 0.4}},
        "search": {"unlearned": {0: 0.0, 50: 0.5}},
        "better": {"unlearned": {0: 0.0, 50: 1.0}},
    }
    table = attack_table(*read_attacks(write_attacks(tmp_path, words, attack="prompt"))[:2])
    assert table["by words"].all()
    assert working(table) == {"random": {}, "search": {}, "better": {"unlearned": 1.0}}
    assert set(working(table, floor="none")["search"]) == {"unlearned"}


def test_few_trainings_make_a_wide_interval(tmp_path):
    """A bootstrap over two different trainings would draw the same one twice half of the time."""

    def lower(row):
        if (row["group"], row["step"], row["run"]) == ("forget", 100, "unlearned-1"):
            row["hit"] = int(row["seed"] < 4)

    edit_attack(write_attacks(tmp_path), "full", lower)
    rows = read_attacks(tmp_path, ["full"])[0]
    part = rows[(rows.step == 100) & (rows.model == "unlearned") & (rows.group == "forget")]
    _, low, high = interval(part, ["training", "seed"])
    means = part.groupby("training").hit.mean()
    student = student_interval(means)
    assert student[1] < low
    assert high < student[2]
    assert student[0] == pytest.approx(means.mean())
    assert mean_interval(part)[1:] == (max(student[1], 0), min(student[2], 1))
    expected = 0.4 - 4.302653 * 0.2 / 3**0.5
    assert student_interval([0.2, 0.4, 0.6])[1] == pytest.approx(expected)
    assert gains(rows)["paired by"][0] == "training, seed"
    _, low, high = mean_interval(part.assign(hit=1))
    assert low == pytest.approx(20 / (20 + Z2)), "Wilson's interval if all values agree"
    assert high == 1
    with pytest.raises(ValueError, match="two or more"):
        student_interval([0.5])


def test_identical_differences_have_wilsons_interval():
    """Wilson's interval of 20 misses of 20 ends at 0.161; differences of 0 may have either sign."""
    pairs = pd.DataFrame({"training": "0", "asked": "a", "seed": range(20), "index": 0.0})

    def signed(values):
        return mean_interval(pairs.assign(index=values), "index", signed=True)

    edge = Z2 / (20 + Z2)
    assert signed(0.0) == pytest.approx((0, -edge, edge))
    assert signed(1.0) == pytest.approx((1, 1 - edge, 1))
    assert signed(-1.0) == pytest.approx((-1, -1, edge - 1))
    assert np.isnan(signed(-0.5)[1:]).all(), "half a hit is not a hit"
    mixed = pairs.assign(index=[1.0, -1.0] * 10)
    assert signed([1.0, -1.0] * 10) == interval(mixed, ["seed"], "index")


def study_rows(hits):
    """Rows of hits (model, training, image) at one step of one attack."""
    facts = {"name": "x", "group": "forget", "attack_seed": 0, "asked": "a", "step": 50}
    models = ("unlearned", "meta-unlearned")
    rows = [
        facts | {"model": models[i], "training": str(training), "seed": seed, "hit": hit}
        for (i, training, seed), hit in np.ndenumerate(hits)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_intervals_over_three_trainings_have_their_nominal_coverage(spread):
    """Three trainings of two equal models, 16 images each: coverage of the truth and of gain 0."""
    rng, studies = np.random.default_rng(0), 150
    logits = spread * rng.standard_normal((200_000, 1)) + 0.7 * rng.standard_normal((1, 16))
    truth = (1 / (1 + np.exp(-logits))).mean()
    covered, covered_by_bootstrap, no_gain = [], [], []
    for _ in range(studies):
        images = 0.7 * rng.standard_normal(16)
        p = 1 / (1 + np.exp(-(spread * rng.standard_normal((2, 3, 1)) + images)))
        rows = study_rows((rng.random((2, 3, 16)) < p).astype(int))
        one = rows[rows.model == "unlearned"]
        _, low, high = mean_interval(one)
        covered.append(low <= truth <= high)
        _, low, high = interval(one, ["training", "seed"], resamples=300)
        covered_by_bootstrap.append(low <= truth <= high)
        (gain,) = gains(rows).itertuples()
        no_gain.append(gain.low <= 0 <= gain.high)
    assert np.mean(covered) >= 0.91
    assert np.mean(no_gain) >= 0.93
    if spread == 2:
        assert np.mean(covered_by_bootstrap) < 0.9, "the simulation detects narrow intervals"


def test_self_destruction_is_the_loss_beyond_that_under_clean(found, tmp_path):
    models = ("unlearned", "meta-unlearned")
    scores = {"clean": {model: {0: 0.0, 100: 0.0} for model in models}}
    clean = read_attacks(write_attacks(tmp_path / "clean", scores, attack="clean"))[0]
    clean.loc[(clean.group == "related") & (clean.step == 100), "hit"] = 1
    table = self_destruction(found[0], clean).set_index(["attack", "model"])
    index = table["self-destruct index"]
    assert index[("full", "meta-unlearned")] == pytest.approx(0.6)
    assert index[("full", "unlearned")] == pytest.approx(0.1)
    assert set(table.after) == {100}
    assert "words" not in table.index.get_level_values(0)


def curve(run, seed, group, hits):
    facts = {"name": "x", "attack": "forget", "training": "", "asked": "a cat", "seed": 0}
    facts |= {"run": run, "attack_seed": seed, "group": group}
    return [facts | {"step": s, "hit": hit} for s, hit in zip((0, 50, 100), hits, strict=True)]


def test_each_run_can_have_its_own_row():
    """The median relearning step over attack seeds, the area, and the self-destruct index."""
    rows = pd.DataFrame(
        curve("plain", 0, "forget", (0, 1, 1))
        + curve("plain", 1, "forget", (0, 0, 1))
        + curve("meta", 0, "forget", (0, 0, 0))
        + curve("meta", 1, "forget", (0, 0, 0))
        + curve("plain", 0, "related", (1, 1, 1))
        + curve("meta", 0, "related", (1, 0.5, 0.25))
    )
    clean = pd.DataFrame(
        curve("meta", 0, "related", (1, 1, 0.75)) + curve("plain", 0, "related", (1, 1, 1))
    )
    budget = rows.assign(images=0, passes=0, seconds=0.0)
    table = attack_table(rows, budget, by="run").set_index("run")
    assert table.revived.to_dict() == {"plain": 50, "meta": np.inf}
    assert table.area["plain"] == pytest.approx((0.75 + 0.25) / 2)
    assert table.area["meta"] == 0
    strict = attack_table(rows, budget, threshold=1.0, by="run").set_index("run")
    assert strict.revived["plain"] == np.inf

    lost = self_destruction(rows, clean, by="run").set_index("run")
    assert lost["self-destruct index"].to_dict() == pytest.approx({"plain": 0, "meta": 0.5})
    assert (lost.after == 100).all()
    earlier = self_destruction(rows, clean[clean.step < 100], by="run").set_index("run")
    assert earlier["self-destruct index"]["meta"] == pytest.approx(0.5)
