"""The protocol card next to every number, and the refusal to put numbers of different protocols into one table."""

import pandas as pd


def note(sheet, name, values, facts):
    """Add numbers, and what belongs on their card, to a line of a sheet: name → (numbers, facts), as `mu.measures.card.one_table` takes it."""
    numbers, card = sheet.setdefault(name, ({}, {}))
    numbers |= values
    card |= facts


# what tells one number of a table from another, and where and when it was computed
MAY_DIFFER = (
    "run",
    "weights",
    "start",
    "files",
    "name",
    "seed",
    "commit",
    "machine",
    "python",
    "versions",
    "blurred",
)


def _differing(cards, may_differ):
    """The first fact that the cards do not share, and what each says of it; None if they share all."""
    names = dict.fromkeys(fact for card in cards.values() for fact in card)
    for fact in (fact for fact in names if fact not in may_differ):
        said = {name: card.get(fact, "nothing") for name, card in cards.items()}
        if any(value != next(iter(said.values())) for value in said.values()):
            return fact, said
    return None


def same_protocol(cards, may_differ=MAY_DIFFER):
    """The facts that all cards share, where they may stand in one table.

    cards: name of a number → its card (`mu.params.protocol`). may_differ: facts that need not be the same.
    Raises ValueError that names the first fact that differs, and the numbers concerned."""
    if not cards:
        raise ValueError(
            "there are no cards to compare: a number without its card goes into no table"
        )
    found = _differing(cards, may_differ)
    if found:
        fact, said = found
        groups = {}
        for name, value in said.items():
            groups.setdefault(str(value), []).append(name)
        words = "; ".join(f"{value} for {', '.join(names)}" for value, names in groups.items())
        raise ValueError(
            f"numbers of different protocols do not go into one table: {fact} is {words}. Measure them alike, make two tables, "
            f"or, where it does not matter here, name {fact!r} in may_differ"
        )
    first = next(iter(cards.values()))
    return {fact: value for fact, value in first.items() if fact not in may_differ}


def one_table(numbers, may_differ=MAY_DIFFER):
    """DataFrame of numbers, a line a name; the card that they share is in its `attrs["protocol"]`.

    numbers: name → (a number, or a dict of them, and its card). Raises as `same_protocol` does, and ValueError for a number that is no card's."""
    bare = [name for name, (_, card) in numbers.items() if not card]
    if bare:
        raise ValueError(
            f"no card goes with {', '.join(map(str, bare))}: a number without its protocol goes into no table"
        )
    shared = same_protocol({name: card for name, (_, card) in numbers.items()}, may_differ)
    table = pd.DataFrame(
        {
            name: values if isinstance(values, dict) else {"value": values}
            for name, (values, _) in numbers.items()
        }
    ).T
    table = table.infer_objects().rename_axis("run")
    table.attrs["protocol"] = shared
    return table


def card_text(card, left_out=("commit", "machine", "python", "run", "files")):
    """The card as short lines, "fact: value", nested facts behind one another; for people, beside a table."""

    def text(value):
        if isinstance(value, dict):
            return ", ".join(f"{name} {text(inner)}" for name, inner in value.items())
        return (
            ", ".join(map(text, value))
            if isinstance(value, (list, tuple))
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )

    return "\n".join(
        f"{fact.replace('_', ' ')}: {text(value)}"
        for fact, value in card.items()
        if fact not in left_out and value not in ("", None, {}, [])
    )
