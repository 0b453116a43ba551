"""All attacks in one table: peaks, intervals, the strongest, and words that say where the defence fails."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mu.measures.comparison import (
    against,
    best_try,
    destruction_verdict,
    gains,
    mean_interval,
    read_attacks,
    self_destruction,
    strongest,
    trained_alike,
    verdict,
    within,
    working,
)
from mu.measures.statistics import interval, student_interval
from mu.reports.plots import dots, every_curve

FACTS = {
    "model": "m (1)",
    "sets": "s",
    "judge": "j",
    "probe_seeds": "8,1",
    "sampling_steps": 15,
    "sampling_guidance": 5.0,
}
# name → model → step → share of 10 pictures, of two trainings each
SCORES = {
    "full": {
        "unlearned": {0: 0.0, 50: 0.9, 100: 0.6},
        "meta-unlearned": {0: 0.0, 50: 0.1, 100: 0.2},
    },
    "sly": {
        "unlearned": {0: 0.1, 50: 0.4, 100: 0.7},
        "meta-unlearned": {0: 0.0, 50: 0.3, 100: 0.8},
    },
    "words": {
        "unlearned": {0: 0.2, 50: 0.1, 100: 0.0},
        "meta-unlearned": {0: 0.0, 50: 0.0, 100: 0.0},
    },
}
RELATED = {"unlearned": 0.9, "meta-unlearned": 0.4, "edited": 1.0}


def write(folder, scores=SCORES, attack="forget", **facts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, models in scores.items():
        rows, budget = [], []
        for model, steps in models.items():
            for training in (0, 1):
                run = {
                    "model": model,
                    "run": f"{model.split('-')[0]}-{training}",
                    "attack": attack,
                    "name": name,
                    "lr": 1e-4,
                    "attack_seed": 0,
                }
                for step, share in steps.items():
                    rows += [
                        run
                        | {
                            "step": step,
                            "group": "forget",
                            "prompt": "a cat",
                            "seed": i,
                            "hit": int(i < round(10 * share)),
                        }
                        for i in range(10)
                    ]
                    if name != "words":
                        rows += [
                            run
                            | {
                                "step": step,
                                "group": "related",
                                "prompt": f"p{i}",
                                "seed": 0,
                                "hit": int(step == 0 or i < round(10 * RELATED[model])),
                            }
                            for i in range(10)
                        ]
                    budget.append(
                        run
                        | {
                            "step": step,
                            "images": 12 * bool(step),
                            "passes": step,
                            "seconds": step / 10,
                        }
                    )
        (folder / f"{name}.json").write_text(
            json.dumps({"rows": rows, "budget": budget, "protocol": FACTS | facts})
        )
    return folder


@pytest.fixture
def found(tmp_path):
    return read_attacks(write(tmp_path))


def test_each_attack_is_judged_at_its_own_best_step(found):
    rows, budget, _ = found
    table = against(rows, budget).set_index(["attack", "model"])
    assert len(table) == 6 and sorted(rows.training.unique()) == ["0", "1"]
    one = table.loc[("full", "unlearned")]
    assert (one.start, one.peak, one.step, one.revived) == (
        0,
        0.9,
        50,
        50,
    ) and one.low < 0.9 <= one.high
    assert (
        one.area == pytest.approx((0.45 * 50 + 0.75 * 50) / 100)
        and one.related == pytest.approx(0.9)
        and np.isnan(one.unrelated)
    )
    assert (one.images, one.passes, one.seconds) == (12, 50, 5)
    assert table.loc[("full", "meta-unlearned")].step == 100 and table.loc[
        ("full", "meta-unlearned")
    ].revived == float("inf")
    assert (
        table.loc[("words", "unlearned")].step == 0
        and table.loc[("words", "unlearned")].images == 0
    )


def test_the_strongest_is_named_for_each_model(found):
    best = strongest(against(*found[:2]))
    assert (
        best.attack.to_dict() == {"unlearned": "full", "meta-unlearned": "sly"}
        and best.peak["meta-unlearned"] == 0.8
    )


def test_gains_are_paired_differences_of_the_peaks(found):
    gain = gains(found[0]).set_index("attack")
    assert gain.gain.to_dict() == pytest.approx({"full": 0.7, "sly": -0.1, "words": 0.2})
    assert gain.low["full"] > 0 and (gain.low <= gain.gain).all() and (gain.gain <= gain.high).all()
    assert gains(found[0][found[0].model == "unlearned"]).empty


def test_the_first_sentence_says_where_the_defence_fails(found):
    rows, budget, _ = found
    first, second, third = verdict(against(rows, budget), gains(rows))
    assert (
        first.startswith("Meta-unlearning fails against 1 of 3 attacks")
        and "sly (80% after 100 steps). The strongest is sly, 95 % interval" in first
        and "full" not in first
    )
    assert "full (90% after 50 steps)" in second and "show nothing of the defence: words" in second
    assert "under 1 of 3 attacks: full." in third
    harmless = rows[rows.name != "sly"]
    assert verdict(against(harmless, budget), gains(harmless))[0].startswith(
        "None of 2 attacks brings the concept back"
    )
    alone = rows[rows.model == "meta-unlearned"]
    assert len(verdict(against(alone, budget), gains(alone))) == 1
    with pytest.raises(
        ValueError, match="no attack on a model 'meta-unlearned': the table has unlearned"
    ):
        plain = rows[rows.model == "unlearned"]
        verdict(against(plain, budget), gains(plain))


def test_an_attack_works_where_its_interval_lies_above_what_the_model_draws_unattacked(tmp_path):
    """Nothing below it, nothing within the noise; what fails on the plain model may still work on another."""
    edited = {
        "words": {"edited": {0: 0.0, 50: 0.7}},
        "full": {"edited": {0: 0.0, 50: 0.1}},
        "merged": {"edited": {0: 1.0, 50: 1.0}, "unlearned": {0: 0.1, 50: 0.2}},
    }
    both = {name: SCORES.get(name, {}) | edited.get(name, {}) for name in {**SCORES, **edited}}
    rows, budget, _ = read_attacks(write(tmp_path, both))
    table = against(rows, budget)
    works = working(table)
    assert (
        "unlearned" in works["full"]
        and "edited" not in works["full"]
        and works["words"] == {"edited": 0.7}
        and works["merged"] == {"edited": 1.0}
    ), "the floor is what others start from, not a merged model's"
    second = verdict(table, gains(rows))[1]
    assert (
        "show nothing of the defence: merged, words." in second
        and "merged on edited (100%); words on edited (70%)" in second
    )


@pytest.mark.parametrize(
    "fact, other", [("sampling_steps", 25), ("judge", "another"), ("probe_seeds", "1,1")]
)
def test_numbers_of_two_protocols_do_not_meet_in_one_table(tmp_path, fact, other):
    write(tmp_path)
    write(tmp_path, {"late": SCORES["full"]}, **{fact: other})
    with pytest.raises(ValueError, match=f"different protocols.*{fact} is"):
        read_attacks(tmp_path)
    assert len(read_attacks(tmp_path, ["full", "sly"])[2]) == 2


def test_a_missing_attack_is_named_with_those_that_are_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no attack at all"):
        read_attacks(tmp_path)
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match="no attack other: .*full, sly, words"):
        read_attacks(tmp_path, ["full", "other"])


def test_what_cannot_be_compared_is_refused(tmp_path):
    """An attack whose start nobody saw; a model that was trained anew between two attacks; related concepts may be unjudged, the concept may not."""
    write(tmp_path, {"late": {"unlearned": {50: 0.5, 100: 0.6}}})
    with pytest.raises(ValueError, match="late was not judged before the attack"):
        read_attacks(tmp_path, ["late"])
    write(tmp_path, {"one": SCORES["full"]}, weights={"unlearned-0": "a (1)"})
    write(tmp_path, {"two": SCORES["full"]}, weights={"unlearned-0": "a (2)"})
    with pytest.raises(
        ValueError, match=r"unlearned-0 is not the same model in one and two \(a \(1\), a \(2\)\)"
    ):
        read_attacks(tmp_path, ["one", "two"])
    made = json.loads((write(tmp_path) / "full.json").read_text())
    made["rows"] = [
        row | ({"hit": float("nan")} if row["group"] == "related" else {}) for row in made["rows"]
    ]
    (tmp_path / "full.json").write_text(json.dumps(made))
    rows, budget, _ = read_attacks(tmp_path, ["full"])
    assert against(rows, budget).related.isna().all() and self_destruction(rows, rows).empty


def test_few_trainings_make_a_wide_interval(tmp_path):
    """Two trainings that differ: a bootstrap over them would draw both alike half of the time."""
    made = json.loads((write(tmp_path) / "full.json").read_text())
    for row in made["rows"]:
        if row["group"] == "forget" and row["step"] == 100 and row["run"] == "unlearned-1":
            row["hit"] = int(row["seed"] < 4)
    (tmp_path / "full.json").write_text(json.dumps(made))
    rows = read_attacks(tmp_path, ["full"])[0]
    part = rows[(rows.step == 100) & (rows.model == "unlearned") & (rows.group == "forget")]
    _, low, high = interval(part, ["training", "seed"])
    means = part.groupby("training").hit.mean()
    student = student_interval(means)
    assert (
        student[1] < low
        and high < student[2]
        and student[0] == pytest.approx(means.mean())
        and mean_interval(part)[1:] == (max(student[1], 0), min(student[2], 1))
    )
    assert (
        student_interval([0.2, 0.4, 0.6])[1] == pytest.approx(0.4 - 4.302653 * 0.2 / 3**0.5)
        and gains(rows)["paired by"][0] == "training, seed"
    )
    same = part.assign(hit=1)
    assert (
        mean_interval(same)[1] == pytest.approx(20 / (20 + 1.959964**2))
        and mean_interval(same)[2] == 1
    ), "where all agree it is Wilson's"
    with pytest.raises(ValueError, match="two or more"):
        student_interval([0.5])


def test_differences_that_are_all_alike_have_an_interval_to_the_right_sides():
    """Twenty pairs that agree: Wilson's interval of 20 misses of 20 ends at 0.161. No difference may be one to either side, and −1 is 1 seen from the other."""
    pairs = pd.DataFrame({"training": "0", "asked": "a", "seed": range(20), "index": 0.0})
    found = {
        value: mean_interval(pairs.assign(index=value), "index", signed=True)
        for value in (0.0, 1.0, -1.0)
    }
    edge = 1.959964**2 / (20 + 1.959964**2)
    assert (
        found[0.0] == pytest.approx((0, -edge, edge))
        and found[1.0] == pytest.approx((1, 1 - edge, 1))
        and found[-1.0] == pytest.approx((-1, -1, edge - 1))
    )
    assert np.isnan(mean_interval(pairs.assign(index=-0.5), "index", signed=True)[1:]).all(), (
        "half a picture is no hit"
    )
    mixed = pairs.assign(index=[1.0, -1.0] * 10)
    assert mean_interval(mixed, "index", signed=True) == interval(mixed, ["seed"], "index")


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_intervals_over_three_trainings_hold_what_they_say(spread):
    """Three trainings of two models that are alike, of sixteen pictures each: how often the truth, and the difference of none, lie inside. A bootstrap alone is too narrow."""
    rng, studies = np.random.default_rng(0), 150
    logits = spread * rng.standard_normal((200_000, 1)) + 0.7 * rng.standard_normal((1, 16))
    truth, inside, narrow, no_difference = (1 / (1 + np.exp(-logits))).mean(), [], [], []
    for _ in range(studies):
        pictures = 0.7 * rng.standard_normal(16)
        p = 1 / (1 + np.exp(-(spread * rng.standard_normal((2, 3, 1)) + pictures)))
        hits = (rng.random((2, 3, 16)) < p).astype(int)
        rows = pd.DataFrame(
            [
                {
                    "name": "x",
                    "group": "forget",
                    "model": m,
                    "training": str(t),
                    "attack_seed": 0,
                    "asked": "a",
                    "step": 50,
                    "seed": s,
                    "hit": hits[i, t, s],
                }
                for i, m in enumerate(("unlearned", "meta-unlearned"))
                for t in range(3)
                for s in range(16)
            ]
        )
        one = rows[rows.model == "unlearned"]
        _, low, high = mean_interval(one)
        inside.append(low <= truth <= high)
        _, low, high = interval(one, ["training", "seed"], resamples=300)
        narrow.append(low <= truth <= high)
        (gain,) = gains(rows).itertuples()
        no_difference.append(gain.low <= 0 <= gain.high)
    assert np.mean(inside) >= 0.91 and np.mean(no_difference) >= 0.93
    assert spread < 2 or np.mean(narrow) < 0.9, (
        "the simulation finds out an interval that is too narrow"
    )


def test_trainings_of_different_numbers_are_not_paired(found):
    rows = found[0][(found[0].name == "full") & ~found[0].run.eq("meta-1")]
    assert gains(rows)["paired by"].tolist() == ["seed"]


def test_an_attacker_who_starts_anew_keeps_the_best_and_pays_for_all(found):
    rows, budget, _ = found

    def again(table):
        return pd.concat(
            [table, table.assign(attack_seed=1, **({"hit": 0} if "hit" in table else {}))]
        )

    best_rows, best_budget = best_try(again(rows), again(budget), ["sly"])
    before, after = (
        table[table.name == "sly"].reset_index(drop=True) for table in (rows, best_rows)
    )
    pd.testing.assert_frame_equal(before, after, check_dtype=False)
    spent = best_budget[best_budget.name == "sly"]
    assert (
        spent.seconds.max() == 2 * budget[budget.name == "sly"].seconds.max()
        and spent.images.max() == 12
        and len(spent) == len(budget[budget.name == "sly"])
    )
    assert len(best_rows[best_rows.name == "full"]) == 2 * len(rows[rows.name == "full"]), (
        "the others' seeds are several measurements"
    )


def test_only_what_trains_as_clean_does_is_compared_with_it():
    card = {
        "kind": "fine-tuning",
        "subset": "f",
        "rank": 16,
        "lr": 6e-5,
        "optimizer": "adam",
        "batch_size": 8,
    }
    assert trained_alike(
        {"full": card | {"others": "x"}, "fast": card | {"lr": 2e-4}, "words": {"lr": 6e-5}}, card
    ) == ["full"]


def test_a_search_for_words_has_to_beat_random_words(tmp_path):
    words = {
        "random": {"unlearned": {0: 0.0, 50: 0.4}},
        "search": {"unlearned": {0: 0.0, 50: 0.5}},
        "better": {"unlearned": {0: 0.0, 50: 1.0}},
    }
    table = against(*read_attacks(write(tmp_path, words, attack="prompt"))[:2])
    assert table["by words"].all() and working(table) == {
        "random": {},
        "search": {},
        "better": {"unlearned": 1.0},
    }
    assert set(working(table, floor="none")["search"]) == {"unlearned"}


def test_pictures_that_nobody_judged_are_no_misses(tmp_path):
    made = json.loads((write(tmp_path) / "sly.json").read_text())
    made["rows"][3]["hit"] = float("nan")
    (tmp_path / "sly.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="nobody has judged 1 pictures of sly"):
        read_attacks(tmp_path)


def test_self_destruction_is_what_clean_does_not_cost(found, tmp_path):
    clean = read_attacks(
        write(
            tmp_path / "clean",
            {"clean": {m: {0: 0.0, 100: 0.0} for m in ("unlearned", "meta-unlearned")}},
            attack="clean",
        )
    )[0]
    clean.loc[(clean.group == "related") & (clean.step == 100), "hit"] = 1
    found = self_destruction(found[0], clean).set_index(["attack", "model"])
    assert found["self-destruct index"][("full", "meta-unlearned")] == pytest.approx(0.6) and found[
        "self-destruct index"
    ][("full", "unlearned")] == pytest.approx(0.1)
    said = destruction_verdict(found.reset_index().assign(low=[0.1, 0.2, -0.1, 0.1]))
    assert (
        said.endswith(
            "under 2 of 2 attacks: full (60%), sly (60%); not clearly, or not at all, under: none."
        )
        and destruction_verdict(found.reset_index(), "ascent only") == ""
    )
    assert "not at all, under: full (60%), sly (60%)." in destruction_verdict(
        found.reset_index().assign(low=-0.1)
    )
    assert set(found.after) == {100} and "words" not in found.index.get_level_values(0)


def test_an_attack_becomes_one_line_a_run():
    """Median steps to revival over the attack's seeds, some of them censored; area; self-destruction at the last step that both have."""

    def curve(run, seed, group, hits):
        return [
            {
                "name": "x",
                "attack": "forget",
                "training": "",
                "run": run,
                "attack_seed": seed,
                "group": group,
                "asked": "a cat",
                "step": step,
                "hit": hit,
                "seed": 0,
            }
            for step, hit in zip((0, 50, 100), hits, strict=False)
        ]

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
    found = against(rows, budget, by="run").set_index("run")
    assert (
        found.revived.to_dict() == {"plain": 50, "meta": np.inf}
        and found.area["plain"] == pytest.approx((0.75 + 0.25) / 2)
        and found.area["meta"] == 0
    )
    assert (
        against(rows, budget, threshold=1.0, by="run").set_index("run").revived["plain"] == np.inf
    )
    lost = self_destruction(rows, clean, by="run").set_index("run")
    assert (
        lost["self-destruct index"].to_dict() == pytest.approx({"plain": 0, "meta": 0.5})
        and (lost.after == 100).all()
    )
    assert self_destruction(rows, clean[clean.step < 100], by="run").set_index("run")[
        "self-destruct index"
    ]["meta"] == pytest.approx(0.5)


def test_the_figure_has_a_dot_for_every_attack_and_model(found):
    table = against(*found[:2])
    fig = dots(table)
    (ax,) = fig.axes
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert (
        set(labels) == set(SCORES) and labels[-1] == "sly"
    )  # on top: the strongest against the defended
    drawn = np.concatenate(
        [c.get_offsets().data[:, 0] for c in ax.collections if len(c.get_offsets()) == 3]
    )
    assert set(np.round(table.peak, 6)) <= set(np.round(drawn, 6))
    plt.close(fig)


def test_every_attack_has_its_curves_also_one_that_does_nothing(found):
    fig = every_curve(found[0], ["full", "sly", "words"], columns=2)
    titles = [ax.get_title() for ax in fig.axes if ax.axison]
    assert (
        titles == ["full", "sly", "words"]
        and len(fig.axes) == 4
        and [text.get_text() for text in fig.legends[0].get_texts()]
        == ["unlearned", "meta-unlearned"]
    )
    heights = {round(y, 6) for line in fig.axes[0].lines for y in line.get_ydata()}
    assert {0.9, 0.6, 0.1, 0.2} <= heights
    plt.close(fig)


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
def test_a_budget_leaves_what_an_attacker_who_has_no_more_could_do(found, limits, steps):
    rows, budget = within(*found[:2], **limits)
    assert (
        sorted(rows.step.unique()) == sorted(budget.step.unique()) == steps
        and len(rows) == len(found[0]) * len(steps) // 3
    )
    table = against(rows, budget).set_index(["attack", "model"])
    assert table.peak[("sly", "meta-unlearned")] == (
        0.8 if 100 in steps else 0.3 if 50 in steps else 0
    )
