"""Report text: sentences generated from result rows or from the tables of `mu.reports.tables`."""

from dataclasses import dataclass

import pandas as pd

from mu.measures.comparison import mean_interval
from mu.reports.tables import VARIANTS, display_name
from mu.reports.targets import model_order, protection

NAMED_STEPS = (50, 100, 200, 300)  # steps of an attack that sentences name; the tables have all
TERMS = {
    "unlearned": "made to forget one concept. Plainly: and nothing else is asked of it.",
    "meta-unlearned": (
        "unlearned while somebody rehearses the attack: the model is shaped so that fine-tuning on "
        "the concept fails, or costs the attacker the related concepts (arXiv 2410.12777)."
    ),
    "related, unrelated": (
        "concepts that resemble the forgotten one and shall stay, and concepts that have nothing "
        "to do with it. A model self-destructs where an attack on the concept costs it the related "
        "ones."
    ),
    "HRM-m, HRM-s": (
        "the attack: fine-tuning all weights on pictures of the concept, with several prompts, or "
        "with one that is repeated."
    ),
    "CLEAN": (
        "the same fine-tuning on harmless pictures of something else, by somebody who means no "
        "harm."
    ),
    "recognised": (
        "a judge, a classifier that takes no part in any training, sees in the picture what was "
        "asked for."
    ),
    "ESD, SDD, UCE, RECE": (
        "methods that unlearn. ESD-u trains the layers outside cross attention, ESD-f all; -1 and "
        "-3 are the strength η. UCE and RECE solve for the weights: plainly unlearned they have no "
        "seed and are one model each."
    ),
    "marks": (
        "what is asked of the meta-unlearned model, listed with what was measured, also where it "
        "is missed."
    ),
    "JFD": (
        "the distance of two sets of pictures in the features of the judge, computed as FID is; 0 "
        "is the original."
    ),
}


def setting(card, attacked):
    """Return two introductory sentences: the models and their concept, and the attack.

    card: protocol card of any run. attacked: rows of HRM-m.
    """
    concept, model = (card[key].split()[0].split("/")[-1] for key in ("sets", "model"))
    return (
        f"Models ({model}) were made to forget one concept, {concept}, plainly (“unlearned”) or "
        "while the attack to come was rehearsed (“meta-unlearned”). Then somebody fine-tunes them "
        f"on pictures of that concept, for up to {attacked.step.max():.0f} steps, to bring it back."
    )


def joined(values, form="{:.0%}"):
    """Return formatted numbers as a list in a sentence."""
    return ", ".join(form.format(value) for value in values)


def points(shares):
    """Return shares in percentage points as a list in a sentence."""
    return joined(100 * shares, "{:.0f}")


def score_text(part):
    """Return the mean score of rows with its 95 % interval, as in "50% (19–81)"."""
    value, low, high = mean_interval(part)
    if pd.isna(low):
        return f"{value:.0%}"
    return f"{value:.0%} ({100 * low:.0f}–{100 * high:.0f})"


def at_steps(attacked, named=NAMED_STEPS):
    """Return the evaluated steps that are in `named`; without any, all but the first."""
    steps = sorted({int(n) for n in attacked.step if n > attacked.step.min()})
    return [n for n in steps if n in named] or steps


def opening(attacked, method, met):
    """Return two sentences on one method: relearning and self-destruction, step by step.

    attacked: rows of HRM-m at one learning rate. met: of `mu.reports.targets.targets_table`.
    """
    steps = at_steps(attacked)
    parts = dict(list(attacked.groupby(["model", "group", "step"])))

    def scores(model, group):
        keys = [(model, group, step) for step in steps]
        return ", ".join(score_text(parts[key]) if key in parts else "–" for key in keys)

    trainings, unclear = attacked.training.nunique(), (met.met == "?").sum()
    return [
        f"{display_name(method)}: after {joined(steps, '{}')} steps of malicious fine-tuning the "
        f"concept is recognised in {scores('unlearned', 'forget')} of the pictures of the "
        f"unlearned model and in {scores('meta-unlearned', 'forget')} of those of the "
        f"meta-unlearned one ({trainings} training{'s' * (trainings > 1)}, in brackets 95 % "
        "intervals; the defender has seen none of the attacker's images and prompts).",
        "Under that attack the related concepts are recognised in "
        f"{scores('unlearned', 'related')} of the pictures of the unlearned model and in "
        f"{scores('meta-unlearned', 'related')} of those of the meta-unlearned one. "
        f"{(met.met == '✓').sum()} of {len(met)} marks are met"
        f"{f', {unclear} cannot be told' if unclear else ''}.",
    ]


@dataclass(frozen=True)
class Comparison:
    """Concept scores of the methods with both variants, after one attack and step."""

    plain: pd.DataFrame  # ours, low, high by method
    meta: pd.DataFrame  # the same of the meta-unlearned variant
    less: list  # methods that meta-unlearning lowers
    apart: list  # those whose intervals do not overlap
    more: list  # methods that it raises


def compare_variants(table):
    """Return (attack, step) → `Comparison`, after 100 steps and after the last.

    table: of `mu.reports.tables.concept_table`.
    """
    found = {}
    for attack in ("HRM-m", "HRM-s"):
        part = table[(table.attack == attack) & table.ours.notna()]
        for step in [n for n in sorted(part.steps.unique()) if n in (100, part.steps.max())]:
            at_step = part[part.steps == step]
            plain, meta = (at_step[at_step.variant == v].set_index("method") for v in VARIANTS)
            both = [method for method in plain.index if method in meta.index]
            plain, meta = plain.loc[both], meta.loc[both]
            less, apart = meta.ours < plain.ours, meta.high < plain.low
            if both:
                found[attack, step] = Comparison(
                    plain,
                    meta,
                    less=list(plain.index[less]),
                    apart=list(plain.index[less & apart]),
                    more=list(plain.index[meta.ours > plain.ours]),
                )
    return found


def lowered(table):
    """Return a sentence on how many methods meta-unlearning improves, "" without any.

    table: of `mu.reports.tables.concept_table`.
    """
    counts = [
        f"{attack}, {step} steps: less for {len(found.less)} of {len(found.plain)} "
        f"(intervals apart for {len(found.apart)}), more for {len(found.more)}"
        for (attack, step), found in compare_variants(table).items()
    ]
    if not counts:
        return ""
    return (
        f"Over all methods, the concept with meta-unlearning against without: {'; '.join(counts)}."
    )


def claims(table):
    """Return sentences on the concept after each attack, by method, and where it is lower.

    table: of `mu.reports.tables.concept_table`.
    """
    sentences = []
    for (attack, step), found in compare_variants(table).items():
        plain, meta = found.plain.ours, found.meta.ours
        changes = "; ".join(f"{m} {plain[m]:.0f} → {meta[m]:.0f}" for m in plain.index)
        rest = ", ".join(m for m in plain.index if m not in found.less)
        apart = ", ".join(found.apart)
        sentences.append(
            f"{attack}, {step} steps, percent of the pictures with the concept, plainly unlearned "
            f"→ meta-unlearned: {changes}. Less with meta-unlearning for {len(found.less)} of "
            f"{len(plain)} methods, with intervals that lie apart for {len(found.apart)}"
            f"{f' ({apart})' if apart else ''}{f'; not for {rest}' if rest else ''}."
        )
    return sentences


def relearning_words(revived, lr, threshold=0.5):
    """Return a sentence on `mu.reports.targets.relearning_table` at one learning rate."""
    at_lr = revived[(revived.lr - lr).abs() < 1e-9]
    each = "; ".join(
        f"{row['model']} {row['steps to revival']} "
        f"(it came back in {row['relearned']} of {row['attacks']} attacks)"
        for row in at_lr.to_dict("records")
    )
    return (
        f"First step at which it is recognised in over {threshold:.0%} of its pictures, median: "
        f"{each}."
    )


def destruction_words(table, attack="HRM-m"):
    """Return sentences on `mu.reports.tables.destruction_table` under one attack.

    They name the models whose self-destruct index has an interval above 0, and the largest index
    of the others.
    """

    def name(row):
        return (
            f"{row['method']} {row['variant']} {row['self-destruct index']:.0%} "
            f"({row['low']:.0%} to {row['high']:.0%})"
        )

    lines = table[table.attack == attack].to_dict("records")
    clear = "; ".join(name(row) for row in lines if row["low"] > 0)
    others = [row for row in lines if not row["low"] > 0]
    text = (
        f"Self-destruct index, what {attack} costs the related concepts beyond CLEAN, with a 95 % "
        f"interval above 0: {clear or 'none'}."
    )
    if others:
        largest = max(others, key=lambda row: row["self-destruct index"])
        text += f" Of the {len(others)} others the largest is {name(largest)}."
    return text


def turning(table):
    """Return sentences on `mu.reports.training_tables.angle_change`.

    They name the methods whose angle clearly rises and the methods that end above 90°, and give
    the change of each.
    """
    part = table[table.variant == "meta-unlearned"]
    rises, beyond = part.low > 0, part["angle, last quarter"] > 90
    rest, above = ", ".join(part.method[~rises]), ", ".join(part.method[beyond])

    def changes(variant):
        each = []
        for row in table[table.variant == variant].to_dict("records"):
            first, last = row["angle, first quarter"], row["angle, last quarter"]
            each.append(f"{row['method']} {first:.0f}° → {last:.0f}°")
        return "; ".join(each) or "not recorded"

    return (
        "With meta-unlearning the angle clearly rises (95 % interval above 0) for "
        f"{rises.sum()} of {len(part)} methods{f', not for {rest}' if rest else ''}, and ends "
        f"above 90° for {beyond.sum()}{f' ({above})' if above else ''}. Means over "
        "the first → last quarter of the training, meta-unlearned: "
        f"{changes('meta-unlearned')}; unlearned: {changes('unlearned')}."
    )


def search_words(table):
    """Return sentences on `mu.reports.tables.search_table`: searches that beat random words."""
    columns = ["score", "low", "high"]
    wide = table.pivot(index=["method", "variant"], columns="search", values=columns)
    searches = set(table.search)
    beats = []
    for search in table.search.unique() if "random" in searches else ():
        for model, row in wide.iterrows():
            if search != "random" and row["low", search] > row["high", "random"]:
                found, chance = row["score", search], row["score", "random"]
                beats.append(f"{' '.join(model)} ({found:.0%}, random words {chance:.0%})")
    return (
        "Recognised clearly more often than after as many random words, on: "
        f"{', '.join(beats) or 'none of the models'}. Highest score of all: "
        f"{table.score.max():.0%}."
    )


def lost_words(attacked, training, step):
    """Return a sentence on related concepts that the meta-unlearned model lost after `step` steps.

    It names those of one training, and gives the share that each training has lost; "" if the
    training is unknown. attacked: rows of one attack.
    """
    part = attacked[attacked.model.eq("meta-unlearned") & attacked.group.eq("related")]
    score = part.groupby(["training", "asked", "step"]).hit.mean().unstack("step")
    loss = score[part.step.min()] - score[step]
    by_training = loss.groupby("training").mean()
    if training not in by_training:
        return ""
    # Lost in at least half of the images, of one or of several attacks.
    gone = [asked for (t, asked), lost in loss.items() if t == training and lost >= 0.5]
    return (
        f"Of the {score.index.get_level_values('asked').nunique()} related concepts the "
        f"meta-unlearned model of this training has lost {len(gone)}"
        f"{': ' + ', '.join(gone) if gone else ''}; the trainings have lost {joined(by_training)}."
    )


def rate_words(attacked):
    """Return a sentence on the concept's score after the last step, by learning rate and model.

    attacked: rows of HRM-m, of one method and its controls.
    """
    concept = attacked[attacked.group == "forget"]
    parts = dict(list(concept.groupby(["lr", "model", "step"])))
    each = []
    for lr in sorted(attacked.lr.unique()):
        last = attacked[(attacked.lr == lr) & attacked.model.eq("meta-unlearned")].step.max()
        scores = [
            f"{model} {score_text(parts[lr, model, last])}"
            for model in model_order(attacked)
            if (lr, model, last) in parts
        ]
        each.append(f"at {lr:g}, after {last:.0f} steps, {', '.join(scores)}")
    return f"The concept is recognised {'; '.join(each)}."


def cost_words(attacked):
    """Return sentences on each model's quality before the attack and its protection under it.

    attacked: rows of HRM-m at one learning rate; scores under attack are means over its steps.
    """
    missing, lost, quality = protection(attacked)
    order = model_order(attacked)

    def each(values):
        means = values.groupby("model").mean().reindex(order)
        return ", ".join(f"{model} {value:.0%}" for model, value in means.items())

    return (
        f"Recognised before the attack: related {each(quality.related)}; "
        f"unrelated {each(quality.unrelated)}. Under it, by the mean over its steps, the concept "
        f"is missing in {each(missing)}; lost of the related: {each(lost)}."
    )
