"""Collect an experiment's results in a few small files.

All tables and figures are rebuilt from these files: without a model, a GPU or the experiment.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from mu.files import read_json
from mu.measures.attack_results import SHARED_FACTS
from mu.measures.card import same_protocol
from mu.params import ASIDE
from mu.reports.collected import (
    COLUMNS,
    FACTS,
    Collected,
    read_collected,
    read_table,
    save_collected,
)
from mu.reports.explorer import read_progress, save_sprite_sheet
from mu.reports.plots import label
from mu.reports.tables import VARIANTS

# Attacks of the paper: fine-tuning of all weights with Adam on one of its image sets.
PAPER_ATTACKS = ("HRM-m", "HRM-s", "CLEAN")
# Facts of an attack that adds data, steps or a merge to fine-tuning; older cards have other names.
EXTRA_DATA = ("mixed_set", "warmup_set", "merge_share", "drawn_images", "others", "first", "merge")
# Group → (prompts, seeds) kept in sprite sheets.
SHEET_IMAGES = {"forget": (2, 6), "related": (9, 1), "unrelated": (4, 1)}
# Facts, besides `SHARED_FACTS`, that two attacks of one name share.
ATTACK_FACTS = ("kind", "lr", "optimizer", "subset", "batch_size", "prompts")


def method_of(params):
    """Return the paper's name of a method in lower case, such as "esd-u-3" for ESD-u with η = 3.

    params: of params.json. Methods other than ESD have no η: "uce".
    """
    method, loop = params.get("method", ""), params.get("loop") or {}
    return f"{method}-{loop.get('eta', 1.0):g}" if method.startswith("esd") else method


def variant(run, method):
    """Return "unlearned" or "meta-unlearned", or the label of a control.

    Runs "meta", "meta-0" and "uce-meta" are meta-unlearned, "unlearned-1" and "uce" unlearned.
    """
    base = run if run == method else re.sub(r"-\d+$", "", run)
    if base == "meta" or base.endswith("-meta"):
        return "meta-unlearned"
    return "unlearned" if base in (method, "unlearned") else label(run)


def attack_name(card, name):
    """Return the paper's name of an attack from its protocol card, else the attack's own name.

    HRM-s uses one prompt, HRM-m several, CLEAN harmless images.
    """
    facts = (card.get("kind"), card.get("subset"), card.get("optimizer"))
    if facts != ("fine-tuning", "f", "adam") or any(card.get(fact) for fact in EXTRA_DATA):
        return name
    if card["attack"] == "clean":
        return "CLEAN"
    return "HRM-s" if card.get("prompts") == 1 else "HRM-m"


def read_experiment(folder, panel="", training=""):
    """Return rows, training records and protocol cards of one folder of runs and attacks."""
    files = sorted(Path(folder).glob("*/metrics.json"))
    runs = {file.parent.name: read_json(file) for file in files}
    facts = {name: _run_facts(name, run, panel, training) for name, run in runs.items()}
    before = {"attack": "none", "name": "before", "attack_seed": 0, "step": 0}
    rows, records, cards = [], [], {}
    for name, run in runs.items():
        rows += [facts[name] | before | row for row in run["rows"]]
        cards[f"{panel}/{name}"] = run["protocol"]
        for record in read_json(Path(folder) / name / "records.json", []):
            cost = {fact: record[fact] for fact in ("step", "passes", "seconds")}
            records.append(facts[name] | cost | record["losses"])
    for file in sorted((Path(folder) / "attack").glob("*.json")):
        attack = read_json(file)
        cards[f"{panel}/attack/{file.stem}"] = attack["protocol"]
        for row in attack["rows"]:
            unknown = {"panel": panel, "run": row["run"], "training": training}
            searched = row["attack"] == "prompt"
            name = row["name"] if searched else attack_name(attack["protocol"], row["name"])
            own = {"attack": name, "name": file.stem}
            rows.append(row | facts.get(row["run"], unknown) | own)
    return _complete(pd.DataFrame(rows)), pd.DataFrame(records), cards


def _run_facts(name, run, panel, training):
    """Return the columns that all rows and records of a run share."""
    method = method_of(run["protocol"].get("run") or {})
    number = re.search(r"-(\d+)$", name)
    return {
        "panel": panel,
        "method": method,
        "model": variant(name, method),
        "run": name,
        "training": training or (number[1] if number else "0"),
    }


def _complete(rows):
    """Return rows with the evaluation prompt in "asked" and each attack of the paper once.

    If a run met an attack twice, only the first file keeps its name, so that no image counts twice.
    """
    if rows.empty:
        return rows
    if "lr" in rows:
        attack = rows.groupby(["run", "attack", "lr", "attack_seed"], dropna=False)
        repeated = rows.attack.isin(PAPER_ATTACKS) & (
            rows["name"] != attack["name"].transform("min")
        )
        rows = rows.assign(attack=rows.attack.mask(repeated, rows["name"]))
    return rows.assign(asked=rows.get("asked", rows.prompt).fillna(rows.prompt))


def collect(out, folder, training="", pictures=True, show_unblurred=False, main="", add=False):
    """Collect the experiment `out` (one training seed) in `folder`; return `folder`.

    Writes rows.csv.gz (one row per judged image, before and under all attacks), records.csv.gz
    (losses and gradient angle by step), cards.json (protocols), numbers.json (of 50_evaluate) and,
    with `pictures`, courses.json with sprite sheets of the images. A folder below `out` with runs
    of its own is a panel.

    training: name of the training; empty: the number at the end of each run's name. show_unblurred:
    keep images of a harmful concept as saved. main: method whose images are kept under all attacks
    of the paper, while other methods keep those under HRM-m; unknown: the first method; empty: all.
    add: keep what was collected of runs that `out` lacks.
    Raises FileNotFoundError if `out` has no evaluated run.
    """
    out, folder = Path(out), Path(folder)
    panels = _panels(out)
    parts = [read_experiment(place, panel, training) for panel, place in panels.items()]
    if all(rows.empty for rows, _, _ in parts):
        raise FileNotFoundError(
            f"no evaluated run in {out}: run 20_unlearn, 21_meta_unlearn and 30_attack_finetune "
            "there (make demo or make paper)"
        )
    rows = pd.concat([rows for rows, _, _ in parts]).reindex(columns=COLUMNS)
    cards = {name: card for _, _, part in parts for name, card in part.items()}
    sheets = None
    if pictures:
        sheets = _save_sheets(rows, cards, panels, folder, main, show_unblurred)
    evaluations = sorted(out.glob("evaluate/**/evaluation.json"))
    numbers = {file.parent.name: read_json(file) for file in evaluations}
    records = pd.concat([part for _, part, _ in parts])
    if records.empty:  # of runs without a loop
        records = records.reindex(columns=FACTS)
    found = Collected(rows, records, cards, numbers, sheets)
    if add and (folder / "rows.csv.gz").exists():
        found = found.completed(read_collected(folder))
    save_collected(found, folder, add)
    return folder


def _panels(out):
    """Return panel → folder: the experiment itself ("") and its subfolders with evaluated runs."""
    if not out.is_dir():
        return {}
    folders = sorted(path for path in out.iterdir() if path.is_dir() and path.name != ASIDE)
    return {"": out} | {path.name: path for path in folders if any(path.glob("*/metrics.json"))}


def _save_sheets(rows, cards, panels, folder, main, show_unblurred):
    """Save a sprite sheet for each attack of the paper (see `main` of `collect`); return facts."""
    rows = rows[rows.attack.isin(PAPER_ATTACKS) & rows.model.isin(VARIANTS)]
    methods = list(dict.fromkeys(rows[rows.model == "meta-unlearned"].method))
    if main:
        methods = [main] if main in methods else methods[:1]
    rows = rows[rows.attack.eq("HRM-m") | rows.method.isin(methods)]
    sheets = []
    for (panel, name), part in rows.groupby(["panel", "name"], sort=False):
        first_run = part.drop_duplicates("model").set_index("model").run
        models = [model for model in VARIANTS if model in first_run]
        harmful = bool(cards[f"{panel}/attack/{name}"].get("harmful"))
        course = read_progress(
            panels[panel],
            name,
            [first_run[model] for model in models],
            keep=SHEET_IMAGES,
            blurred=harmful and not show_unblurred,
        )
        course = replace(course, models=[*course.models[: -len(models)], *models])
        title = "-".join(filter(None, (panel, name)))
        sheet = save_sprite_sheet(course, folder.parent.parent, title)
        row = part.iloc[0]
        facts = {"panel": panel, "attack": row.attack, "method": row.method}
        sheets.append(sheet | facts | {"lr": float(row.lr), "training": str(row.training)})
    return sheets


@dataclass(frozen=True)
class Results:
    """Collected results of one or several trainings."""

    rows: pd.DataFrame  # COLUMNS and folder, the training's; missing text is "", a number NaN
    records: pd.DataFrame  # the same facts of a run, step, and the losses of that step
    cards: dict  # folder → {"<panel>/<run>" or "<panel>/attack/<name>": protocol}
    numbers: dict  # folder → {place: {"numbers", "protocol"}} of 50_evaluate
    courses: list  # of `mu.reports.explorer.save_sprite_sheet`, one training per attack

    @property
    def first_cards(self):
        """Return name → protocol, each of the first training that has it."""
        by_training = reversed(self.cards.values())
        return {name: card for found in by_training for name, card in found.items()}


def read_results(folder, trainings=()):
    """Return the `Results` of the trainings (subfolders of `folder`), by default of all.

    Raises FileNotFoundError for a missing training, and ValueError if two evaluations, or two
    attacks of one name, differ in their protocols.
    """
    folder = Path(folder)
    available = sorted(path.parent.name for path in folder.glob("*/rows.csv.gz"))
    wanted = [str(name) for name in trainings] or available
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        raise FileNotFoundError(
            f"no results of training {', '.join(missing) or '(any)'} in {folder}; available: "
            f"{', '.join(available) or 'none'}. Run these seeds or select others."
        )

    def read_tables(name):
        tables = [
            read_table(folder / training / name).assign(folder=training) for training in wanted
        ]
        return pd.concat(tables, ignore_index=True)

    def read_facts(name):
        return {training: read_json(folder / training / name, {}) for training in wanted}

    rows, cards = read_tables("rows.csv.gz"), read_facts("cards.json")
    _check_protocols(rows, cards)
    courses = [sheet for sheets in read_facts("courses.json").values() for sheet in sheets]
    return Results(rows, read_tables("records.csv.gz"), cards, read_facts("numbers.json"), courses)


def _check_protocols(rows, cards):
    """Raise ValueError if a panel's evaluations, or its attacks of one name, are not comparable."""
    for panel, part in rows.groupby("panel", sort=False):
        found = {
            f"{training}:{name}": card
            for training, of_training in cards.items()
            for name, card in of_training.items()
            if name.split("/")[0] == panel
        }
        _require_equal(found, SHARED_FACTS)
        attacked = part[part.attack != "none"]
        for _, attack in attacked.groupby(["attack", "lr"], dropna=False):
            names = dict.fromkeys(attack.folder + f":{panel}/attack/" + attack["name"])
            attacks = {name: found[name] for name in names if name in found}
            if attacks:
                _require_equal(attacks, ATTACK_FACTS)


def _require_equal(cards, facts):
    """Raise ValueError if the cards differ in one of these facts."""
    chosen = {name: {fact: card.get(fact) for fact in facts} for name, card in cards.items()}
    same_protocol(chosen, may_differ=())


def deduplicate(results):
    """Return rows in which a model that several trainings share counts once.

    The original and the unseeded results of a closed form are the same in each training; the rows
    of the first one stay. Models are compared by the weight digests of the cards; a model without a
    digest counts once per training.
    """
    digests, rows = {}, results.rows
    for training, cards in results.cards.items():
        for name, card in cards.items():
            panel = name.split("/")[0]
            digests[training, panel, "original"] = card["model"]
            # An attack's card has "weights": run → "folder (digest)".
            if isinstance(card.get("weights"), dict):
                for run, place in card["weights"].items():
                    digests[training, panel, run] = place.split()[-1]
    runs = zip(rows.folder, rows.panel, rows.run, strict=True)
    digest = [digests.get((t, panel, run), f"{t}/{run}") for t, panel, run in runs]
    key = ["panel", "method", "model", "digest", "attack", "name", "lr", "attack_seed"]
    shared = rows.assign(digest=digest).groupby(key, dropna=False)
    return rows[rows.folder == shared.folder.transform("min")]
