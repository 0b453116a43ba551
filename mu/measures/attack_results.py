"""Read the results of attacks and restrict them to what an attacker can afford."""

from pathlib import Path

import pandas as pd

from mu.files import read_json
from mu.measures.card import same_protocol

# facts of the protocol cards that must agree for two scores to be comparable
SHARED_FACTS = (
    "model",
    "sets",
    "judge",
    "precision",
    "probe_seeds",
    "concept_prompts",
    "sampling_steps",
    "sampling_guidance",
)
# facts of a training that must agree with CLEAN's for CLEAN to be its reference
TRAINING_FACTS = ("kind", "subset", "rank", "lr", "optimizer", "batch_size")


def read_attacks(folder, names=None):
    """Return rows of all scored images, costs, and protocol cards by attack name.

    Reads the JSON files that 30_attack_finetune and 31_attack_prompts write to a folder: `names`,
    or all. Adds "training", the number at the end of a run's name or "", and "asked", the
    evaluation prompt, which a prompt search replaces.
    Raises FileNotFoundError for a missing file and ValueError if protocols differ, if a run is not
    the same model in two attacks, if step 0 is missing, and if concept images have no score.
    """
    available = sorted(file.stem for file in Path(folder).glob("*.json"))
    found = {name: read_json(Path(folder) / f"{name}.json") for name in names or available}
    absent = [name for name, made in found.items() if made is None]
    if absent or not found:
        raise FileNotFoundError(
            f"{folder} has no attack {', '.join(absent) or 'at all'}: run 30_attack_finetune or "
            f"31_attack_prompts first; available: {', '.join(available) or 'none'}"
        )
    cards = {name: made["protocol"] for name, made in found.items()}
    shared = {name: {fact: card.get(fact) for fact in SHARED_FACTS} for name, card in cards.items()}
    same_protocol(shared, may_differ=())
    _check_models(cards)

    def table(part):
        tables = [pd.DataFrame(made[part]).assign(name=name) for name, made in found.items()]
        joined = pd.concat(tables, ignore_index=True)
        number = joined.run.str.extract(r"-(\d+)$", expand=False)
        return joined.assign(training=number.fillna(""))

    rows, budget = table("rows"), table("budget")
    _check_rows(rows)
    return rows.assign(asked=rows.get("asked", rows.prompt).fillna(rows.prompt)), budget, cards


def _check_models(cards):
    """Raise ValueError if a run has different weights in two attacks."""
    known = {}
    for name, card in cards.items():
        for run, weights in (card.get("weights") or {}).items():
            other, earlier = known.setdefault(run, (name, weights))
            if earlier != weights:
                raise ValueError(
                    f"{run} is not the same model in {other} and {name} ({earlier}, {weights}): "
                    "it was retrained in between; attack it again"
                )


def _check_rows(rows):
    """Raise ValueError if an attack lacks step 0 or scores of concept images."""
    late = [name for name, part in rows.groupby("name") if part.step.min() != 0]
    if late:
        raise ValueError(
            f"{', '.join(late)} was not evaluated before the attack: add step 0 to `at`"
        )
    missing = rows[rows.hit.isna() & rows.group.eq("forget")].groupby("name").size()
    if len(missing):
        counts = ", ".join(f"{count} images of {name!r}" for name, count in missing.items())
        raise ValueError(
            f"{counts} have no score: attack again with a judge, or leave these attacks out"
        )


def trained_alike(cards, clean):
    """Return the names of the attacks that train as the CLEAN fine-tuning does.

    cards: protocol cards by attack name. clean: CLEAN's card. A higher learning rate or other
    trained weights destroy more by themselves, so that CLEAN is no reference for them.
    """
    wanted = [clean.get(fact) for fact in TRAINING_FACTS]
    return [
        name
        for name, card in cards.items()
        if [card.get(fact) for fact in TRAINING_FACTS] == wanted
    ]


def within_budget(rows, budget, steps=0, images=0, seconds=0):
    """Return rows and costs up to a maximum of steps, images and seconds; 0: no limit.

    Step 0, before the attack, is always included. Seconds refer to the machine of the attack and
    are means over runs and seeds, so that all models are evaluated at the same steps.
    """
    spent = budget.groupby(["name", "step"], as_index=False)[["images", "seconds"]].mean()
    affordable = True
    for cost, most in ((spent.step, steps), (spent.images, images), (spent.seconds, seconds)):
        affordable &= (cost <= most) | (spent.step == 0) | (not most)
    spent = spent.loc[affordable, ["name", "step"]]
    return rows.merge(spent, on=["name", "step"]), budget.merge(spent, on=["name", "step"])


def best_restart(rows, budget, names):
    """Return rows and costs in which each attack in `names` is the best of its restarts.

    Its attacker restarts from several seeds and keeps, for each run, the seed with the highest
    peak. The costs are those of all seeds.
    """
    keys, restarted = ["name", "run", "attack_seed"], rows.name.isin(names)
    scores = rows[restarted & rows.group.eq("forget")].groupby([*keys, "step"]).hit.mean()
    peaks = scores.groupby(level=keys).max()
    best = peaks.groupby(level=["name", "run"]).idxmax() if len(peaks) else []
    kept = ~restarted | pd.MultiIndex.from_frame(rows[keys]).isin(list(best))

    def as_one_seed(table):
        return table.assign(attack_seed=table.attack_seed.mask(table.name.isin(names), 0))

    costs = ("images", "passes", "seconds")
    same = [column for column in budget.columns if column not in ("attack_seed", *costs)]
    summed = budget.groupby(same, sort=False, dropna=False, as_index=False).agg(
        attack_seed=("attack_seed", "first"),
        images=("images", "max"),
        passes=("passes", "sum"),
        seconds=("seconds", "sum"),
    )
    parts = [budget[~budget.name.isin(names)], summed[summed.name.isin(names)]]
    return as_one_seed(rows[kept]), pd.concat(parts, ignore_index=True)
