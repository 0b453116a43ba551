"""Relearning steps, areas, self-destruction, and the coverage of the intervals."""

import numpy as np
import pandas as pd
import pytest

from mu.measures.statistics import (
    Relearning,
    interval,
    median_relearning_step,
    paired_differences,
    paired_interval,
    relearning_area,
    relearning_step,
    self_destruct_index,
)


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([0.0, 0.2, 0.6, 0.9], Relearning(50, 25, False)),
        ([0.9, 0.0, 0.0, 0.0], Relearning(0, -np.inf, False)),
        ([0.0, 0.5, 0.5, 0.5], Relearning(100, 100, True)),
        ([0.0, 0.1, 0.0, 0.51], Relearning(100, 50, False)),
        ([0.0, 0.7, 0.1, 0.2], Relearning(25, 0, False)),
    ],
)
def test_relearning_step(scores, expected):
    """The first step above the threshold and the one before; censored if there is none."""
    assert relearning_step([0, 25, 50, 100], scores) == expected


def test_relearning_step_has_a_threshold():
    assert relearning_step([0, 25, 50], [0.0, 0.2, 0.6], threshold=0.1).step == 25
    assert relearning_step([0, 25, 50], [0.0, 0.2, 0.6], threshold=0.6).censored


@pytest.mark.parametrize(
    "steps, scores, message",
    [
        ([0, 25, 50], [0, float("nan"), 1], r"scores at the steps \[25.0\] are NaN or infinite"),
        ([0, 50, 50], [0, 1, 1], "steps must increase"),
        ([0, 25], [0], "2 steps and 1 scores"),
        ([], [], "0 steps and 0 scores"),
    ],
)
def test_invalid_curves_are_refused(steps, scores, message):
    for measure in (relearning_step, relearning_area):
        with pytest.raises(ValueError, match=message):
            measure(steps, scores)


def test_median_relearning_step_handles_censoring():
    """Kaplan-Meier by hand: 3 of 5 runs relearn, at 25, 50, 100; two are censored, at 50 and 200.

    S = 4/5, then 4/5 · 3/4, then · 1/2.
    """
    runs = [
        Relearning(25, 0, False),
        Relearning(50, 25, False),
        Relearning(50, 50, True),
        Relearning(100, 50, False),
        Relearning(200, 200, True),
    ]
    assert median_relearning_step(runs) == 100
    one, censored = Relearning(50, 25, False), Relearning(200, 200, True)
    assert median_relearning_step([censored] * 3 + [one]) == np.inf
    assert median_relearning_step([one]) == 50
    at_start = Relearning(0, -np.inf, False)
    assert median_relearning_step([at_start] * 2 + [Relearning(50, 50, True)]) == 0


def test_relearning_area_is_the_mean_height_of_the_curve():
    assert relearning_area([0, 50, 100], [0, 0.5, 1]) == 0.5
    assert relearning_area([0, 50, 100], [1, 1, 1]) == 1
    assert relearning_area([50, 100], [0, 0]) == 0
    uneven = relearning_area([0, 10, 100], [0, 1, 1])
    assert uneven == pytest.approx((5 + 90) / 100)
    with pytest.raises(ValueError, match="at least two steps"):
        relearning_area([0], [0.5])


def test_self_destruct_index_subtracts_the_loss_of_the_reference():
    assert self_destruct_index(1.0, 0.4, 1.0, 0.9) == pytest.approx(0.5)
    assert self_destruct_index(0.9, 0.6, 1.0, 0.7) == pytest.approx(0)
    more_robust_than_clean = self_destruct_index(0.9, 0.9, 0.9, 0.5)
    assert more_robust_than_clean == pytest.approx(-0.4)
    for bad in (1.2, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"within \[0, 1\]"):
            self_destruct_index(0.9, bad, 1.0, 0.9)


# --- intervals


def simulate(rng, simulations, seeds=14, prompts=20, shift=0.1, spread=1.0, own=0.8):
    """Hits (simulations, method, seed, prompt) of two methods, with effects of seed and prompt.

    The two methods share a part of these effects; `own` scales the rest.
    """

    def effect(*shape):
        return spread * rng.standard_normal((simulations, *shape))

    both = effect(1, seeds, 1) + effect(1, 1, prompts)
    own = own * (effect(2, seeds, 1) + effect(2, 1, prompts))
    shifts = np.array([shift, -shift])[:, None, None]
    probability = 1 / (1 + np.exp(-(both + own + shifts)))
    hits = rng.random((simulations, 2, seeds, prompts)) < probability
    return hits.astype(float)


def as_table(hits):
    seeds, prompts = hits.shape[-2:]
    s, p = np.meshgrid(np.arange(seeds), np.arange(prompts), indexing="ij")
    columns = {"seed": s.ravel(), "prompt": p.ravel()}
    parts = [
        pd.DataFrame({"model": model, **columns, "hit": one.ravel()})
        for model, one in zip("ab", hits, strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def coverage(found, truth):
    low, high = found[:, 1], found[:, 2]
    return np.mean((low <= truth) & (truth <= high))


def paired(tables):
    intervals = [paired_interval(t, "a", "b", resamples=400, seed=i) for i, t in enumerate(tables)]
    return np.array(intervals)


def of_model(table, name):
    return table[table.model == name]


def test_intervals_have_their_nominal_coverage():
    """400 simulated studies of 14 seeds and 20 prompts, 95 % intervals."""
    studies = simulate(np.random.default_rng(0), 20_000)
    truth, difference = studies[:, 0].mean(), (studies[:, 0] - studies[:, 1]).mean()
    tables = [as_table(hits) for hits in studies[:400]]
    single = [interval(of_model(t, "a"), resamples=400, seed=i) for i, t in enumerate(tables)]
    assert 0.90 <= coverage(np.array(single), truth) <= 0.985
    assert 0.90 <= coverage(paired(tables), difference) <= 0.985

    # the simulation must detect an interval that takes all images for independent
    naive = []
    for i, table in enumerate(tables):
        images = of_model(table.assign(picture=range(len(table))), "a")
        naive.append(interval(images, "picture", resamples=200, seed=i))
    assert coverage(np.array(naive), truth) < 0.75


def test_paired_intervals_are_conservative_if_effects_are_fully_shared():
    studies = simulate(np.random.default_rng(2), 20_000, own=0.0)
    difference = (studies[:, 0] - studies[:, 1]).mean()
    tables = [as_table(hits) for hits in studies[:200]]
    found = paired(tables)
    assert coverage(found, difference) >= 0.95
    widths = []
    for i, table in enumerate(tables[:50]):
        both = [interval(of_model(table, name), resamples=400, seed=i) for name in "ab"]
        widths.append([high - low for _, low, high in both])
    unpaired = np.linalg.norm(widths, axis=1).mean()
    assert np.diff(found[:50, 1:]).mean() < 0.7 * unpaired, "pairing makes the interval narrower"


def test_paired_interval_is_the_difference_of_means_and_antisymmetric():
    table = as_table(simulate(np.random.default_rng(1), 1)[0])
    table = table.sample(frac=1, random_state=0)  # any order of rows
    mean = table.groupby("model").hit.mean()
    found, reversed_ = paired_interval(table, "a", "b"), paired_interval(table, "b", "a")
    assert found[0] == pytest.approx(mean.a - mean.b)
    assert reversed_ == pytest.approx((-found[0], -found[2], -found[1]), abs=0.02)
    same = pd.concat([of_model(table, "a"), of_model(table, "a").assign(model="b")])
    assert paired_interval(same, "a", "b") == (0, 0, 0), "both are resampled together"
    assert interval(table, level=0.5)[1:] > interval(table, level=0.99)[1:2]
    assert interval(table) == interval(table)


def test_unpaired_or_unscored_rows_are_refused():
    table = as_table(simulate(np.random.default_rng(1), 1, seeds=2, prompts=3)[0])
    with pytest.raises(ValueError, match="unknown model 'c': allowed are a, b"):
        paired_interval(table, "a", "c")
    message = r"not paired: 1 of 6 .* one of them only, such as \{'seed': .*0.*'prompt': .*0"
    with pytest.raises(ValueError, match=message):
        paired_interval(table.iloc[1:], "a", "b")
    with pytest.raises(ValueError, match="numbers of images per seed and prompt differ"):
        paired_interval(pd.concat([table, table.iloc[:1]]), "a", "b")
    table.loc[1, "hit"] = float("nan")
    for measure in (lambda: paired_interval(table, "a", "b"), lambda: interval(table)):
        with pytest.raises(ValueError, match="NaN or infinite: score these images"):
            measure()
    with pytest.raises(ValueError, match="one seed only .*remove it"):
        interval(table[table.seed == 1])
    with pytest.raises(ValueError, match="no attack_seed; it has: model, seed, prompt, hit"):
        interval(table, over=("attack_seed", "prompt"))


def simulate_rows(run, group, prompts, share, rng):
    row = {"run": run, "group": group}
    return [
        row | {"prompt": f"{group}{p}", "seed": seed, "hit": int(rng.random() < share)}
        for p in range(prompts)
        for seed in range(4)
    ]


def test_models_are_compared_image_by_image():
    rng, rows = np.random.default_rng(0), []
    for run, forget, related in (("original", 1, 1), ("meta", 0, 0.5)):
        rows += simulate_rows(run, "forget", 1, forget, rng)
        rows += simulate_rows(run, "related", 6, related, rng)
    table, names = pd.DataFrame(rows), ["original", "meta"]
    found = paired_differences(table, names).set_index("group")
    difference = found["minus original"]
    assert difference["forget"] == -1
    assert found.over["forget"] == "seed"
    assert found.over["related"] == "prompt and seed"
    mean = table.groupby(["run", "group"]).hit.mean()
    expected = mean["meta", "related"] - mean["original", "related"]
    assert difference["related"] == pytest.approx(expected)
    assert found.low["related"] < difference["related"] < found.high["related"]
    single = paired_differences(table[(table.seed == 0) & (table.group == "forget")], names)
    assert single.over[0] == "one picture"
    assert np.isnan(single.low[0])
