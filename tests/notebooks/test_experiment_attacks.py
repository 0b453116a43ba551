"""Every kind of attack in one table: notebooks 30, 31 and 35."""

import pytest
from experiment import SHORT_ATTACK, read, tiny_experiment

pytestmark = pytest.mark.notebooks
KINDS = {
    "one-prompt": dict(prompts=1),
    "lora": dict(subset="lora", rank=2),
    "mixed": dict(mixed_set="defender/retain-related"),
    "sgd": dict(optimizer="sgd"),
    "phased": dict(warmup_set="attacker/clean", warmup_steps=1),
    "dreambooth": dict(kind="dreambooth", class_images=2),
    "merged": dict(merge_share=1.0),
    "one-word": dict(kind="textual-inversion", word="cup", init_word="banana", drawn_images=2),
}
SEARCHES = ["random", "unlearn-diff-atk", "p4d", "ring-a-bell", "concept-inversion"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with tiny_experiment(tmp_path_factory.mktemp("attacks")) as made:
        made.train()
        yield made


@pytest.mark.parametrize("name", KINDS)
def test_an_attack_by_training_saves_its_rows(experiment, name):
    options = KINDS[name] | SHORT_ATTACK
    experiment.run("30_attack_finetune", output=f"30_{name}", name=name, **options)
    rows = read(experiment.runs, "attack", f"{name}.json")["rows"]
    assert len(rows) == 2 * 2 * 4


def test_every_kind_of_attack_is_in_one_table(experiment):
    """Uses the attacks of the tests above."""
    experiment.run(
        "31_attack_prompts",
        searches=",".join(SEARCHES),
        word="cup",
        init_word="banana",
        population=8,
        drawn_images=2,
        candidates=2,
        images_per_prompt=1,
        **SHORT_ATTACK,
    )
    experiment.run(
        "30_attack_finetune",
        output="30_harmless",
        name="harmless",
        attack="clean",
        **SHORT_ATTACK,
    )
    names, report = [*KINDS, *SEARCHES], experiment.base / "attacks-report"
    given = dict(out=str(experiment.runs), report=str(report), clean="harmless")
    experiment.run("35_compare_attacks", attacks=",".join(names), **given)
    table = read(report, "tables", "attacks.csv")
    assert set(table.attack) == set(names)
    assert len(table) == 2 * len(names)
    assert {"images", "seconds", "low", "revived"} <= set(table.columns)
    page = (report / "index.html").read_text()
    for text in ("eta-unlearn", "figures/attacks.svg", "ring-a-bell"):
        assert text in page


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(kind="prefix-tuning"), "unknown kind of attack 'prefix-tuning'"),
        (dict(warmup_set="attacker/clean"), "warmup_steps=0"),
        (
            dict(kind="dreambooth", mixed_set="attacker/clean"),
            "'dreambooth' has no mixed_set='attacker/clean'",
        ),
        (dict(kind="textual-inversion"), "is not one token"),
    ],
)
def test_an_attack_refuses_wrong_options(experiment, wrong, words):
    given = dict(output="30_wrong", name="wrong") | SHORT_ATTACK | wrong
    with pytest.raises(RuntimeError, match=words):
        experiment.run("30_attack_finetune", **given)


def test_an_unknown_search_is_refused(experiment):
    given = dict(output="31_wrong", searches="random,grid") | SHORT_ATTACK
    with pytest.raises(RuntimeError, match="unknown search.*'grid'.*unlearn-diff-atk"):
        experiment.run("31_attack_prompts", **given)
