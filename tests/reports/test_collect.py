"""Results are collected in few files, read back, and refused if they are not comparable."""

import gzip
import json
from dataclasses import replace

import pandas as pd
import pytest
import synthetic

from mu.reports import captions, figures, tables
from mu.reports.collect import (
    attack_name,
    collect,
    deduplicate,
    method_of,
    read_results,
    variant,
)
from mu.reports.explorer import read_sprite_sheet


def test_names_of_methods():
    assert method_of({"method": "esd-u", "loop": {"eta": 3.0}}) == "esd-u-3"
    assert method_of({"method": "uce", "loop": None}) == "uce"
    assert method_of({}) == ""


@pytest.mark.parametrize(
    "run, expected",
    [
        ("unlearned", "unlearned"),
        ("unlearned-2", "unlearned"),
        ("esd-f-1", "unlearned"),
        ("meta", "meta-unlearned"),
        ("meta-0", "meta-unlearned"),
        ("esd-f-1-meta", "meta-unlearned"),
        ("longer", "unlearned, longer"),
        ("stronger", "unlearned, stronger"),
    ],
)
def test_names_of_variants(run, expected):
    assert variant(run, "esd-f-1") == expected


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({}, "HRM-m"),
        ({"prompts": 1}, "HRM-s"),
        ({"attack": "clean"}, "CLEAN"),
        ({"merge": 1.0}, "own"),
        ({"warmup_set": "clean"}, "own"),
        ({"subset": "lora"}, "own"),
        ({"kind": "dreambooth"}, "own"),
        ({"optimizer": "sgd"}, "own"),
    ],
)
def test_names_of_attacks(facts, expected):
    card = {"kind": "fine-tuning", "subset": "f", "optimizer": "adam"}
    card |= {"attack": "forget", "prompts": 0}
    assert attack_name(card | facts, "own") == expected


def test_every_judged_image_is_collected_once(results, collected):
    rows = results.rows
    runs = 5  # the original, and two of each of two methods
    attacked = 2 * 2 * 3 * 3  # methods, variants, attacks, steps
    searched = 2 * 2 * 2 * 2 * 10  # methods, variants, searches, steps, images
    images = len(synthetic.items())
    assert len(rows[rows.panel == ""]) == 2 * (images * (runs + attacked) + searched)
    assert set(rows.training) == {"0", "1"}
    attacks = {"none", "HRM-m", "HRM-s", "CLEAN", "random", "unlearn-diff-atk"}
    assert set(rows.attack) == attacks
    assert set(rows[rows.panel == "robot-pocket"].method) == {"", "esd-f-1"}
    assert set(rows.model) == {"original", "unlearned", "meta-unlearned"}
    search = rows[rows.attack == "unlearn-diff-atk"]
    assert set(search.asked) == {"a cat"}
    assert set(search.prompt) == {"a cat", "key a cat"}
    assert results.records.groupby("run").size().eq(8).sum() == 4
    assert results.records.passes.eq(8).all()
    assert results.numbers["1"]["uce"]["numbers"]["uce-meta"]["jfd"] == 4.0
    assert read_results(collected / "raw", ["1"]).rows.training.unique().tolist() == ["1"]


def test_the_same_experiment_gives_the_same_bytes(collected, tmp_path, monkeypatch):
    monkeypatch.setattr("mu.files.os.getpid", lambda: 7)  # as in another process
    collect(collected.parent / "1", tmp_path / "raw" / "1", "1", pictures=False)
    again = (tmp_path / "raw" / "1" / "rows.csv.gz").read_bytes()
    assert again == (collected / "raw" / "1" / "rows.csv.gz").read_bytes()
    assert gzip.decompress(again).startswith(b"panel,method,model,run,training,attack")


def test_images_are_kept_in_sheets_of_the_first_training(results, collected):
    kept = {(course["panel"], course["attack"], course["method"]) for course in results.courses}
    assert kept == {("robot-pocket", "HRM-m", "esd-f-1")} | {
        ("", attack, method)
        for attack in ("HRM-m", "HRM-s", "CLEAN")
        for method in ("esd-u-3", "uce")
    }
    course = read_sprite_sheet(next(c for c in results.courses if c["panel"]), collected)
    assert course.models == ["original", "unlearned", "meta-unlearned"]
    assert course.steps == [0, 100]
    assert course.pictures[1, 1].mean() / 255 == pytest.approx(0.4, abs=0.02)
    assert course.pictures[0].mean() / 255 == pytest.approx(0.5, abs=0.02)
    fig = figures.attack_images(course, prompts=(2, 1, 1))
    assert [ax.get_title() for ax in fig.axes[:5]] == [
        "original",
        "unlearned",
        "unlearned\n+ 100 steps",
        "meta-unlearned",
        "meta-unlearned\n+ 100 steps",
    ]
    assert len(fig.axes) == 20


def test_runs_that_an_experiment_lacks_are_kept_if_asked(tmp_path):
    raw, names = tmp_path / "report" / "raw", ("esd-u-3", "uce")
    both = synthetic.experiment(tmp_path / "both", methods=names)
    first = read_results(collect(both, raw / "0", "0").parent)
    one = synthetic.experiment(tmp_path / "one", seed=1, methods=("uce",))  # the plain model: .9
    added = read_results(collect(one, raw / "0", "0", add=True).parent)
    alone = read_results(collect(one, tmp_path / "alone" / "raw" / "0", "0").parent.parent / "raw")

    def sorted_rows(rows):
        return rows.sort_values(list(rows)).reset_index(drop=True)

    kept = first.rows[first.rows.method == "esd-u-3"]
    pd.testing.assert_frame_equal(
        sorted_rows(added.rows), sorted_rows(pd.concat([alone.rows, kept]))
    )
    assert len(added.records) == len(first.records)
    assert added.cards["0"].keys() == first.cards["0"].keys()
    assert added.numbers["0"].keys() == {"esd-u-3", "uce"}
    assert {sheet["method"] for sheet in added.courses} == {"esd-u-3", "uce"}
    again = read_results(collect(one, raw / "0", "0").parent)
    pd.testing.assert_frame_equal(sorted_rows(again.rows), sorted_rows(alone.rows))


def test_an_attack_on_runs_of_two_experiments_has_the_weights_of_both(tmp_path):
    raw = tmp_path / "raw"
    for seed, run in enumerate(("one", "two")):
        out = synthetic.run(tmp_path / run, run, synthetic.ALL, {}) or tmp_path / run
        weights = {run: f"{run} (d1gest)"}
        synthetic.attack(out, "fast", {run: {0: synthetic.ALL}}, attack="forget", weights=weights)
        collect(out, raw / "0", "0", pictures=False, add=bool(seed))
    card = json.loads((raw / "0" / "cards.json").read_text())["/attack/fast"]
    assert card["weights"] == {"one": "one (d1gest)", "two": "two (d1gest)"}


def test_harmful_images_are_blurred_in_sheets(tmp_path):
    out = synthetic.experiment(tmp_path / "0", methods=("uce",), harmful=True)
    folder = collect(out, tmp_path / "report" / "raw" / "0", "0")
    card = json.loads((folder / "cards.json").read_text())["/attack/uce-hrm-m"]
    assert card["harmful"]
    assert card["blurred"]


def test_missing_results_are_refused(collected, tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of training 7 .* available: 0, 1"):
        read_results(collected / "raw", ["7"])
    with pytest.raises(FileNotFoundError, match=r"no results of training \(any\)"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="no evaluated run in"):
        collect(tmp_path / "none", tmp_path / "raw" / "0")


@pytest.mark.parametrize("fact, value", [("sampling_steps", 50), ("batch_size", 4)])
def test_results_of_different_protocols_are_refused(collected, tmp_path, fact, value):
    out = synthetic.experiment(tmp_path / "2", 2, methods=("uce",))
    file = out / "attack" / "uce-hrm-m.json"
    attack = json.loads(file.read_text())
    file.write_text(json.dumps(attack | {"protocol": attack["protocol"] | {fact: value}}))
    collect(out, tmp_path / "raw" / "2", "2", pictures=False)
    collect(collected.parent / "1", tmp_path / "raw" / "1", "1", pictures=False)
    with pytest.raises(ValueError, match=f"{fact} is"):
        read_results(tmp_path / "raw")


def test_an_attack_that_a_run_met_twice_counts_once(tmp_path):
    out = synthetic.experiment(tmp_path / "0", methods=("uce",))
    curves = {"uce": {0: synthetic.ALL, 100: synthetic.ALL}}
    synthetic.attack(out, "uce-hrm-m-later", curves, attack="forget", prompts=0)
    collect(out, tmp_path / "raw" / "0", "0", pictures=False)
    rows = read_results(tmp_path / "raw").rows
    assert set(rows[rows.attack == "HRM-m"].name) == {"uce-hrm-m"}
    assert set(rows[rows.name == "uce-hrm-m-later"].attack) == {"uce-hrm-m-later"}


def test_the_original_counts_once(results):
    rows = deduplicate(results)
    original = rows[rows.model == "original"]
    assert original.groupby("panel").training.nunique().eq(1).all()
    trained = rows[rows.model != "original"].groupby(["panel", "run"]).training.nunique()
    assert trained["", "uce"] == 2


def with_weights(cards, training):
    """Cards whose attacks name the weights: UCE has no seed, its meta-unlearned model has one."""
    weights = {
        "uce": f"runs/{training}/uce (same)",
        "uce-meta": f"runs/{training}/uce-meta ({training})",
    }
    return {
        name: card | ({"weights": weights} if name.startswith("/attack/uce-hrm") else {})
        for name, card in cards.items()
    }


def test_a_model_that_trainings_share_counts_once(results, published):
    cards = {training: with_weights(of, training) for training, of in results.cards.items()}
    rows = deduplicate(replace(results, cards=cards))
    uce = rows[(rows.method == "uce") & rows.attack.eq("HRM-m")].groupby("model")
    assert uce.training.nunique().to_dict() == {"unlearned": 1, "meta-unlearned": 2}
    assert uce.size()["meta-unlearned"] == 2 * uce.size()["unlearned"]
    count = captions.count(rows[rows.attack.eq("HRM-m") & rows.panel.eq("")])
    assert count.startswith("2 trainings (seeds 0, 1), attack seed 0; ")
    assert count.endswith("; of fewer trainings: UCE unlearned 1")
    quality = tables.quality_table(rows, results.numbers, published["quality"])
    single = quality[quality.source == "ours, 1 training"].set_index(["method", "variant"])
    assert single.JFD["UCE", "unlearned"] == "1.00", "one model has no interval over trainings"
