"""Report text: titles and captions of figures, generated from result rows."""

from mu.reports.tables import VARIANTS, display_name
from mu.reports.words import joined

# Columns that identify the images of one training and step.
IMAGE_KEYS = (
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


def attack_title(facts):
    """Return the title of an attack in the explorer: method or panel, attack, learning rate."""
    subject = facts["panel"] or display_name(facts["method"])
    return f"{subject}, {facts['attack']}, lr {facts['lr']:g}"


def panel_title(rows, cards, name):
    """Return the title of a panel: a style, another concept, or the same on another model.

    rows: of `mu.reports.collect`, of all panels. cards: those of one training.
    """
    main, card = (
        next(card for key, card in cards.items() if key.split("/")[0] == panel)
        for panel in ("", name)
    )
    concept, model = (card[key].split()[0] for key in ("sets", "model"))
    forget = rows[(rows.panel == name) & (rows.group == "forget")]
    if forget.expected.str.startswith("style:").all():
        kind = "A style"
    elif card["sets"] == main["sets"]:
        kind = "The same concept on another model"
    else:
        kind = "Another concept"
    return f"{kind}: {concept.split('/')[-1]}, {model}"


def panel_words(rows, name, step=None):
    """Return sentences on each variant of a panel before and after HRM-m.

    rows: of `mu.reports.collect`, of all panels. step: by default the last.
    """
    part = rows[
        (rows.panel == name)
        & rows.attack.eq("HRM-m")
        & rows.model.isin(VARIANTS)
        & rows.hit.notna()
    ]
    first, last = part.step.min(), part.step.max() if step is None else step
    part = part[part.step.isin([first, last])]
    sentences = [
        _panel_scores(part[part.model == model], model)
        for model in VARIANTS
        if model in set(part.model)
    ]
    return f"Recognised before → after {last:.0f} steps. {'; '.join(sentences)}."


def _panel_scores(part, model):
    """Return the scores of one variant of a panel, by group; of the concept, by training."""
    score = part.groupby(["group", "training", "step"]).hit.mean().unstack("step")
    known = set(score.index.get_level_values("group"))

    def change(group):
        before, after = (score.loc[group].iloc[:, i].mean() for i in (0, -1))
        return f"{before:.0%} → {after:.0%}"

    text = f"{model}: concept {change('forget')}"
    by_training = score.loc["forget"].iloc[:, -1]
    if len(by_training) > 1:
        text += f" (trainings: {joined(by_training)})"
    for group in ("related", "unrelated"):
        if group in known:
            text += f", {group} {change(group)}"
    return text


def count(rows):
    """Return what a caption reports of the rows of a figure, "" without any.

    Trainings and attacks with their seeds, images per training and step (the median), and models
    with fewer trainings.
    """
    if rows.empty:
        return ""
    seeds = sorted(rows.training.unique())
    parts = [f"{len(seeds)} training{'s' * (len(seeds) > 1)} ({_seeds('seed', seeds)})"]
    attack_seeds = sorted(rows.attack_seed.dropna().unique()) if "attack_seed" in rows else []
    if attack_seeds:
        parts.append(_seeds("attack seed", attack_seeds))
    text = ", ".join(parts)
    if "group" in rows:
        text += f"; pictures a training and step: {_image_counts(rows)}"
    if "method" in rows:
        models = rows[rows.model.isin(VARIANTS)].groupby(["method", "model"], sort=False)
        fewer = [
            f"{display_name(method)} {model} {n}"
            for (method, model), n in models.training.nunique().items()
            if n < len(seeds)
        ]
        text += f"; of fewer trainings: {', '.join(fewer)}" if fewer else ""
    return text


def _seeds(name, values):
    texts = [value if isinstance(value, str) else f"{value:g}" for value in values]
    return f"{name}{'s' * (len(values) > 1)} {', '.join(texts)}"


def _image_counts(rows):
    keys = [key for key in IMAGE_KEYS if key in rows]
    each = rows.groupby(keys, dropna=False).size().groupby("group").median()
    names = {"forget": "of the concept", "related": "related", "unrelated": "unrelated"}
    return ", ".join(f"{each[group]:.0f} {name}" for group, name in names.items() if group in each)
