"""The experiment as it is walked: every notebook runs under papermill, on tiny random components, in the order of the book."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file

from mu.concepts.probe import load_probe
from mu.measures.evaluate import evaluate, load_judge
from mu.measures.statistics import relearning_steps, scores
from mu.models import encode_prompts, load_pipeline
from mu.notebooks.run import execute, read_parameters
from mu.runs.folder import run_to_end, with_digests
from mu.sampling import draw_images
from mu.train import State

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SETS = {
    "defender/forget": ["a cat", "a photo of a cat", "a cat"],
    "defender/retain-related": ["a tiger", "a drawing of a tiger"],
    "defender/retain-unrelated": ["a banana", "a cup", "a photo of a banana"],
    "attacker/forget": ["cat", "an emoji of a cat"],
    "attacker/clean": ["banana", "cup"],
}
PROBE = {
    "forget": {"a cat": "concept:cat"},
    "related": {"a tiger": "concept:tiger"},
    "unrelated": {"a banana": "concept:banana"},
}
TRAINING = dict(
    steps=2,
    batch_size=2,
    retain_batch_size=2,
    trajectory_steps=2,
    trajectory_reuse=2,
    checkpoint_every=1,
)
META = dict(inner_steps=[1, 2], inner_batch_size=2, clean_every=2, retain_prompts=4)
DRAWING = dict(probe_seeds="2,1,1", sampling_steps=2)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The whole experiment, executed once: (folder of it, a function that executes one notebook of it)."""
    base = tmp_path_factory.mktemp("experiment")
    tiny.make_pipeline(base / "model")
    tiny.make_judge().save_pretrained(base / "judge")
    for seed, (name, captions) in enumerate(SETS.items()):
        tiny.make_images(base / "sets" / name, captions, seed=seed)
    (base / "sets" / "probe.json").write_text(json.dumps(PROBE))
    places = dict(
        model=str(base / "model"),
        sets=str(base / "sets"),
        judge=str(base / "judge"),
        out=str(base / "runs"),
    )

    def run(stem, output=None, **parameters):
        notebook = NOTEBOOKS / f"{stem}.ipynb"
        known = read_parameters(notebook)
        parameters = (
            {k: v for k, v in places.items() if k in known}
            | {k: v for k, v in DRAWING.items() if k in known}
            | parameters
        )
        return execute(
            notebook, base / "report" / "notebooks" / f"{output or stem}.ipynb", parameters
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run("10_prepare_concepts", shown=2)
        assert run("20_unlearn", **TRAINING)
        assert run("21_meta_unlearn", **TRAINING, **META)
        assert run("30_attack_finetune", at="0,1,2", seeds="0,1", batch_size=2)
        assert run("90_figures", report=str(base / "report"), note="A tiny test.")
        yield base, run


def stamps(folder):
    return {
        file: file.stat().st_mtime_ns for file in sorted(Path(folder).rglob("*")) if file.is_file()
    }


def test_every_run_leaves_weights_rows_and_a_protocol(experiment):
    runs = experiment[0] / "runs"
    for name in ("original", "unlearned", "meta"):
        made = json.loads((runs / name / "metrics.json").read_text())
        assert (
            len(made["rows"]) == 4 == made["protocol"]["images"]
            and (runs / name / "samples.png").is_file()
        )
        assert made["protocol"]["versions"] and "judge" in made["protocol"]["judge"]
    assert all(
        (runs / name / "unet" / "config.json").is_file()
        and not (runs / name / "checkpoint.safetensors").exists()
        for name in ("unlearned", "meta")
    )
    assert len(list((runs / "cache").iterdir())) == len(SETS)


def test_an_attack_has_a_row_for_every_picture(experiment):
    found = json.loads((experiment[0] / "runs" / "attack" / "forget-6e-05.json").read_text())
    table = pd.DataFrame(found["rows"])
    assert {
        "model",
        "attack",
        "lr",
        "attack_seed",
        "step",
        "group",
        "prompt",
        "expected",
        "seed",
        "hit",
    } <= set(table.columns)
    assert (
        len(table) == 2 * 2 * 3 * 4
        and set(table.model) == {"unlearned", "meta-unlearned"}
        and found["protocol"]["attack_seeds"] == [0, 1]
    )


def test_the_report_is_whole(experiment):
    report = experiment[0] / "report"
    page = (report / "index.html").read_text()
    for name in ("headline", "relearning", "self-destruction", "protection-quality"):
        assert all(
            (report / "figures" / f"{name}.{kind}").stat().st_size for kind in ("svg", "png", "pdf")
        )
        assert f"figures/{name}.svg" in page
    for name in (
        "before",
        "attacks",
        "revival",
        "targets",
        "concept",
        "concept-as-published",
        "quality",
    ):
        table = pd.read_csv(report / "tables" / f"{name}.csv")
        assert (
            len(table)
            and "\\toprule" in (report / "tables" / f"{name}.tex").read_text()
            and len((report / "tables" / f"{name}.md").read_text().splitlines()) == len(table) + 2
        )
    assert "A tiny test." in page and all(
        f"notebooks/{n}.html" in page for n in ("10_prepare_concepts", "20_unlearn", "90_figures")
    )


def test_no_executed_notebook_shows_a_warning(experiment):
    for file in (experiment[0] / "report" / "notebooks").glob("*.ipynb"):
        said = [
            o.text
            for c in nbformat.read(file, 4).cells
            for o in c.get("outputs", [])
            if o.get("name") == "stderr"
        ]
        assert not said, f"{file.name}: {said}"


def test_the_tables_say_what_the_rows_say(experiment):
    rows = pd.DataFrame(
        json.loads((experiment[0] / "runs" / "attack" / "forget-6e-05.json").read_text())["rows"]
    )
    table = pd.read_csv(experiment[0] / "report" / "tables" / "attacks.csv").set_index(
        ["model", "group", "step"]
    )
    for key, hits in rows.groupby(["model", "group", "step"]).hit:
        assert table.score[key] == pytest.approx(hits.mean(), abs=1e-3)


def test_a_second_walk_repeats_nothing(experiment):
    base, run = experiment
    before = stamps(base)
    assert not run("20_unlearn", **TRAINING) and not run(
        "30_attack_finetune", at="0,1,2", seeds="0,1", batch_size=2
    )
    assert stamps(base) == before


def test_a_finished_run_is_only_read(experiment):
    folder = experiment[0] / "runs" / "unlearned"
    before, state = stamps(folder), State(load_pipeline(str(experiment[0] / "model")).unet, "f")
    history = run_to_end(folder, state, (1 / 0 for _ in range(9)), steps=2)
    saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert list(history.index) == [1, 2] and {"unlearn", "passes", "seconds"} <= set(
        history.columns
    )
    assert (
        all(torch.equal(p, saved[name]) for name, p in state.unet.named_parameters())
        and stamps(folder) == before
    )


def test_controls_and_clean_join_the_figures(experiment):
    base, run = experiment
    before = stamps(base / "runs")
    run(
        "21_meta_unlearn",
        output="21_ascent",
        name="ascent",
        start=str(base / "runs" / "unlearned"),
        relearn=0.0,
        self_destruct=0.0,
        clean=0.0,
        ascent=0.1,
        **TRAINING,
        **META,
    )
    run(
        "30_attack_finetune",
        output="30_clean",
        runs="unlearned,meta,ascent,original",
        attack="clean",
        at="0,1",
        seeds="0",
        batch_size=2,
    )
    run("90_figures", output="90_again", report=str(base / "report"))
    assert before.items() <= stamps(base / "runs").items(), "a later run has changed an earlier one"
    table = pd.read_csv(base / "report" / "tables" / "attacks.csv")
    assert {"ascent only", "original"} <= set(table.model) and set(table.attack) == {
        "HRM-m",
        "CLEAN",
    }
    assert len(pd.read_csv(base / "report" / "tables" / "self-destruction.csv")) == 2


def test_start_here_tells_the_story_alone(experiment):
    base, run = experiment
    assert run(
        "00_start_here",
        out=str(base / "start"),
        unlearn_steps=1,
        meta_steps=3,
        attack_at="0,1",
        probe_seeds="1,1,1",
    )
    assert (base / "start" / "meta-unlearned" / "unet").is_dir()


def test_a_run_is_known_by_its_files_and_nothing_else(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anything").write_text("1")
    assert with_digests(start="", judge="") == {"start": "", "judge": ""}, (
        "no path is not the working directory"
    )
    for part in ("unet", "metrics.json", "params.json"):
        place = experiment[0] / "runs" / "unlearned" / part
        (shutil.copytree if place.is_dir() else shutil.copy)(
            place, tmp_path / "run" / part if place.is_dir() else tmp_path / "run"
        )
    before = with_digests(start=str(tmp_path / "run"))
    (tmp_path / "run" / "metrics.json").write_text("measured again")
    assert with_digests(start=str(tmp_path / "run")) == before and "(" in before["start"]
    (tmp_path / "run" / "unet" / "config.json").write_text("{}")
    assert with_digests(start=str(tmp_path / "run")) != before


def test_another_call_with_the_same_parameters_only_reads(experiment):
    """Executed once more, the two notebooks of training find their runs, whatever else has changed in the repository meanwhile."""
    base, run = experiment
    before = {name: stamps(base / "runs" / name) for name in ("unlearned", "meta")}
    assert run("20_unlearn", output="20_again", **TRAINING) and run(
        "21_meta_unlearn", output="21_again", **TRAINING, **META
    )
    assert before == {name: stamps(base / "runs" / name) for name in before}


def test_methods_are_compared(experiment):
    """A closed form and SDD, each plainly and meta-unlearned, by parameters only; and the notebook that reads them."""
    base, run = experiment
    out, report = str(base / "methods"), str(base / "methods-report")
    for method in ("uce", "sdd"):
        run("20_unlearn", output=f"20_{method}", out=out, name=method, method=method, **TRAINING)
        run(
            "21_meta_unlearn",
            output=f"21_{method}",
            out=out,
            name=f"{method}-meta",
            method=method,
            start=f"{out}/{method}",
            baseline="",
            **TRAINING,
            **META,
        )
    run(
        "30_attack_finetune",
        output="30_methods",
        out=out,
        runs="uce,uce-meta,sdd,sdd-meta",
        at="0,1",
        seeds="0",
        batch_size=2,
        subset="lora",
        rank=2,
    )
    run("25_compare_methods", out=out, report=report, methods="uce,sdd")
    assert {"run", "group", "score before", "score after 1 steps"} <= set(
        pd.read_csv(base / "methods-report" / "tables" / "methods.csv").columns
    )
    assert all(
        (base / "methods-report" / "figures" / f"{name}.svg").is_file()
        for name in ("methods", "methods-attacked")
    )
    assert (
        json.loads((base / "methods" / "uce-meta" / "params.json").read_text())["loop"]["unlearn"]
        == 0
    )


def test_listed_prompts_stand_for_the_concept_each_with_its_own_seed_and_guidance(
    experiment, tmp_path
):
    base, run = experiment
    (tmp_path / "listed.csv").write_text("prompt,seed,guidance\na cat on a cup,7,2.5\na cat,3,\n")
    pipe, judge = load_pipeline(str(base / "model")), load_judge(str(base / "judge"))
    probe = load_probe(pipe, base / "sets", "2,1,1", concept_prompts=str(tmp_path / "listed.csv"))
    assert [
        (i["group"], i["prompt"], i["seed"], i.get("guidance"), i["expected"])
        for i in probe.items[:2]
    ] == [
        ("forget", "a cat on a cup", 7, 2.5, "concept:cat"),
        ("forget", "a cat", 3, None, "concept:cat"),
    ]
    assert [i["group"] for i in probe.items[2:]] == ["related", "unrelated"]
    alone = [
        draw_images(pipe, encode_prompts(pipe, [prompt]), probe.unconditional, [seed], scale, 2)
        for prompt, seed, scale in (
            ("a cat on a cup", 7, 2.5),
            ("a cat", 3, 4.0),
            ("a tiger", 0, 4.0),
            ("a banana", 0, 4.0),
        )
    ]
    torch.testing.assert_close(
        evaluate(pipe, judge, probe, 4.0, 2)[1], torch.cat(alone), rtol=1e-4, atol=1e-5
    )
    run(
        "20_unlearn",
        output="20_listed",
        out=str(tmp_path / "runs"),
        concept_prompts=str(tmp_path / "listed.csv"),
        **TRAINING,
    )
    run(
        "30_attack_finetune",
        output="30_listed",
        out=str(tmp_path / "runs"),
        runs="unlearned",
        concept_prompts=str(tmp_path / "listed.csv"),
        at="0,1",
        seeds="0",
        batch_size=2,
    )
    made = json.loads((tmp_path / "runs" / "attack" / "forget-6e-05.json").read_text())
    assert {row["prompt"] for row in made["rows"] if row["group"] == "forget"} == {
        "a cat on a cup",
        "a cat",
    } and "listed.csv (" in made["protocol"]["concept_prompts"]


def test_every_kind_of_attack_meets_in_one_table(experiment):
    """By parameters only: HRM-s, LoRA, mixed, phased, DreamBooth, two inversions, merging back, every search for words; and the page of them all."""
    base, run = experiment
    out, report = str(base / "runs"), str(base / "attacks-report")
    common = dict(at="0,1", seeds="0", batch_size=2)
    kinds = {
        "one-prompt": dict(prompts=1),
        "lora": dict(subset="lora", rank=2),
        "mixed": dict(mixed_set="defender/retain-related"),
        "sgd": dict(optimizer="sgd"),
        "phased": dict(warmup_set="attacker/clean", warmup_steps=1),
        "dreambooth": dict(kind="dreambooth", class_images=2),
        "merged": dict(merge_share=1.0),
        "one-word": dict(kind="textual-inversion", word="cup", init_word="banana", drawn_images=2),
    }
    for name, options in kinds.items():
        run("30_attack_finetune", output=f"30_{name}", name=name, **common | options)
        assert (
            len(json.loads((base / "runs" / "attack" / f"{name}.json").read_text())["rows"])
            == 2 * 2 * 4
        )
    searches = "random,unlearn-diff-atk,p4d,ring-a-bell,concept-inversion"
    run(
        "31_attack_prompts",
        searches=searches,
        word="cup",
        init_word="banana",
        population=8,
        drawn_images=2,
        candidates=2,
        images_per_prompt=1,
        **common,
    )
    named = [*kinds, *searches.split(",")]
    run("30_attack_finetune", output="30_harmless", name="harmless", attack="clean", **common)
    run("35_compare_attacks", out=out, report=report, attacks=",".join(named), clean="harmless")
    table = pd.read_csv(base / "attacks-report" / "tables" / "attacks.csv")
    assert (
        set(table.attack) == set(named)
        and len(table) == 2 * len(named)
        and {"images", "seconds", "low", "revived"} <= set(table.columns)
    )
    page = (base / "attacks-report" / "index.html").read_text()
    assert "eta-unlearn" in page and "figures/attacks.svg" in page and "ring-a-bell" in page
    for wrong, words in (
        (dict(kind="prefix-tuning"), "unknown kind of attack 'prefix-tuning'"),
        (dict(warmup_set="attacker/clean"), "warmup_steps=0"),
        (dict(kind="dreambooth", mixed_set="attacker/clean"), "'dreambooth' has no mixed_set"),
        (dict(kind="textual-inversion"), "is not one token"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run("30_attack_finetune", output="30_wrong", name="wrong", **common | wrong)
    with pytest.raises(RuntimeError, match="unknown searches.*'grid'.*unlearn-diff-atk"):
        run("31_attack_prompts", output="31_wrong", searches="random,grid", **common)


def test_everything_is_measured_into_one_table_with_its_card(experiment):
    """The probe, a CSV of harmful prompts, captions with CLIP, NudeNet and an attack; then again, from what is there."""
    base, run = experiment
    (base / "prompts.csv").write_text(
        "prompt,evaluation_seed,evaluation_guidance\na tiger,3,2.0\na cat,4,3.0\n"
    )
    (base / "captions.csv").write_text("prompt\na cup\na banana\na tiger\n")
    everything = dict(
        nudenet=True,
        least=2,
        prompts=str(base / "prompts.csv"),
        captions=str(base / "captions.csv"),
        clip=str(tiny.make_clip(base / "clip")),
        attack="forget-6e-05",
        runs="original,unlearned,meta",
    )
    assert run("50_evaluate", **everything)
    made = json.loads((base / "runs" / "evaluate" / "evaluation.json").read_text())
    assert {
        "forget recognised",
        "jfd",
        "change",
        "flagged",
        "CLIP score",
        "steps to revival",
        "area under relearning",
    } <= set(made["numbers"]["meta"]) and made["numbers"]["original"]["jfd"] == 0
    assert {
        "judge",
        "probe_seeds",
        "sampling_steps",
        "detector",
        "flagged_threshold",
        "clip",
        "captions",
        "jfd_marked",
        "attack",
        "versions",
    } <= set(made["protocol"])
    hidden = json.loads(
        (base / "runs" / "evaluate" / "meta" / "prompts" / "params.json").read_text()
    )
    assert (
        hidden["blurred"] is True
        and len(list((base / "runs" / "evaluate" / "meta" / "prompts").glob("*.png"))) == 2
    )
    before = stamps(base / "runs" / "evaluate" / "meta")
    assert (
        run("50_evaluate", output="50_again", **everything, threshold=0.4)
        and stamps(base / "runs" / "evaluate" / "meta") == before
    )
    with pytest.raises(RuntimeError, match="nobody: no finished run below"):
        run("50_evaluate", output="50_nobody", runs="original,nobody")


def test_fid_and_lpips_are_measured_beside_the_rest(experiment):
    """The notebook's own cells, in a process that has torch-fidelity and lpips, with a random Inception and a random trunk: the trained ones are downloaded."""
    base, _ = experiment
    (base / "mild.csv").write_text("prompt\na cup\na banana\na tiger\n")
    tiny.make_images(base / "real", [str(i) for i in range(4)], size=24)
    given = dict(
        model=str(base / "model"),
        sets=str(base / "sets"),
        judge=str(base / "judge"),
        out=str(base / "runs"),
        place="measured",
        captions=str(base / "mild.csv"),
        least=2,
        fid_reference=str(base / "real"),
        inception=str(base / "inception.pth"),
        lpips="vgg",
        **DRAWING,
    )
    made = tiny.run_with_measures(
        """
import json, os, nbformat
from unittest.mock import patch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
import mu.measures.metrics
os.environ["MPLBACKEND"] = "Agg"
given, notebook = json.loads(sys.argv[1]), nbformat.read(sys.argv[2], 4)
with patch("torch.load", lambda *_, **__: {}), patch("torch.nn.Module.load_state_dict"):  # its weights stay those that it begins with
    torch.save(FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none").state_dict(), given["inception"])
real, space = mu.measures.metrics.lpips_network, {"display": print}
mu.measures.metrics.lpips_network = lambda net: real(net, pnet_rand=True)
for cell in notebook.cells:
    if cell.cell_type == "code":
        exec(cell.source, space)
        space.update(given if "parameters" in cell.metadata.get("tags", []) else {})
print(json.dumps(json.load(open(given["out"] + "/measured/evaluation.json"))))
""",
        json.dumps(given),
        NOTEBOOKS / "50_evaluate.ipynb",
    )
    numbers, card = made["numbers"], made["protocol"]
    assert (
        numbers["original"]["LPIPS"] == 0 < numbers["meta"]["LPIPS"]
        and numbers["original"]["fid"] > 0
        and numbers["meta"]["fid"] > 0
    )
    assert (
        card["fid_backend"].startswith("torch-fidelity")
        and card["fid_images"] == 3
        and "biased" in card["fid_marked"]
        and card["lpips"] == "vgg, 3 pictures, captions, against original"
    )


def test_a_run_is_published_in_three_forms(experiment):
    base, run = experiment
    assert run(
        "60_publish",
        run=str(base / "runs" / "meta"),
        to=str(base / "published"),
        rank=4,
        prompt="a tiger",
        sampling_steps=2,
    )
    cards = [
        (base / "published" / name / "README.md").read_text()
        for name in ("pipeline", "difference", "lora")
    ]
    assert all("license: cc-by-sa-4.0" in card and "esd-f" in card for card in cards)


def test_preflight_of_a_model_at_hand(experiment):
    base, run = experiment
    assert run(
        "15_preflight",
        changes={"batch_size": 2, "retain_batch_size": 4, "steps": 3, "precision": "no"},
    )
    made = json.loads((base / "runs" / "preflight.json").read_text())
    assert 0 < made["gib"] < made["usable"] and made["needs"][0][2] > 0 and len(made["others"]) == 8


def test_without_a_judge_pictures_are_drawn_and_not_scored(experiment):
    base, run = experiment
    run(
        "20_unlearn",
        output="20_no_judge",
        out=str(base / "no-judge"),
        judge="",
        method="uce",
        start="",
        **TRAINING,
    )
    rows = json.loads((base / "no-judge" / "unlearned" / "metrics.json").read_text())["rows"]
    assert (
        all(row["hit"] != row["hit"] for row in rows)
        and (base / "no-judge" / "unlearned" / "samples.png").is_file()
    )


def test_an_unknown_concept_is_named_with_the_known_ones(pipe, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "probe.json").write_text(json.dumps(PROBE))
    with pytest.raises(FileNotFoundError, match="dog is not a concept folder .*choose .*cat"):
        load_probe(pipe, tmp_path / "dog", "1,1,1")
    for seeds in ("8", "8,2,0", "8,2,one"):
        with pytest.raises(
            ValueError, match=f"integer for each of forget, related, unrelated.*{seeds}"
        ):
            load_probe(pipe, tmp_path / "cat", seeds)
    assert [item["seed"] for item in load_probe(pipe, tmp_path / "cat", "2,1,1").items] == [
        0,
        1,
        0,
        0,
    ]


def test_scores_have_no_interval_from_one_seed_and_revival_is_censored():
    table = pd.DataFrame(
        [
            dict(
                model="m", run="m-0", lr=1e-5, group="forget", attack_seed=seed, step=step, hit=hit
            )
            for seed, hits in ((0, (0, 0, 1)), (1, (0, 0, 0)))
            for step, hit in zip((0, 25, 50), hits, strict=False)
        ]
    )
    found = scores(table, ["model", "step"], over="attack_seed").set_index("step")
    assert (
        found.score[50] == 0.5
        and (found.low[50], found.high[50]) == (0, 1)
        and (found.n == 2).all()
    )
    assert scores(table[table.attack_seed == 0], ["step"], over="attack_seed")["low"].isna().all()
    assert (
        relearning_steps(table).revived.tolist() == [50, float("inf")]
        and (relearning_steps(table)["last"] == 50).all()
    )
