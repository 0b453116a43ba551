"""Compare methods; train with listed prompts or without a judge: notebooks 20, 21, 25 and 30."""

import pytest
import torch
from experiment import (
    META,
    SHORT_ATTACK,
    TRAINING,
    assert_no_warnings,
    read,
    tiny_experiment,
)

from mu.concepts.probe import load_probe
from mu.measures.evaluate import evaluate, load_judge
from mu.models import encode_prompts, load_pipeline
from mu.sampling import draw_images

pytestmark = pytest.mark.notebooks


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with tiny_experiment(tmp_path_factory.mktemp("methods")) as made:
        yield made


def test_methods_are_compared(experiment):
    """A closed form and SDD, each with and without meta-unlearning."""
    out, report = experiment.base / "methods", experiment.base / "methods-report"
    for method in ("uce", "sdd"):
        common = dict(out=str(out), method=method)
        experiment.run("20_unlearn", output=f"20_{method}", name=method, **common | TRAINING)
        start = dict(name=f"{method}-meta", start=str(out / method), baseline="")
        experiment.run("21_meta_unlearn", output=f"21_{method}", **common | start | META)
    experiment.run(
        "30_attack_finetune",
        output="30_methods",
        out=str(out),
        runs="uce,uce-meta,sdd,sdd-meta",
        subset="lora",
        rank=2,
        **SHORT_ATTACK,
    )
    given = dict(methods="uce,sdd", attacks="forget-6e-05")
    experiment.run("25_compare_methods", out=str(out), report=str(report), **given)
    table = read(report, "tables", "methods.csv")
    assert {"run", "group", "score before", "score after 1 steps"} <= set(table.columns)
    for name in ("methods", "methods-attacked"):
        assert (report / "figures" / f"{name}.svg").is_file()
    assert read(out, "uce-meta", "params.json")["loop"]["unlearn"] == 0


@pytest.fixture
def listed(tmp_path):
    """A CSV file of concept prompts with seeds and guidance scales."""
    file = tmp_path / "listed.csv"
    file.write_text("prompt,seed,guidance\na cat on a cup,7,2.5\na cat,3,\n")
    return file


def test_listed_prompts_have_their_own_seed_and_guidance(experiment, listed):
    pipe = load_pipeline(str(experiment.base / "model"))
    judge = load_judge(str(experiment.base / "judge"))
    probe = load_probe(pipe, experiment.base / "sets", "2,1,1", concept_prompts=str(listed))
    values = [
        (i["group"], i["prompt"], i["seed"], i.get("guidance"), i["expected"]) for i in probe.items
    ]
    assert values[:2] == [
        ("forget", "a cat on a cup", 7, 2.5, "concept:cat"),
        ("forget", "a cat", 3, None, "concept:cat"),
    ]
    assert [group for group, *_ in values[2:]] == ["related", "unrelated"]
    expected = [("a cat on a cup", 7, 2.5), ("a cat", 3, 4.0), ("a tiger", 0, 4.0)]
    single = [
        draw_images(pipe, encode_prompts(pipe, [prompt]), probe.unconditional, [seed], scale, 2)
        for prompt, seed, scale in [*expected, ("a banana", 0, 4.0)]
    ]
    images = evaluate(pipe, judge, probe, 4.0, 2)[1]
    torch.testing.assert_close(images, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_listed_prompts_replace_the_concept_prompts_of_notebooks(experiment, listed, tmp_path):
    out = tmp_path / "runs"
    common = dict(out=str(out), concept_prompts=str(listed))
    experiment.run("20_unlearn", output="20_listed", **common | TRAINING)
    attack = dict(output="30_listed", runs="unlearned")
    experiment.run("30_attack_finetune", **attack | common | SHORT_ATTACK)
    saved = read(out, "attack", "forget-6e-05.json")
    prompts = {row["prompt"] for row in saved["rows"] if row["group"] == "forget"}
    assert prompts == {"a cat on a cup", "a cat"}
    assert "listed.csv (" in saved["protocol"]["concept_prompts"]


def test_without_a_judge_images_have_no_score(experiment):
    out = experiment.base / "no-judge"
    given = dict(out=str(out), judge="", method="uce", start="")
    experiment.run("20_unlearn", output="20_no_judge", **given | TRAINING)
    rows = read(out, "unlearned", "metrics.json")["rows"]
    assert all(row["hit"] != row["hit"] for row in rows)  # nan
    assert (out / "unlearned" / "samples.png").is_file()


def test_no_executed_notebook_shows_a_warning(experiment):
    assert_no_warnings(experiment)
