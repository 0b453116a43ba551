"""Protocol cards: the facts that a number depends on, and one table per protocol."""

import pandas as pd

# facts that tell one number of a table from another, or where and when it was computed
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
    "computed_in",  # what precision "auto" chose: runs that differ in it alone may share a table
)


def add_numbers(sheet, name, values, facts):
    """Add numbers and the facts of their card to a row of a sheet.

    sheet: name → (numbers, facts), the input of `one_table`.
    """
    numbers, card = sheet.setdefault(name, ({}, {}))
    numbers |= values
    card |= facts


def same_protocol(cards, may_differ=MAY_DIFFER):
    """Return the facts that all cards share.

    cards: name of a number → its card (`mu.params.protocol`). may_differ: facts to ignore.
    Raises ValueError that names the first fact that differs and the numbers concerned.
    """
    if not cards:
        raise ValueError("no cards to compare: a number needs its protocol card")
    facts = dict.fromkeys(fact for card in cards.values() for fact in card)
    for fact in [fact for fact in facts if fact not in may_differ]:
        values = [card.get(fact, "missing") for card in cards.values()]
        if any(value != values[0] for value in values):
            groups = {}
            for name, value in zip(cards, values, strict=True):
                groups.setdefault(str(value), []).append(name)
            found = "; ".join(f"{value} for {', '.join(names)}" for value, names in groups.items())
            raise ValueError(
                f"the protocols differ: {fact} is {found}. Measure them alike, make two tables, "
                f"or add {fact!r} to may_differ"
            )
    first = next(iter(cards.values()))
    return {fact: value for fact, value in first.items() if fact not in may_differ}


def one_table(numbers, may_differ=MAY_DIFFER):
    """Return a DataFrame with one row per name; `attrs["protocol"]` holds the shared facts.

    numbers: name → (a number or a dict of them, card). Raises ValueError as `same_protocol` does,
    and for a number without a card.
    """
    bare = [str(name) for name, (_, card) in numbers.items() if not card]
    if bare:
        raise ValueError(f"no card for {', '.join(bare)}: a number needs its protocol card")
    shared = same_protocol({name: card for name, (_, card) in numbers.items()}, may_differ)
    rows = {
        name: values if isinstance(values, dict) else {"value": values}
        for name, (values, _) in numbers.items()
    }
    table = pd.DataFrame(rows).T.infer_objects().rename_axis("run")
    table.attrs["protocol"] = shared
    return table


def _text(value):
    """Format a fact on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def card_text(card, hidden=("commit", "machine", "python", "run", "files")):
    """Return the card as lines "fact: value", without empty and hidden facts."""
    shown = {fact: value for fact, value in card.items() if fact not in hidden}
    return "\n".join(
        f"{fact.replace('_', ' ')}: {_text(value)}"
        for fact, value in shown.items()
        if value not in ("", None, {}, [])
    )
