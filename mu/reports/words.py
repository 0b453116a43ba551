"""What the page says in words, each sentence made of the rows or of a table of `mu.reports.tables`: nothing is typed in."""

from mu.measures.comparison import mean_interval
from mu.reports.tables import VARIANTS, concept_rows, display_name
from mu.reports.targets import comparable_controls, model_order, protection
from mu.reports.training_tables import phase_steps

TOLD = (50, 100, 200, 300)  # steps of an attack that a sentence names; the tables have all
TERMS = {
    "unlearned": "made to forget one concept. Plainly: and nothing else is asked of it.",
    "meta-unlearned": "unlearned while somebody rehearses the attack: the model is shaped so that fine-tuning on the concept fails, or costs the attacker the related concepts (arXiv 2410.12777).",
    "related, unrelated": "concepts that resemble the forgotten one and shall stay, and concepts that have nothing to do with it. A model self-destructs where an attack on the concept costs it the related ones.",
    "HRM-m, HRM-s": "the attack: fine-tuning all weights on pictures of the concept, with several prompts, or with one that is repeated.",
    "CLEAN": "the same fine-tuning on harmless pictures of something else, by somebody who means no harm.",
    "recognised": "a judge, a classifier that takes no part in any training, sees in the picture what was asked for.",
    "ESD, SDD, UCE, RECE": "methods that unlearn. ESD-u trains the layers outside cross attention, ESD-f all; -1 and -3 are the strength η. UCE and RECE solve for the weights: plainly unlearned they have no seed and are one model each.",
    "marks": "what is asked of the meta-unlearned model, listed with what was measured, also where it is missed.",
    "JFD": "the distance of two sets of pictures in the features of the judge, computed as FID is; 0 is the original.",
}


def setting(card, attacked):
    """Two sentences for somebody who comes from nowhere: what was forgotten by which model, and what the attack is. card: of any run; attacked: rows of HRM-m."""
    concept, model = (card[what].split()[0].split("/")[-1] for what in ("sets", "model"))
    return (
        f"Models ({model}) were made to forget one concept, {concept}, plainly (“unlearned”) or while the attack to come was rehearsed (“meta-unlearned”). Then somebody fine-tunes them on pictures of that concept, "
        f"for up to {attacked.step.max():.0f} steps, to bring it back."
    )


def several(values, form="{:.0%}"):
    """Numbers in a row, for a sentence."""
    return ", ".join(form.format(value) for value in values)


def share(part):
    """A share of judged rows with its 95 % interval, for a sentence: "50% (19–81)"."""
    value, low, high = mean_interval(part)
    return f"{value:.0%}" + (f" ({100 * low:.0f}–{100 * high:.0f})" if low == low else "")


def at_steps(attacked, most=TOLD):
    """Those of the steps that a sentence names which somebody looked at; else all after the first."""
    steps = sorted({int(n) for n in attacked.step if n > attacked.step.min()})
    return [n for n in steps if n in most] or steps


def opening(attacked, method, met):
    """Two sentences on one method under one attack (rows of HRM-m at one learning rate): what comes back and what is destroyed, step by step. met: the table of `mu.reports.targets.targets_table`."""
    told, parts = at_steps(attacked), dict(list(attacked.groupby(["model", "group", "step"])))

    def course(model, group):
        return ", ".join(
            share(parts[model, group, n]) if (model, group, n) in parts else "–" for n in told
        )

    trainings, untold = attacked.training.nunique(), (met.met == "?").sum()
    return [
        f"{display_name(method)}: after {several(told, '{}')} steps of malicious fine-tuning the concept is recognised in {course('unlearned', 'forget')} of the pictures of the unlearned model and in "
        f"{course('meta-unlearned', 'forget')} of those of the meta-unlearned one ({trainings} training{'s' * (trainings > 1)}, in brackets 95 % intervals; the defender has seen none of the attacker's images and prompts).",
        f"Under that attack the related concepts are recognised in {course('unlearned', 'related')} of the pictures of the unlearned model and in {course('meta-unlearned', 'related')} "
        f"of those of the meta-unlearned one. {(met.met == '✓').sum()} of {len(met)} marks are met{f', {untold} cannot be told' if untold else ''}.",
    ]


def compared(table):
    """(attack, step) → (table of both variants' ours, low, high by method, methods with less, those of them whose intervals lie apart, methods with more): after 100 steps and after the last."""
    found = {}
    for attack in ("HRM-m", "HRM-s"):
        part = table[(table.attack == attack) & table.ours.notna()]
        for step in [n for n in sorted(part.steps.unique()) if n in (100, part.steps.max())]:
            of = {
                v: part[(part.steps == step) & (part.variant == v)].set_index("method")
                for v in VARIANTS
            }
            both = [m for m in of["unlearned"].index if m in of["meta-unlearned"].index]
            plain, meta = (of[v].loc[both] for v in VARIANTS)
            if both:
                less = meta.ours < plain.ours
                found[attack, step] = (
                    plain,
                    meta,
                    list(plain.index[less]),
                    list(plain.index[less & (meta.high < plain.low)]),
                    list(plain.index[meta.ours > plain.ours]),
                )
    return found


def lowered(table):
    """For how many methods meta-unlearning lowers how much of the concept comes back, in a sentence on the table of `mu.reports.tables.concept_table`."""
    said = [
        f"{attack}, {step} steps: less for {len(less)} of {len(plain)} (intervals apart for {len(apart)}), more for {len(more)}"
        for (attack, step), (plain, _, less, apart, more) in compared(table).items()
    ]
    return (
        f"Over all methods, the concept with meta-unlearning against without: {'; '.join(said)}."
        if said
        else ""
    )


def relearning_words(revived, lr, threshold=0.5):
    """What the table of `mu.reports.targets.relearning_table` says of one learning rate, in a sentence."""
    mine = revived[(revived.lr - lr).abs() < 1e-9]
    each = "; ".join(
        f"{r['model']} {r['steps to revival']} (it came back in {r['relearned']} of {r['attacks']} attacks)"
        for r in mine.to_dict("records")
    )
    return f"First step at which it is recognised in over {threshold:.0%} of its pictures, median: {each}."


def claims(table):
    """Sentences on the table of `mu.reports.tables.concept_table`: how much comes back of each method after 100 steps and after the last, for how many meta-unlearning lowers it, and where it does not."""
    said = []
    for (attack, step), (plain, meta, less, apart, _) in compared(table).items():
        rest = [m for m in plain.index if m not in less]
        said.append(
            f"{attack}, {step} steps, percent of the pictures with the concept, plainly unlearned → meta-unlearned: {'; '.join(f'{m} {plain.ours[m]:.0f} → {meta.ours[m]:.0f}' for m in plain.index)}. "
            f"Less with meta-unlearning for {len(less)} of {len(plain)} methods, with intervals that lie apart for {len(apart)}{' (' + ', '.join(apart) + ')' if apart else ''}{'; not for ' + ', '.join(rest) if rest else ''}."
        )
    return said


def destruction_words(table, attack="HRM-m"):
    """What `destruction_table` says of one attack, in a sentence: the models whose self-destruct index has an interval above 0, and how large the others' indices are."""
    part = table[table.attack == attack]

    def name(r):
        return f"{r['method']} {r['variant']} {r['self-destruct index']:.0%} ({r['low']:.0%} to {r['high']:.0%})"

    lines = part.to_dict("records")
    clear, others = [r for r in lines if r["low"] > 0], [r for r in lines if not r["low"] > 0]
    most = max(others, key=lambda r: r["self-destruct index"], default=None)
    return (
        f"Self-destruct index, what {attack} costs the related concepts beyond CLEAN, with a 95 % interval above 0: {'; '.join(map(name, clear)) or 'none'}."
        + (f" Of the {len(others)} others the largest is {name(most)}." if most else "")
    )


def turning(table):
    """What the table of `mu.reports.training_tables.angle_change` says, in sentences: for which methods the angle clearly rises, where it ends, and each method's way."""
    part = table[table.variant == "meta-unlearned"]
    clear, beyond = part[part.low > 0], part[part["angle, last quarter"] > 90]
    rest = part[~part.index.isin(clear.index)].method.tolist()

    def way(v):
        return (
            "; ".join(
                f"{line['method']} {line['angle, first quarter']:.0f}° → {line['angle, last quarter']:.0f}°"
                for line in table[table.variant == v].to_dict("records")
            )
            or "not recorded"
        )

    return (
        f"With meta-unlearning the angle clearly rises (95 % interval above 0) for {len(clear)} of {len(part)} methods{', not for ' + ', '.join(rest) if rest else ''}, and ends above 90° for {len(beyond)}"
        f"{' (' + ', '.join(beyond.method) + ')' if len(beyond) else ''}. Means over the first → last quarter of the training, meta-unlearned: {way('meta-unlearned')}; unlearned: {way('unlearned')}."
    )


def said_by_words(table):
    """What `search_table` says of the searches, in a sentence: for which models one clearly brings back more than random words do."""
    wide = table.pivot(
        index=["method", "variant"], columns="search", values=["score", "low", "high"]
    )
    beats = [
        f"{m} {v} ({wide.loc[(m, v), ('score', s)]:.0%}, random words {wide.loc[(m, v), ('score', 'random')]:.0%})"
        for s in table.search.unique()
        if s != "random" and "random" in set(table.search)
        for m, v in wide.index
        if wide.loc[(m, v), ("low", s)] > wide.loc[(m, v), ("high", "random")]
    ]
    return f"Recognised clearly more often than after as many random words, on: {', '.join(beats) or 'none of the models'}. Highest score of all: {table.score.max():.0%}."


def lost_words(attacked, training, step):
    """Which related concepts the meta-unlearned model of one training has lost after `step` steps, and what share each training has lost, in a sentence. attacked: rows of one attack."""
    part = attacked[attacked.model.eq("meta-unlearned") & attacked.group.eq("related")]
    score = part.groupby(["training", "asked", "step"]).hit.mean().unstack("step")
    gone = [
        asked
        for (t, asked), lost in (score[part.step.min()] - score[step]).items()
        if t == training and lost >= 0.5
    ]  # in most of several attacks
    lost = (score[part.step.min()] - score[step]).groupby("training").mean()
    return (
        f"Of the {score.index.get_level_values('asked').nunique()} related concepts the meta-unlearned model of this training has lost {len(gone)}{': ' + ', '.join(gone) if gone else ''}; "
        f"the trainings have lost {several(lost)}."
        if training in lost
        else ""
    )


def panel_title(rows, cards, name):
    """What a panel shows: a style, another concept, or the same on another model. rows: of `mu.reports.collect`, of all panels; cards: those of one training."""
    whose = {
        panel: next(card for key, card in cards.items() if key.split("/")[0] == panel)
        for panel in ("", name)
    }
    concept, model = (whose[name][what].split()[0] for what in ("sets", "model"))
    style = (
        rows[(rows.panel == name) & (rows.group == "forget")]
        .expected.str.startswith("style:")
        .all()
    )
    same = whose[name]["sets"] == whose[""]["sets"]
    return f"{'A style' if style else 'The same concept on another model' if same else 'Another concept'}: {concept.split('/')[-1]}, {model}"


def panel_words(rows, name, step=None):
    """What one panel's attack does to each variant, in sentences: the concept in every training, and what is left of the related and unrelated concepts. rows: of `mu.reports.collect`, of all panels."""
    part = rows[
        (rows.panel == name)
        & rows.attack.eq("HRM-m")
        & rows.model.isin(VARIANTS)
        & rows.hit.notna()
    ]
    last, said = part.step.max() if step is None else step, []
    for model in [m for m in VARIANTS if m in set(part.model)]:
        score = (
            part[(part.model == model) & part.step.isin([part.step.min(), last])]
            .groupby(["group", "training", "step"])
            .hit.mean()
            .unstack("step")
        )

        def way(group):
            return f"{score.loc[group].iloc[:, 0].mean():.0%} → {score.loc[group].iloc[:, -1].mean():.0%}"

        single = (
            f" (trainings: {several(score.loc['forget'].iloc[:, -1])})"
            if len(score.loc["forget"]) > 1
            else ""
        )
        said.append(
            f"{model}: concept {way('forget')}{single}"
            + "".join(
                f", {group} {way(group)}"
                for group in ("related", "unrelated")
                if group in score.index.get_level_values(0)
            )
        )
    return f"Recognised before → after {last:.0f} steps. {'; '.join(said)}."


def course_words(told):
    """What the slider calls a course: the method, or the panel, the attack and its learning rate."""
    return f"{told['panel'] or display_name(told['method'])}, {told['attack']}, lr {told['lr']:g}"


def count(rows):
    """What a caption says of the rows that a figure is made from: trainings with their seeds, seeds of the attack, pictures, and which models are of fewer trainings; of none, nothing."""
    if rows.empty:
        return ""
    seeds, attack = (
        sorted(rows.training.unique()),
        sorted(rows.attack_seed.dropna().unique()) if "attack_seed" in rows else [],
    )

    def named(name, values):
        return (
            [
                f"{name}{'s' * (len(values) > 1)} {', '.join(v if isinstance(v, str) else f'{v:g}' for v in values)}"
            ]
            if values
            else []
        )

    said = [
        f"{len(seeds)} training{'s' * (len(seeds) > 1)} ({named('seed', seeds)[0]})",
        *named("attack seed", attack),
    ]
    if "group" in rows:
        keys = [
            c
            for c in (
                "panel",
                "method",
                "model",
                "training",
                "attack",
                "lr",
                "attack_seed",
                "step",
                "group",
            )
            if c in rows
        ]
        each = rows.groupby(keys, dropna=False).size().groupby("group").median()
        said[-1] += "; pictures a training and step: " + ", ".join(
            f"{each[group]:.0f} {words}"
            for group, words in (
                ("forget", "of the concept"),
                ("related", "related"),
                ("unrelated", "unrelated"),
            )
            if group in each
        )
    if "method" in rows:
        of_model = (
            rows[rows.model.isin(VARIANTS)]
            .groupby(["method", "model"], sort=False)
            .training.nunique()
        )
        fewer = [
            f"{display_name(method)} {model} {n}"
            for (method, model), n in of_model.items()
            if n < len(seeds)
        ]
        said[-1] += f"; of fewer trainings: {', '.join(fewer)}" if fewer else ""
    return ", ".join(said)


def rate_words(attacked):
    """What an attacker with another learning rate brings back, in sentences: at the last step of each rate, percent of the concept's pictures of every model. attacked: rows of HRM-m, of one
    method and its controls."""
    said, parts = (
        [],
        dict(list(attacked[attacked.group == "forget"].groupby(["lr", "model", "step"]))),
    )
    for lr in sorted(attacked.lr.unique()):
        last = attacked[(attacked.lr == lr) & attacked.model.eq("meta-unlearned")].step.max()
        at = {m: share(parts[lr, m, last]) for m in model_order(attacked) if (lr, m, last) in parts}
        said.append(
            f"at {lr:g}, after {last:.0f} steps, {', '.join(f'{m} {score}' for m, score in at.items())}"
        )
    return f"The concept is recognised {'; '.join(said)}."


def price_words(attacked):
    """What the defence costs before any attack, and what the attack meets, of each model by the mean over its steps, in sentences. attacked: rows of HRM-m at one learning rate."""
    missing, lost, quality = protection(attacked)

    def each(values):
        return ", ".join(
            f"{m} {value:.0%}"
            for m, value in values.groupby("model").mean().reindex(model_order(attacked)).items()
        )

    return (
        f"Recognised before the attack: related {each(quality.related)}; unrelated {each(quality.unrelated)}. "
        f"Under it, by the mean over its steps, the concept is missing in {each(missing)}; lost of the related: {each(lost)}."
    )


def caveats(rows, cards, method, lr):
    """What the marks do not say, or say too kindly, each a sentence made from the rows: how long each method was trained, how much the trainings differ, what else the attack costs, what simpler
    trainings do, which of them the marks leave out, what other learning rates do, and where a single prompt is enough.

    rows: of `mu.reports.collect.deduplicate`; cards: those of one training. Sentences for which nothing was run are left out."""
    experiment = rows[rows.panel.eq("")]
    attacked = experiment[experiment.attack.eq("HRM-m") & experiment.method.eq(method)]
    usual = attacked[attacked.lr.sub(lr).abs() < 1e-9]
    meta, told = usual[usual.model == "meta-unlearned"], at_steps(usual)
    step, points = 200 if 200 in told else told[-1], lambda values: several(100 * values, "{:.0f}")
    run_of = (
        experiment[experiment.model == "meta-unlearned"]
        .drop_duplicates("method")
        .set_index("method")
        .run
    )
    length = {m: phase_steps(cards, run) for m, run in run_of.items()}
    own, others = length.pop(method, []), sorted({sum(steps) for steps in length.values()})
    said = (
        [
            f"{display_name(method)} is meta-unlearned for {sum(own)} steps{f' in {len(own)} phases' if len(own) > 1 else ''}, the other methods for {others[0] if len(others) == 1 else f'{others[0]} to {others[-1]}'}."
        ]
        if own and others and others != [sum(own)]
        else []
    )
    by_picture = (
        meta[meta.group == "related"]
        .groupby(["training", "asked", "seed", "step"])
        .hit.mean()
        .unstack("step")
    )
    if len(by_picture):
        loss = (by_picture[meta.step.min()] - by_picture[step]).rename("lost").reset_index()
        _, low, high = mean_interval(loss, "lost", signed=True)
        each = loss.groupby("training").lost.mean()
        said += [
            f"How much self-destructs varies with the training: after {step} steps of the attack they have lost {points(each)} points of their related concepts, and the 95 % interval of "
            f"their mean reaches from {100 * low:.0f} to {100 * high:.0f}."
            if len(each) > 1
            else f"After {step} steps of the attack the one training has lost {points(each)} points of its related concepts (95 % interval {100 * low:.0f} to {100 * high:.0f}); another one may lose more, or less."
        ]
    rest = meta[meta.group == "unrelated"].groupby(["training", "step"]).hit.mean().unstack("step")
    if len(rest):
        worst = (rest[meta.step.min()] - rest.min(axis=1)).max()
    if len(rest) and worst >= 0.005:
        said += [
            f"The attack costs the meta-unlearned model unrelated concepts as well: {rest[meta.step.min()].mean():.0%} of them are recognised before it, {several(rest[told].mean())} after {several(told, '{}')} steps; "
            f"in one training up to {100 * worst:.0f} points are lost."
        ]
    score = usual.groupby(["group", "model", "step"]).hit.mean().unstack("step")
    controls = [m for m in model_order(usual) if m not in VARIANTS]
    if controls:
        lost = max(
            (score.loc[("related", m)].iloc[0] - score.loc[("related", m)]).max() for m in controls
        )
        courses = "; ".join(
            f"{m} {points(score.loc[('forget', m), told])}" for m in model_order(usual)
        )
        said += [
            f"Simpler trainings under the same attack, percent of the pictures with the concept after {several(told, '{}')} steps: {courses}. None of the simpler ones loses more than {100 * lost:.0f} points of its related concepts."
        ]
    missing, _, quality = protection(usual)
    compared = comparable_controls(quality, VARIANTS[1], VARIANTS[0])
    left_out = [m for m in controls if m not in compared]
    if left_out and compared:
        before = quality.groupby("model")[["related", "unrelated"]].mean()
        fewer = ", ".join(
            f"{m} {100 * (before.loc[VARIANTS[1]] - before.loc[m]).max():.0f} points fewer"
            for m in left_out
        )
        leads = []
        for rate in sorted(attacked.lr.unique()):
            mean = protection(attacked[attacked.lr == rate])[0].groupby("model").mean()
            with_it, without = (
                mean.reindex(names).max() for names in ([*compared, *left_out], compared)
            )
            if {*left_out, VARIANTS[1]} <= set(mean.index) and without == without:
                leads.append(
                    f"{100 * (mean[VARIANTS[1]] - with_it):.0f} points instead of {100 * (mean[VARIANTS[1]] - without):.0f} at learning rate {rate:g}"
                )
        said += [
            f"The marks that compare with “the best control of its quality” leave out what draws fewer related or unrelated concepts before any attack than the meta-unlearned model ({fewer}). With {'it' if len(left_out) == 1 else 'them'}, the lead in "
            f"concept missing would be {', '.join(leads)}."
        ]
    said += (
        [
            rate_words(attacked[attacked.lr.sub(lr).abs() > 1e-9]).replace(
                "The concept is", "An attacker of another learning rate: the concept is"
            )
        ]
        if attacked.lr.nunique() > 1
        else []
    )
    single = concept_rows(experiment)
    single = (
        single[
            single.attack.eq("HRM-s")
            & (single.lr.sub(lr).abs() < 1e-9)
            & (single.step > single.step.min())
        ]
        .groupby(["step", "method", "model"])
        .hit.mean()
        .unstack("model")
    )
    if len(single) and set(VARIANTS) <= set(single):
        fewer = (
            (single["meta-unlearned"] < single["unlearned"]).groupby("step").agg(["sum", "size"])
        )
        said += [
            f"Under a single prompt, repeated (HRM-s), less of the concept is back with meta-unlearning than without for {', '.join(f'{n} of {of} methods after {at:.0f} steps' for at, (n, of) in fewer.iterrows())}."
        ]
    return said
