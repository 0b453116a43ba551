"""Small files that hold the results of one training: written, read, and completed."""

import gzip
from dataclasses import dataclass

import pandas as pd

from mu.files import atomic, read_json, save_json

FACTS = ["panel", "method", "model", "run", "training"]  # of a run
COLUMNS = [
    *FACTS,
    *("attack", "name", "lr", "attack_seed"),
    *("step", "group", "asked", "prompt", "seed", "expected", "seen", "hit"),
]
NUMBERS = ("lr", "attack_seed", "step", "seed", "hit")
TEXT_COLUMNS = [column for column in COLUMNS if column not in NUMBERS]


@dataclass(frozen=True)
class Collected:
    """What one training's files hold; see `collect`."""

    rows: pd.DataFrame
    records: pd.DataFrame
    cards: dict
    numbers: dict
    sheets: list | None = None  # facts of sprite sheets; None: no images are kept

    def completed(self, earlier):
        """Return all of this, and what `earlier` has of runs that are missing here."""
        rows = _missing(self.rows, earlier.rows)
        places = zip(rows.panel, rows.run, rows["name"], strict=True)
        known = {name for panel, run, attack in places for name in _cards(panel, run, attack)}
        cards = {name: card for name, card in earlier.cards.items() if name in known}
        for name in cards.keys() & self.cards.keys():  # an attack on these runs and on those
            weights = [found[name].get("weights") for found in (cards, self.cards)]
            if all(isinstance(value, dict) for value in weights):
                cards[name] = self.cards[name] | {"weights": weights[0] | weights[1]}
        return Collected(
            pd.concat([self.rows, rows], ignore_index=True),
            pd.concat([self.records, _missing(self.records, earlier.records)], ignore_index=True),
            self.cards | cards,
            earlier.numbers | self.numbers,
            self.sheets,
        )


def _missing(table, earlier):
    """Return the rows of an earlier table whose runs a table lacks."""
    known = pd.MultiIndex.from_frame(table[["panel", "run"]])
    return earlier[~pd.MultiIndex.from_frame(earlier[["panel", "run"]]).isin(known)]


def _cards(panel, run, attack):
    """Return the names of the protocol cards of a row."""
    return f"{panel}/{run}", f"{panel}/attack/{attack}"


def read_collected(folder):
    """Return what `save_collected` saved, without the sheets."""
    rows, records = (read_table(folder / f"{name}.csv.gz") for name in ("rows", "records"))
    return Collected(
        rows, records, *(read_json(folder / f"{n}.json") for n in ("cards", "numbers"))
    )


def save_collected(found, folder, add):
    """Save the files of `collect`. The report keeps the sheets of one training per attack."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_table(found.rows, folder / "rows.csv.gz")
    _save_table(found.records, folder / "records.csv.gz")
    save_json(found.cards, folder / "cards.json")
    save_json(found.numbers, folder / "numbers.json")
    if found.sheets is None:
        return
    made = {_sheet_key(sheet) for sheet in found.sheets}
    for other in folder.parent.glob("*/courses.json"):
        left = [one for one in read_json(other) if add and _sheet_key(one) not in made]
        if left:
            save_json(left, other)
        else:
            other.unlink()
    kept = read_json(folder / "courses.json", [])
    save_json(found.sheets + kept, folder / "courses.json")


def _sheet_key(sheet):
    return sheet["panel"], sheet["attack"], sheet["method"], sheet["lr"]


def _save_table(table, file):
    """Save a table as compressed CSV; equal tables give equal bytes."""
    text = table.to_csv(index=False, float_format="%.6g")
    # pandas would write the temporary file's name into the archive.
    with atomic(file) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_table(file):
    """Read a table of `collect`: empty text is "", a missing number NaN."""
    table = pd.read_csv(file, dtype=dict.fromkeys(TEXT_COLUMNS, str))
    return table.fillna({name: "" for name in TEXT_COLUMNS if name in table})
