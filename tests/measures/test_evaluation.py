"""What the notebook of measures tabulates."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from mu.measures.card import note
from mu.measures.gallery_sources import real_drawings, staying
from mu.measures.statistics import paired_differences
from mu.publish.export import save_model
from mu.reports.plots import confusion
from mu.runs.folder import finished_runs, load_run


def test_runs_that_are_not_there_are_named_with_those_that_are(pipe, tmp_path):
    save_model(pipe.unet, tmp_path / "meta" / "unet")
    assert finished_runs(tmp_path, "original, meta") == ["original", "meta"]
    with pytest.raises(
        FileNotFoundError, match="first, second: no finished run below .*; there are: meta"
    ):
        finished_runs(tmp_path, "original,first,meta,second")


def test_a_pipeline_wears_a_run_and_takes_it_off(pipe, tmp_path):
    original = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    save_model(tiny.make_unet(seed=7), tmp_path / "meta" / "unet")
    assert load_run(pipe, original, tmp_path, "meta").endswith("meta/unet") and torch.equal(
        tiny.weights(pipe.unet), tiny.weights(tiny.make_unet(seed=7))
    )
    assert load_run(pipe, original, tmp_path, "original") == "" and all(
        torch.equal(t, original[name]) for name, t in pipe.unet.state_dict().items()
    )


def test_a_sheet_gathers_numbers_and_their_cards():
    sheet = {}
    note(sheet, "meta", {"a": 1}, {"x": 1})
    note(sheet, "meta", {"b": 2}, {"y": 2})
    assert sheet == {"meta": ({"a": 1, "b": 2}, {"x": 1, "y": 2})}


def test_models_are_compared_picture_by_picture():
    rng = np.random.default_rng(0)
    rows = [
        {
            "run": run,
            "group": group,
            "prompt": f"{group}{p}",
            "seed": s,
            "hit": int(rng.random() < share),
        }
        for run, shares in (("original", (1, 1)), ("meta", (0, 0.5)))
        for group, share, prompts in (("forget", shares[0], 1), ("related", shares[1], 6))
        for p in range(prompts)
        for s in range(4)
    ]
    table = pd.DataFrame(rows)
    found = paired_differences(table, ["original", "meta"]).set_index("group")
    mean = table.groupby(["run", "group"]).hit.mean()
    assert (
        found.loc["forget", "minus original"] == -1
        and found.loc["forget", "over"] == "seed"
        and found.loc["related", "over"] == "prompt and seed"
    )
    assert (
        found.loc["related", "minus original"]
        == pytest.approx(mean["meta", "related"] - mean["original", "related"])
        and found.low["related"] < found["minus original"]["related"] < found.high["related"]
    )
    one = paired_differences(table[(table.seed == 0) & (table.group == "forget")], ["original", "meta"])
    assert one.over[0] == "one picture" and np.isnan(one.low[0])


def test_real_drawings_are_those_whose_concept_is_known(tmp_path):
    tiny.make_images(tmp_path / "defender" / "forget", ["a cat", "a cat"])
    assert real_drawings(tmp_path) == (None, [])
    folder = tiny.make_images(tmp_path / "attacker" / "clean", ["banana"])
    line = json.loads((folder / "metadata.jsonl").read_text())
    (folder / "metadata.jsonl").write_text(json.dumps(line | {"concept": "banana"}) + "\n")
    images, labels = real_drawings(tmp_path)
    assert (
        images.shape == (1, 3, 64, 64)
        and labels == ["concept:banana"]
        and 0 <= images.min() < images.max() <= 1
    )


def test_a_style_is_labelled_as_a_style_and_what_a_model_drew_is_no_real_drawing(tmp_path):
    for place, concept in (
        ("defender/forget", "noto"),
        ("defender/retain-related", "fluent"),
        ("defender/retain-unrelated", "banana"),
        ("attacker/forget", "noto"),
    ):
        folder = tiny.make_images(tmp_path / place, ["x"])
        line = json.loads((folder / "metadata.jsonl").read_text())
        (folder / "metadata.jsonl").write_text(json.dumps(line | {"concept": concept}) + "\n")

    def say(**facts):
        return (tmp_path / "concept.json").write_text(json.dumps(facts))

    say(kind="style")
    assert real_drawings(tmp_path)[1] == [
        "style:noto",
        "style:fluent",
        "concept:banana",
        "style:noto",
    ]
    images, labels = real_drawings(tmp_path, known=["style:fluent", "concept:noto"])
    assert labels == ["style:fluent"] and len(images) == 1, (
        "of what the judge does not know it cannot be asked"
    )
    say(kind="style", generator="pocket", imported_from="")
    assert real_drawings(tmp_path) == (None, [])
    say(kind="style", generator="pocket", imported_from="mine")
    assert real_drawings(tmp_path)[1] == ["style:noto", "style:noto"], "the rest was drawn"
    line = json.loads((tmp_path / "defender/forget/metadata.jsonl").read_text())
    (tmp_path / "defender/forget/metadata.jsonl").write_text(
        json.dumps(line | {"concept": "duck", "style": "noto"}) + "\n"
    )
    say(kind="style")
    assert real_drawings(tmp_path)[1][0] == "concept:duck", "a drawing of a duck, in that style"


def test_a_probe_too_small_for_a_distance_is_refused_by_the_names_of_what_to_change():
    items = [{"group": group} for group in ("forget", "related", "unrelated", "related")]
    assert staying(items, "1,2,1", 3) == [False, True, True, True]
    with pytest.raises(
        ValueError,
        match="probe_seeds = '1,2,1' 3 pictures .* least = 4: raise .*probe_seeds, or lower least",
    ):
        staying(items, "1,2,1", 4)


def test_a_confusion_matrix_is_shares_of_what_was_asked_for():
    table = confusion(
        ["concept:a", "concept:a", "concept:b", "concept:b"],
        ["concept:a", "concept:b", "concept:c", "concept:b"],
        "title",
    )
    assert (
        table.loc["concept:a"].tolist() == [0.5, 0.5, 0]
        and table.loc["concept:b"].tolist() == [0, 0.5, 0.5]
        and list(table.columns) == ["concept:a", "concept:b", "other"]
    )
