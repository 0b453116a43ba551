"""Sentences on which attacks break a defence, generated from the tables of a comparison."""

from mu.measures.comparison import working


def _listed(attacks):
    return ", ".join(attacks) or "none"


def verdict(table, gain, defended="meta-unlearned", plain="unlearned", threshold=0.5):
    """Return sentences on the defended model, its failures first.

    table: `mu.measures.comparison.attack_table`. gain: `mu.measures.comparison.gains`. An attack
    defeats a model if the concept's score at its peak is above the threshold.
    Raises ValueError if the table has no defended model.
    """
    attacks = table[table.model == defended].sort_values("peak", ascending=False)
    if attacks.empty:
        models = ", ".join(sorted(set(table.model)))
        raise ValueError(f"no attack on a model {defended!r}: the table has {models}")
    sentences = [_failures(attacks, threshold)]
    on_plain = table[table.model == plain]
    if len(on_plain):
        sentences.append(_baseline(table, on_plain, defended, plain, threshold))
        sentences.append(_advantage(gain))
    return sentences


def _peak(row):
    return f"{row.attack} ({row.peak:.0%} after {row.step:g} steps)"


def _failures(attacks, threshold):
    """Name the attacks that defeat the defended model, and the strongest."""
    top = attacks.iloc[0]
    lost = attacks[attacks.peak > threshold]
    between = f"95 % interval {top.low:.0%} to {top.high:.0%}"
    if lost.empty:
        return (
            f"None of {len(attacks)} attacks brings the concept back into more than "
            f"{threshold:.0%} of the pictures of the meta-unlearned model. The strongest against "
            f"it is {_peak(top)}, {between}."
        )
    return (
        f"Meta-unlearning fails against {len(lost)} of {len(attacks)} attacks: the concept is "
        f"recognised in more than {threshold:.0%} of the pictures after "
        f"{_listed(map(_peak, lost.itertuples()))}. The strongest is {top.attack}, {between}."
    )


def _baseline(table, on_plain, defended, plain, threshold):
    """Compare with the plain model, and name the attacks that do not work on it."""
    worst = on_plain.sort_values("peak").iloc[-1]
    text = (
        f"Against the plainly unlearned model the strongest is {_peak(worst)}; "
        f"{(on_plain.peak > threshold).sum()} of {len(on_plain)} attacks bring more than "
        f"{threshold:.0%} back."
    )
    works = working(table)
    idle = [attack for attack in on_plain.attack if plain not in works[attack]]
    if idle:
        text += (
            " These do not clearly bring it back there, so that they say nothing about the "
            f"defence: {', '.join(idle)}."
        )
    elsewhere = []
    for attack in idle:
        others = {m: peak for m, peak in works[attack].items() if m not in (plain, defended)}
        if others:
            models = ", ".join(f"{model} ({peak:.0%})" for model, peak in others.items())
            elsewhere.append(f"{attack} on {models}")
    if elsewhere:
        text += f" They do on other models: {'; '.join(elsewhere)}."
    return text


def _advantage(gain):
    """Name the attacks under which the defended model clearly does better, or worse."""
    clear, worse = gain[gain.low > 0].attack, gain[gain.high < 0].attack
    text = (
        "The meta-unlearned model gives back less than the plain one, with a 95 % interval above "
        f"0, under {len(clear)} of {len(gain)} attacks: {_listed(clear)}."
    )
    if len(worse):
        text += f" It gives back more under: {', '.join(worse)}."
    return text


def destruction_verdict(destroyed, defended="meta-unlearned"):
    """Return a sentence on the attacks under which the defended model clearly self-destructs.

    destroyed: `mu.measures.comparison.self_destruction`. Empty without a row of that model.
    """
    attacks = destroyed[destroyed.model == defended]
    attacks = attacks.sort_values("self-destruct index", ascending=False)
    if attacks.empty:
        return ""
    clear = attacks.low > 0

    def names(part):
        indices = zip(part.attack, part["self-destruct index"], strict=True)
        return _listed(f"{attack} ({index:.0%})" for attack, index in indices)

    return (
        f"Related concepts of the {defended} model self-destruct, beyond what the same training on "
        f"other images costs them and with a 95 % interval above 0, under {clear.sum()} of "
        f"{len(attacks)} attacks: {names(attacks[clear])}; not clearly, or not at all, under: "
        f"{names(attacks[~clear])}."
    )
