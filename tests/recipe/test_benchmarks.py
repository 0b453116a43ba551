"""The benchmark notebooks, run small."""

import json
import os

import pytest
import tiny

from mu import ROOT
from mu.notebooks.run import execute

BENCHMARK = ROOT / "notebooks" / "85_benchmark.ipynb"
LARGE = ROOT / "notebooks" / "86_benchmark_large.ipynb"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_benchmark_counts_no_pass_too_many(sd_folder, tmp_path):
    retain = ("defender/retain-related", "defender/retain-unrelated")
    for name in ("defender/forget", *retain, "attacker/forget"):
        tiny.make_images(tmp_path / "sets" / name, ["a cat", "a tiger"])
    parameters = dict(
        model=str(sd_folder),
        sets=str(tmp_path / "sets"),
        out=str(tmp_path / "out"),
        steps=3,
        profiled_steps=2,
        thread_repetitions=1,
        batch_size=2,
        trajectory_reuse=2,
        inner_steps=2,
        inner_batch_size=2,
        retain_batch_size=2,
        threads=1,
    )
    assert execute(BENCHMARK, tmp_path / "85.ipynb", parameters, html=False)
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["loop"] for row in result["table"]] == ["attack", "unlearn", "meta-unlearn"]
    assert result["protocol"]["versions"]
    for row in result["table"]:
        assert row["passes"] == row["needed"]
        assert 0 < row["share in UNet"] <= 1


def test_the_large_benchmark_measures_what_preflight_predicts(sdxl_folder, tmp_path):
    changes = dict(
        batch_size=1,
        trajectory_steps=2,
        trajectory_reuse=1,
        inner_steps=[1, 2],
        inner_batch_size=2,
        retain_batch_size=2,
        precision="bf16",
        optimizer="adamw",
        processes=1,
    )
    parameters = dict(
        model=str(sdxl_folder),
        profile="paper-sdxl",
        steps=2,
        profiled_steps=1,
        threads=1,
        out=str(tmp_path / "out"),
        changes=changes,
    )
    assert execute(LARGE, tmp_path / "86.ipynb", parameters, html=False)
    result = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert {
        "predicted, GiB",
        "passes a step",
        "seconds a step",
        "minutes of the training",
        "share in UNet",
    } < set(result["measured"])
    assert len(result["records"]) == 2
    assert result["protocol"]["versions"]
    assert result["device"]
    assert len(result["marks"]) == 2
