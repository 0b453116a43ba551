"""Revival, areas, self-destruction; and intervals that cover the truth as often as they say."""

import numpy as np
import pandas as pd
import pytest

from mu.measures.statistics import (
    Revival,
    interval,
    median_relearning_step,
    paired_interval,
    relearning_area,
    relearning_step,
    restricted_mean_relearning,
    self_destruct_index,
)


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([0.0, 0.2, 0.6, 0.9], Revival(50, 25, False)),
        ([0.9, 0.0, 0.0, 0.0], Revival(0, -np.inf, False)),
        ([0.0, 0.5, 0.5, 0.5], Revival(100, 100, True)),
        ([0.0, 0.1, 0.0, 0.51], Revival(100, 50, False)),
        ([0.0, 0.7, 0.1, 0.2], Revival(25, 0, False)),
    ],
)
def test_steps_to_revival(scores, expected):
    """The first step over the threshold, between it and the look before; censored where the curve ends below it."""
    assert relearning_step([0, 25, 50, 100], scores) == expected


def test_steps_to_revival_has_a_threshold():
    assert relearning_step([0, 25, 50], [0.0, 0.2, 0.6], threshold=0.1).step == 25
    assert relearning_step([0, 25, 50], [0.0, 0.2, 0.6], threshold=0.6).censored


@pytest.mark.parametrize(
    "steps, scores, words",
    [
        ([0, 25, 50], [0, float("nan"), 1], r"NaN or infinite values at the steps \[25.0\]"),
        ([0, 50, 50], [0, 1, 1], "the steps of a curve rise"),
        ([0, 25], [0], "2 steps and 1 scores"),
        ([], [], "0 steps and 0 scores"),
    ],
)
def test_a_curve_that_is_none_is_refused(steps, scores, words):
    for measure in (relearning_step, relearning_area):
        with pytest.raises(ValueError, match=words):
            measure(steps, scores)


def test_the_median_of_revivals_knows_what_was_not_seen():
    """Kaplan and Meier by hand: 3 of 5 have come back, at 25, 50 and 100; one was lost at 50, one at 200. S = 4/5, 4/5 · 3/4, then · 1/2."""
    seen = [
        Revival(25, 0, False),
        Revival(50, 25, False),
        Revival(50, 50, True),
        Revival(100, 50, False),
        Revival(200, 200, True),
    ]
    assert median_relearning_step(seen) == 100
    assert (
        median_relearning_step([Revival(200, 200, True)] * 3 + [Revival(50, 25, False)]) == np.inf
        and median_relearning_step([Revival(50, 25, False)]) == 50
    )
    assert median_relearning_step([Revival(0, -np.inf, False)] * 2 + [Revival(50, 50, True)]) == 0


def test_the_restricted_mean_is_the_area_under_the_curve_of_survival():
    runs = [Revival(25, 0, False), Revival(100, 100, True), Revival(75, 50, False)]
    assert restricted_mean_relearning(runs, 100) == pytest.approx(
        (25 + 100 + 75) / 3
    ) and restricted_mean_relearning(runs, 50) == pytest.approx((25 + 50 + 50) / 3)
    with pytest.raises(ValueError, match="up to step 100 only"):
        restricted_mean_relearning(runs, 200)


def test_the_area_under_relearning_is_its_mean_height():
    assert (
        relearning_area([0, 50, 100], [0, 0.5, 1]) == 0.5
        and relearning_area([0, 50, 100], [1, 1, 1]) == 1
        and relearning_area([50, 100], [0, 0]) == 0
    )
    assert relearning_area([0, 10, 100], [0, 1, 1]) == pytest.approx((5 + 90) / 100), (
        "steps are not evenly spaced"
    )
    with pytest.raises(ValueError, match="two steps or more"):
        relearning_area([0], [0.5])


def test_self_destruction_is_what_fine_tuning_alone_does_not_do():
    assert self_destruct_index(1.0, 0.4, 1.0, 0.9) == pytest.approx(0.5) and self_destruct_index(
        0.9, 0.6, 1.0, 0.7
    ) == pytest.approx(0)
    assert self_destruct_index(0.9, 0.9, 0.9, 0.5) == pytest.approx(-0.4), (
        "it survives the attack better than CLEAN"
    )
    for bad in (1.2, -0.1, float("nan")):
        with pytest.raises(ValueError, match="within 0…1"):
            self_destruct_index(0.9, bad, 1.0, 0.9)


# --- intervals


def world(rng, simulations, seeds=14, prompts=20, shift=0.1, spread=1.0, own=0.8):
    """Many tables of two methods at once: pictures that are hits by the luck of the seed, of the prompt and of the picture. (simulations, method, seed, prompt)

    The luck of seed and prompt is partly shared by the methods. Returns the hits and the true difference."""

    def luck(*shape):
        return spread * rng.standard_normal((simulations, *shape))

    both = luck(1, seeds, 1) + luck(1, 1, prompts)
    own = own * (luck(2, seeds, 1) + luck(2, 1, prompts))
    lean = np.array([shift, -shift])[:, None, None]
    hits = rng.random((simulations, 2, seeds, prompts)) < 1 / (1 + np.exp(-(both + own + lean)))
    return hits.astype(float)


def as_table(hits):
    seeds, prompts = hits.shape[-2:]
    s, p = np.meshgrid(np.arange(seeds), np.arange(prompts), indexing="ij")
    return pd.concat(
        [
            pd.DataFrame({"model": m, "seed": s.ravel(), "prompt": p.ravel(), "hit": h.ravel()})
            for m, h in zip("ab", hits, strict=False)
        ],
        ignore_index=True,
    )


def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 made-up studies of 14 seeds and 20 prompts, 95 % intervals; the truth is the mean over all studies."""
    worlds = world(np.random.default_rng(0), 20_000)
    truth, difference = worlds[:, 0].mean(), (worlds[:, 0] - worlds[:, 1]).mean()
    tables = [as_table(hits) for hits in worlds[:400]]
    one = np.array(
        [interval(t[t.model == "a"], resamples=400, seed=i) for i, t in enumerate(tables)]
    )
    two = np.array(
        [paired_interval(t, "a", "b", resamples=400, seed=i) for i, t in enumerate(tables)]
    )

    def inside(found, value):
        return np.mean((found[:, 1] <= value) & (value <= found[:, 2]))

    assert 0.90 <= inside(one, truth) <= 0.985 and 0.90 <= inside(two, difference) <= 0.985

    pictures = [
        t.assign(picture=range(len(t))) for t in tables
    ]  # as if all pictures were independent: this is what the simulation must be able to find out
    naive = np.array(
        [
            interval(t[t.model == "a"], "picture", resamples=200, seed=i)
            for i, t in enumerate(pictures)
        ]
    )
    assert inside(naive, truth) < 0.75


def test_where_seeds_and_prompts_do_the_same_to_both_the_paired_interval_is_too_wide_not_too_narrow():
    worlds = world(np.random.default_rng(2), 20_000, own=0.0)
    difference = (worlds[:, 0] - worlds[:, 1]).mean()
    found = np.array(
        [
            paired_interval(as_table(hits), "a", "b", resamples=400, seed=i)
            for i, hits in enumerate(worlds[:200])
        ]
    )
    assert np.mean((found[:, 1] <= difference) & (difference <= found[:, 2])) >= 0.95
    alone = [
        [np.diff(interval(t[t.model == m], resamples=400, seed=i)[1:])[0] for m in "ab"]
        for i, t in enumerate(map(as_table, worlds[:50]))
    ]
    assert np.diff(found[:50, 1:]).mean() < 0.7 * np.linalg.norm(alone, axis=1).mean(), (
        "even so, pairing pays"
    )


def test_the_paired_difference_is_that_of_the_means_and_changes_its_sign():
    table = as_table(world(np.random.default_rng(1), 1)[0]).sample(
        frac=1, random_state=0
    )  # in any order
    mean = table.groupby("model").hit.mean()
    found, turned = (paired_interval(table, *ab) for ab in ("ab", "ba"))
    assert found[0] == pytest.approx(mean.a - mean.b) and turned == pytest.approx(
        (-found[0], -found[2], -found[1]), abs=0.02
    )
    same = pd.concat([table[table.model == "a"], table[table.model == "a"].assign(model="b")])
    assert paired_interval(same, "a", "b") == (0, 0, 0), "the draws are the same for both"
    assert interval(table, level=0.5)[1:] > interval(table, level=0.99)[1:2] and interval(
        table
    ) == interval(table)


def test_what_cannot_be_paired_or_is_not_judged_is_refused():
    table = as_table(world(np.random.default_rng(1), 1, seeds=2, prompts=3)[0])
    with pytest.raises(ValueError, match="no model 'c'; there are: a, b"):
        paired_interval(table, "a", "c")
    with pytest.raises(
        ValueError, match=r"not paired, 1 of 6 are of one only, as \{'seed': .*0.*'prompt': .*0"
    ):
        paired_interval(table.iloc[1:], "a", "b")
    with pytest.raises(ValueError, match="different numbers of pictures of one seed and prompt"):
        paired_interval(pd.concat([table, table.iloc[:1]]), "a", "b")
    table.loc[1, "hit"] = float("nan")
    for measure in (lambda: paired_interval(table, "a", "b"), lambda: interval(table)):
        with pytest.raises(ValueError, match="NaN or infinite: judge these pictures"):
            measure()
    with pytest.raises(ValueError, match="there is one seed only .*leave it out"):
        interval(table[table.seed == 1])
    with pytest.raises(ValueError, match="no attack_seed; it has: model, seed, prompt, hit"):
        interval(table, over=("attack_seed", "prompt"))
