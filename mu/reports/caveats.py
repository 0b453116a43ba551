"""Report text: caveats of the results, generated from result rows."""

from mu.measures.comparison import mean_interval
from mu.reports.tables import VARIANTS, concept_rows, display_name
from mu.reports.targets import comparable_controls, model_order, protection
from mu.reports.training_tables import attackers_persist, phase_steps
from mu.reports.words import at_steps, joined, points, rate_words

PLAIN, META = VARIANTS


def caveats(rows, cards, method, lr):
    """Return sentences on what the targets do not show, or show too favourably.

    They compare the lengths of the trainings, the spread between them, what else the attack costs,
    simpler trainings and those that the targets leave out, other learning rates, and the attack
    with a single prompt. Sentences without results are left out.

    rows: of `mu.reports.collect.deduplicate`. cards: protocol cards of one training. lr: learning
    rate of the attack that the targets use.
    """
    experiment = rows[rows.panel.eq("")]
    attacked = experiment[experiment.attack.eq("HRM-m") & experiment.method.eq(method)]
    at_lr = attacked[_equal(attacked.lr, lr)]
    meta, steps = at_lr[at_lr.model == META], at_steps(at_lr)
    sentences = [
        _lengths(experiment, cards, method),
        _spread(meta, 200 if 200 in steps else steps[-1]),
        _unrelated(meta, steps),
        _controls(at_lr, steps),
        _left_out(attacked, at_lr),
        _other_rates(attacked, lr),
        _single_prompt(experiment, lr),
    ]
    return [sentence for sentence in sentences if sentence]


def _equal(rates, lr):
    return rates.sub(lr).abs() < 1e-9


def _lengths(experiment, cards, method):
    """Compare steps and attackers of meta-unlearning of one method with those of the others."""
    meta = experiment[experiment.model == META].drop_duplicates("method")
    runs = dict(zip(meta.method, meta.run, strict=True))
    steps = {name: phase_steps(cards, run) for name, run in runs.items()}
    phases = steps.pop(method, [])
    others = sorted({sum(lengths) for lengths in steps.values()})
    if not phases or not others or others == [sum(phases)]:
        return ""
    length = f"{sum(phases)} steps"
    if len(phases) > 1:
        length = f"at most {length} in {len(phases)} phases"
    other = f"{others[0]}" if len(others) == 1 else f"{others[0]} to {others[-1]}"
    if attackers_persist(cards, runs[method]):
        length += ", with simulated attackers that persist"
        if not any(attackers_persist(cards, runs[name]) for name in steps):
            other += ", with attackers that start anew at each step"
    return f"{display_name(method)} is meta-unlearned for {length}; the other methods for {other}."


def _spread(meta, step):
    """Report how much the loss of related concepts differs between trainings."""
    related = meta[meta.group == "related"]
    score = related.groupby(["training", "asked", "seed", "step"]).hit.mean().unstack("step")
    if score.empty:
        return ""
    loss = (score[meta.step.min()] - score[step]).rename("lost").reset_index()
    _, low, high = mean_interval(loss, "lost", signed=True)
    each = loss.groupby("training").lost.mean()
    if len(each) > 1:
        return (
            f"How much self-destructs varies with the training: after {step} steps of the attack "
            f"they have lost {points(each)} points of their related concepts, and the 95 % "
            f"interval of their mean reaches from {100 * low:.0f} to {100 * high:.0f}."
        )
    return (
        f"After {step} steps of the attack the one training has lost {points(each)} points of its "
        f"related concepts (95 % interval {100 * low:.0f} to {100 * high:.0f}); another one may "
        "lose more, or less."
    )


def _unrelated(meta, steps):
    """Report which share of the unrelated concepts the attack costs."""
    unrelated = meta[meta.group == "unrelated"]
    score = unrelated.groupby(["training", "step"]).hit.mean().unstack("step")
    if score.empty:
        return ""
    before = score[meta.step.min()]
    worst = (before - score.min(axis=1)).max()
    if worst < 0.005:
        return ""
    return (
        "The attack costs the meta-unlearned model unrelated concepts as well: "
        f"{before.mean():.0%} of them are recognised before it, {joined(score[steps].mean())} "
        f"after {joined(steps, '{}')} steps; in one training up to {100 * worst:.0f} points are "
        "lost."
    )


def _control_names(rows):
    return [model for model in model_order(rows) if model not in VARIANTS]


def _controls(at_lr, steps):
    """Report the concept's score, and the lost related concepts, of simpler trainings."""
    controls = _control_names(at_lr)
    if not controls:
        return ""
    score = at_lr.groupby(["group", "model", "step"]).hit.mean().unstack("step")
    related = score.loc["related"].loc[controls]
    lost = (related.iloc[:, 0] - related.min(axis=1)).max()
    concept = score.loc["forget"][steps]
    each = "; ".join(f"{model} {points(concept.loc[model])}" for model in model_order(at_lr))
    return (
        "Simpler trainings under the same attack, percent of the pictures with the concept after "
        f"{joined(steps, '{}')} steps: {each}. None of the simpler ones loses more than "
        f"{100 * lost:.0f} points of its related concepts."
    )


def _left_out(attacked, at_lr):
    """Report the lead over the controls that the targets leave out for their lower quality."""
    _, _, quality = protection(at_lr)
    compared = comparable_controls(quality, META, PLAIN)
    left_out = [model for model in _control_names(at_lr) if model not in compared]
    if not left_out or not compared:
        return ""
    before = quality.groupby("model")[["related", "unrelated"]].mean()
    poorer = []
    for model in left_out:
        difference = 100 * (before.loc[META] - before.loc[model]).max()
        poorer.append(f"{model} {difference:.0f} points fewer")
    leads = []
    for lr in sorted(attacked.lr.unique()):
        missing = protection(attacked[attacked.lr == lr])[0].groupby("model").mean()
        if {*left_out, META} <= set(missing.index) and not missing.reindex(compared).isna().all():
            with_all = 100 * (missing[META] - missing.reindex([*compared, *left_out]).max())
            without = 100 * (missing[META] - missing.reindex(compared).max())
            leads.append(f"{with_all:.0f} points instead of {without:.0f} at learning rate {lr:g}")
    return (
        "The marks that compare with “the best control of its quality” leave out what draws fewer "
        "related or unrelated concepts before any attack than the meta-unlearned model "
        f"({', '.join(poorer)}). With {'it' if len(left_out) == 1 else 'them'}, the lead in "
        f"concept missing would be {', '.join(leads)}."
    )


def _other_rates(attacked, lr):
    """Report the concept's score under attacks at other learning rates."""
    if attacked.lr.nunique() < 2:
        return ""
    return rate_words(attacked[~_equal(attacked.lr, lr)]).replace(
        "The concept is", "An attacker of another learning rate: the concept is"
    )


def _single_prompt(experiment, lr):
    """Count the methods that meta-unlearning improves under HRM-s, by step."""
    rows = concept_rows(experiment)
    rows = rows[rows.attack.eq("HRM-s") & _equal(rows.lr, lr) & (rows.step > rows.step.min())]
    score = rows.groupby(["step", "method", "model"]).hit.mean().unstack("model")
    if score.empty or not set(VARIANTS) <= set(score):
        return ""
    less = (score[META] < score[PLAIN]).groupby("step").agg(["sum", "size"])
    each = [
        f"{lower} of {size} methods after {step:.0f} steps"
        for step, (lower, size) in less.iterrows()
    ]
    return (
        "Under a single prompt, repeated (HRM-s), less of the concept is back with "
        f"meta-unlearning than without for {', '.join(each)}."
    )
