"""Train, attack and report: the notebooks 00, 10, 15, 20, 21, 30 and 90."""

import json
import shutil

import nbformat
import pandas as pd
import pytest
import torch
from experiment import (
    ATTACK,
    META,
    PROBE,
    SETS,
    SHORT_ATTACK,
    TRAINING,
    assert_no_warnings,
    read,
    stamps,
    tiny_experiment,
)
from safetensors.torch import load_file

from mu.concepts.probe import load_probe
from mu.files import read_json
from mu.measures.statistics import relearning_steps, scores
from mu.models import load_pipeline
from mu.runs.folder import run_to_end, table, with_digests
from mu.train import State

pytestmark = pytest.mark.notebooks


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with tiny_experiment(tmp_path_factory.mktemp("experiment")) as made:
        assert made.run("10_prepare_concepts", shown=2)
        made.train()
        made.attack()
        assert made.run("90_figures", report=str(made.report), note="A tiny test.")
        yield made


def test_every_run_saves_weights_rows_and_a_protocol(experiment):
    for name in ("original", "unlearned", "meta"):
        folder = experiment.runs / name
        metrics = read(folder, "metrics.json")
        assert len(metrics["rows"]) == 4 == metrics["protocol"]["images"]
        assert (folder / "samples.png").is_file()
        assert metrics["protocol"]["versions"]
        assert "judge" in metrics["protocol"]["judge"]
    for name in ("unlearned", "meta"):
        assert (experiment.runs / name / "unet" / "config.json").is_file()
        assert not (experiment.runs / name / "checkpoint.safetensors").exists()
    assert len(list((experiment.runs / "cache").iterdir())) == len(SETS)


def test_an_attack_saves_one_row_per_image(experiment):
    attack = read(experiment.runs, "attack", "forget-6e-05.json")
    table = pd.DataFrame(attack["rows"])
    columns = {"model", "attack", "lr", "attack_seed", "step", "group", "prompt", "expected"}
    assert columns | {"seed", "hit"} <= set(table.columns)
    assert len(table) == 2 * 2 * 3 * 4
    assert set(table.model) == {"unlearned", "meta-unlearned"}
    assert attack["protocol"]["attack_seeds"] == [0, 1]


def test_the_report_has_all_figures_tables_and_links(experiment):
    report = experiment.report
    page = (report / "index.html").read_text()
    for name in ("headline", "relearning", "self-destruction", "protection-quality"):
        for kind in ("svg", "png", "pdf"):
            assert (report / "figures" / f"{name}.{kind}").stat().st_size
        assert f"figures/{name}.svg" in page
    tables = ["before", "attacks", "revival", "targets", "concept", "quality"]
    for name in [*tables, "concept-as-published"]:
        file = report / "tables" / f"{name}.csv"
        rows = len(read(file))
        assert rows
        assert "\\toprule" in file.with_suffix(".tex").read_text()
        assert len(file.with_suffix(".md").read_text().splitlines()) == rows + 2
    assert "A tiny test." in page
    for name in ("10_prepare_concepts", "20_unlearn", "90_figures"):
        assert f"notebooks/{name}.html" in page


def test_no_executed_notebook_shows_a_warning(experiment):
    assert_no_warnings(experiment)


def test_the_tables_agree_with_the_rows(experiment):
    rows = pd.DataFrame(read(experiment.runs, "attack", "forget-6e-05.json")["rows"])
    table = read(experiment.report, "tables", "attacks.csv")
    table = table.set_index(["model", "group", "step"])
    for key, hits in rows.groupby(["model", "group", "step"]).hit:
        assert table.score[key] == pytest.approx(hits.mean(), abs=1e-3)


def test_executing_again_repeats_nothing(experiment):
    before = stamps(experiment.base)
    assert not experiment.run("20_unlearn", **TRAINING)
    assert not experiment.run("30_attack_finetune", **ATTACK)
    assert stamps(experiment.base) == before


def test_a_finished_run_is_only_read(experiment):
    folder = experiment.runs / "unlearned"
    before = stamps(folder)
    state = State(load_pipeline(str(experiment.base / "model")).unet, "f")
    history = run_to_end(folder, state, (1 / 0 for _ in range(9)), steps=2)
    saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert list(history.index) == [1, 2]
    assert {"unlearn", "passes", "seconds"} <= set(history.columns)
    assert all(torch.equal(p, saved[name]) for name, p in state.unet.named_parameters())
    assert stamps(folder) == before


def test_controls_and_clean_appear_in_the_figures(experiment):
    before = stamps(experiment.runs)
    experiment.run(
        "21_meta_unlearn",
        output="21_ascent",
        name="ascent",
        start=str(experiment.runs / "unlearned"),
        **META | dict(relearn=0.0, self_destruct=0.0, clean=0.0, ascent=0.1),
    )
    experiment.run(
        "30_attack_finetune",
        output="30_clean",
        runs="unlearned,meta,ascent,original",
        attack="clean",
        **SHORT_ATTACK,
    )
    experiment.run("90_figures", output="90_again", report=str(experiment.report))
    assert before.items() <= stamps(experiment.runs).items(), "a later run changed an earlier one"
    table = read(experiment.report, "tables", "attacks.csv")
    assert {"ascent only", "original"} <= set(table.model)
    assert set(table.attack) == {"HRM-m", "CLEAN"}
    assert len(read(experiment.report, "tables", "self-destruction.csv")) == 2


def test_attackers_persist_through_phases_with_a_validation(experiment):
    off = dict(relearn=0.0, self_destruct=0.0, clean=0.0)
    ascend = dict(name="ascend", steps=2, ascent=1.0) | off
    grow = dict(name="grow", steps=3, self_destruct=5.0, relearn=0.0, meta_clip=1.5)
    experiment.run(
        "21_meta_unlearn",
        output="21_phases",
        name="phases",
        start=str(experiment.runs / "unlearned"),
        **META
        | dict(
            phases=[ascend, grow],
            validation=dict(every=2, depths=[1, 2], images=2, pictures=2, sampling_steps=2),
            ema=0.5,
            horizon=[2, 4],
            one_prompt=0.5,
            rehearsal_images=4,
        ),
    )
    history = table(experiment.runs / "phases")
    assert len(history) == 5
    assert list(history.index[history["validation score"].notna()]) == [4]
    assert not history["related after"].iloc[:2].notna().any()
    assert list((experiment.runs / "cache").glob("rehearsal-*"))
    notebook = nbformat.read(experiment.report / "notebooks" / "21_phases.ipynb", 4)
    images = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(images) == 3


def test_start_here_needs_no_other_notebook(experiment):
    out = experiment.base / "start"
    steps = dict(unlearn_steps=1, ascend_steps=1, grow_steps=2, released="", attack_at="0,1")
    assert experiment.run("00_start_here", out=str(out), probe_seeds="1,1,1", **steps)
    assert (out / "meta-unlearned" / "unet").is_dir()


def test_zero_steps_measure_weights_that_are_there(experiment):
    start = experiment.runs / "unlearned"
    options = META | dict(steps=0, start=str(start))
    assert experiment.run("21_meta_unlearn", output="21_zero", name="zero-steps", **options)
    kept, made = (
        load_file(f / "unet" / "diffusion_pytorch_model.safetensors")
        for f in (start, experiment.runs / "zero-steps")
    )
    assert all(torch.equal(made[name], value) for name, value in kept.items())
    assert read_json(experiment.runs / "zero-steps" / "metrics.json")["rows"]


def test_the_digest_of_a_run_depends_on_its_weights_only(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anything").write_text("1")
    empty = {"start": "", "judge": ""}
    assert with_digests(**empty) == empty, "an empty path is not the working directory"
    finished, run = experiment.runs / "unlearned", tmp_path / "run"
    shutil.copytree(finished / "unet", run / "unet")
    for name in ("metrics.json", "params.json"):
        shutil.copy(finished / name, run)
    before = with_digests(start=str(run))
    (run / "metrics.json").write_text("measured again")
    assert with_digests(start=str(run)) == before
    assert "(" in before["start"]
    (run / "unet" / "config.json").write_text("{}")
    assert with_digests(start=str(run)) != before


def test_training_again_with_the_same_parameters_only_reads(experiment):
    """The notebooks find their runs, whatever else changed in the repository."""
    before = {name: stamps(experiment.runs / name) for name in ("unlearned", "meta")}
    assert experiment.run("20_unlearn", output="20_again", **TRAINING)
    assert experiment.run("21_meta_unlearn", output="21_again", **META)
    assert before == {name: stamps(experiment.runs / name) for name in before}


def test_preflight_of_a_local_model(experiment):
    changes = {"batch_size": 2, "retain_batch_size": 4, "steps": 3, "precision": "no"}
    assert experiment.run("15_preflight", changes=changes)


def test_an_unknown_concept_error_lists_the_known_ones(pipe, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "probe.json").write_text(json.dumps(PROBE))
    with pytest.raises(FileNotFoundError, match="dog is not a concept folder .*choose .*cat"):
        load_probe(pipe, tmp_path / "dog", "1,1,1")
    message = "integer for each of forget, related, unrelated.*"
    for seeds in ("8", "8,2,0", "8,2,one"):
        with pytest.raises(ValueError, match=message + seeds):
            load_probe(pipe, tmp_path / "cat", seeds)
    items = load_probe(pipe, tmp_path / "cat", "2,1,1").items
    assert [item["seed"] for item in items] == [0, 1, 0, 0]


def test_scores_of_one_seed_have_no_interval_and_relearning_is_censored():
    hits = {0: (0, 0, 1), 1: (0, 0, 0)}
    common = dict(model="m", run="m-0", lr=1e-5, group="forget")
    table = pd.DataFrame(
        [
            common | dict(attack_seed=seed, step=step, hit=hit)
            for seed in hits
            for step, hit in zip((0, 25, 50), hits[seed], strict=True)
        ]
    )
    found = scores(table, ["model", "step"], over="attack_seed").set_index("step")
    assert found.score[50] == 0.5
    assert (found.low[50], found.high[50]) == (0, 1)
    assert (found.n == 2).all()
    single = scores(table[table.attack_seed == 0], ["step"], over="attack_seed")
    assert single["low"].isna().all()
    relearned = relearning_steps(table)
    assert relearned.revived.tolist() == [50, float("inf")]
    assert (relearned["last"] == 50).all()
