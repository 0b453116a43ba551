"""What an experiment has left, in few small files: all that tables and figures are made from, so that they can be made again without a model, a GPU or the experiment itself."""

import gzip
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from mu.files import atomic, read_json, save_json
from mu.measures.card import same_protocol
from mu.measures.comparison import SAME
from mu.params import ASIDE
from mu.reports.explorer import read_course, save_sheet
from mu.reports.plots import label

ROWS = [
    "panel",
    "method",
    "model",
    "run",
    "training",
    "attack",
    "name",
    "lr",
    "attack_seed",
    "step",
    "group",
    "asked",
    "prompt",
    "seed",
    "expected",
    "seen",
    "hit",
]
TEXT = (
    "panel",
    "method",
    "model",
    "run",
    "training",
    "attack",
    "name",
    "group",
    "asked",
    "prompt",
    "expected",
    "seen",
)
SETS = (
    "HRM-m",
    "HRM-s",
    "CLEAN",
)  # the paper's sets, on which an attacker fine-tunes all weights with Adam
SHOWN = {
    "forget": (2, 6),
    "related": (9, 1),
    "unrelated": (4, 1),
}  # prompts of each group that sheets of pictures keep, and seeds of each
TRAINED = (
    "kind",
    "lr",
    "optimizer",
    "subset",
    "batch_size",
    "prompts",
)  # facts in which two attacks of one name have to agree, beside `SAME`


def method_of(params):
    """The method of a run's params.json as the paper writes it in small letters: "esd-u-3" is ESD-u with η = 3; "uce" has no such figure."""
    method, loop = params.get("method", ""), params.get("loop") or {}
    return f"{method}-{loop.get('eta', 1.0):g}" if method.startswith("esd") else method


def variant(run, method):
    """What a run of a method is called in tables: unlearned, meta-unlearned, or, of a control, its own label. "meta", "meta-0", "uce-meta" are meta-unlearned; "unlearned-1", "uce" are not."""
    base = re.sub(r"-\d+$", "", run) if run != method else run
    if base == "meta" or base.endswith("-meta"):
        return "meta-unlearned"
    return "unlearned" if base in (method, "unlearned") else label(run)


def attack_name(card, name):
    """The paper's words for an attack's set, from its protocol card: HRM-s (one prompt), HRM-m (several), CLEAN, where all weights are fine-tuned with Adam; any other attack keeps its own name."""
    extra = (
        any(card.get(fact) for fact in ("others", "first", "merge", "drawn_images"))
        or card.get("kind", "") != "fine-tuning"
        or card.get("subset") != "f"
        or card.get("optimizer") != "adam"
    )
    return (
        name
        if extra
        else "CLEAN"
        if card["attack"] == "clean"
        else "HRM-s"
        if card.get("prompts") == 1
        else "HRM-m"
    )


def _one_experiment(out, panel, training):
    """Rows, records of the gradients, and cards of one folder of runs and attacks."""
    runs = {f.parent.name: read_json(f) for f in sorted(Path(out).glob("*/metrics.json"))}
    method = {run: method_of(made["protocol"].get("run") or {}) for run, made in runs.items()}
    whose = {
        run: {
            "panel": panel,
            "method": method[run],
            "model": variant(run, method[run]),
            "run": run,
            "training": training or (re.findall(r"-(\d+)$", run) or ["0"])[0],
        }
        for run in runs
    }
    rows, cards, records = [], {}, []
    for run, made in runs.items():
        rows += [
            whose[run] | {"attack": "none", "name": "before", "attack_seed": 0, "step": 0} | row
            for row in made["rows"]
        ]
        cards[f"{panel}/{run}"] = made["protocol"]
        for record in read_json(Path(out) / run / "records.json", []):
            records.append(
                whose[run]
                | {fact: record[fact] for fact in ("step", "passes", "seconds")}
                | record["losses"]
            )
    for file in sorted((Path(out) / "attack").glob("*.json")):
        made = read_json(file)
        for row in made["rows"]:
            called = (
                row["name"]
                if row["attack"] == "prompt"
                else attack_name(made["protocol"], row["name"])
            )
            rows.append(
                row
                | whose.get(row["run"], {"panel": panel, "run": row["run"], "training": training})
                | {"attack": called, "name": file.stem}
            )
        cards[f"{panel}/attack/{file.stem}"] = made["protocol"]
    table = pd.DataFrame(rows)
    if (
        "lr" in table
    ):  # one set, met twice: the first file counts, or its pictures would count twice
        first = table.groupby(["run", "attack", "lr", "attack_seed"], dropna=False)[
            "name"
        ].transform("min")
        table["attack"] = table["attack"].where(
            (table["name"] == first) | ~table["attack"].isin(SETS), table["name"]
        )
    return (
        table.assign(asked=table.get("asked", table.prompt).fillna(table.prompt))
        if len(table)
        else table,
        pd.DataFrame(records),
        cards,
    )


def collect(out, folder, training="", pictures=True, show_unblurred=False, main=""):
    """Gather one training of an experiment, `out`, in `folder`: rows.csv.gz (a row for every judged picture, before and under all attacks), records.csv.gz (losses and the angle of the
    gradients, by step), cards.json (protocols), numbers.json (of 50_evaluate) and, with `pictures`, sheets of what was drawn (courses.json).

    A folder below `out` that is a small experiment of its own is a panel. training: what this training is called; empty: the number at the end of each run's name.
    main: the method of which pictures under all sets are kept, while of the others those under HRM-m are; one that is not there: the first; empty: all of them. show_unblurred: keep the pictures of a harmful concept as they were saved. Raises FileNotFoundError where nothing was judged."""
    out, folder = Path(out), Path(folder)
    experiments = (
        {"": out}
        | {
            p.name: p
            for p in sorted(out.iterdir())
            if p.name != ASIDE and p.is_dir() and list(p.glob("*/metrics.json"))
        }
        if out.is_dir()
        else {}
    )
    rows, records, cards, courses = [], [], {}, []
    for panel, place in experiments.items():
        found = _one_experiment(place, panel, training)
        rows, records, cards = [*rows, found[0]], [*records, found[1]], cards | found[2]
    rows, records = (
        pd.concat(rows) if rows else pd.DataFrame(),
        pd.concat(records) if records else pd.DataFrame(),
    )
    if rows.empty:
        raise FileNotFoundError(
            f"nothing was judged below {out}: run 20_unlearn, 21_meta_unlearn, 30_attack_finetune there first (make demo, or make paper)"
        )
    trained = rows[rows.attack.isin(SETS) & rows.model.isin(["unlearned", "meta-unlearned"])]
    methods = list(dict.fromkeys(trained[trained.model == "meta-unlearned"].method))
    trained = trained[
        trained.attack.eq("HRM-m")
        | trained.method.isin([main] if main in methods else methods[:1] if main else methods)
    ]
    for (panel, name), part in trained.groupby(["panel", "name"], sort=False) if pictures else ():
        attacked = list(
            dict.fromkeys(
                run for run in part.sort_values("model", ascending=False).run if run != "original"
            )
        )
        first = {
            part[part.run == run].model.iloc[0]: run for run in reversed(attacked)
        }  # of several trainings the first
        card = cards[f"{panel}/attack/{name}"]
        called = [m for m in ("unlearned", "meta-unlearned") if m in first]
        course = read_course(
            experiments[panel],
            name,
            [first[m] for m in called],
            keep=SHOWN,
            blurred=not show_unblurred and bool(card.get("harmful")),
        )
        course = replace(
            course, models=[*course.models[: len(course.models) - len(called)], *called]
        )
        facts = {
            "panel": panel,
            "attack": part.attack.iloc[0],
            "method": part.method.iloc[0],
            "lr": float(part.lr.iloc[0]),
            "training": str(part.training.iloc[0]),
        }
        courses.append(
            save_sheet(course, folder.parent.parent, "-".join(filter(None, (panel, name)))) | facts
        )
    numbers = {
        file.parent.name: read_json(file)
        for file in sorted(out.glob("evaluate/**/evaluation.json"))
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("rows", rows.reindex(columns=ROWS)), ("records", records)):
        with atomic(folder / f"{name}.csv.gz") as temporary:
            temporary.write_bytes(
                gzip.compress(table.to_csv(index=False, float_format="%.6g").encode(), mtime=0)
            )  # pandas would put the temporary name into it
    save_json(cards, folder / "cards.json")
    save_json(numbers, folder / "numbers.json")
    if pictures:  # the sheets of one training take the place of another's
        for other in folder.parent.glob("*/courses.json"):
            other.unlink()
        save_json(courses, folder / "courses.json")
    return folder


def deduplicate(results):
    """Rows in which a model that several trainings share counts once: the original, which nobody trains, and what a closed form makes, which has no seed. The rows of the first of these trainings
    stay. By the digests of the weights in the cards; of models whose cards say none, all rows stay."""
    made, rows = {}, results.rows
    for folder, cards in results.cards.items():
        for name, card in cards.items():
            panel = name.split("/")[0]
            made[folder, panel, "original"] = card["model"]
            if isinstance(card.get("weights"), dict):  # of an attack: run → folder (digest)
                made |= {
                    (folder, panel, run): place.split()[-1]
                    for run, place in card["weights"].items()
                }
    which = [
        made.get((folder, panel, run), f"{folder}/{run}")
        for folder, panel, run in zip(rows.folder, rows.panel, rows.run, strict=False)
    ]
    first = (
        rows.assign(which=which)
        .groupby(
            ["panel", "method", "model", "which", "attack", "name", "lr", "attack_seed"],
            dropna=False,
        )
        .folder.transform("min")
    )
    return rows[rows.folder == first]


def _table(file):
    """One of the tables of `collect`, with text where there is text: an empty cell is no name, and a number that is not there is NaN."""
    table = pd.read_csv(file, dtype=dict.fromkeys(TEXT, str))
    return table.assign(**{name: table[name].fillna("") for name in TEXT if name in table})


@dataclass(frozen=True)
class Results:
    rows: pd.DataFrame  # columns ROWS and folder, what stands in its name; text is "" where there is none, a number NaN
    records: pd.DataFrame  # the same names, step, and the losses of that step
    cards: dict  # folder → {"<panel>/<run>" or "<panel>/attack/<name>": protocol}
    numbers: dict  # the same → {place: {"numbers", "protocol"}} of 50_evaluate
    courses: list  # what `mu.reports.explorer.save_sheet` returned, of the first training that has pictures


def read_results(folder, trainings=()):
    """The `Results` of what `collect` has left in the folders below `folder`, of these trainings (names of the folders) or of all.

    Raises FileNotFoundError for a training that is not there, and ValueError where two were judged, or attacked under one name, by different protocols."""
    there = sorted(p.parent.name for p in Path(folder).glob("*/rows.csv.gz"))
    wanted = [str(name) for name in trainings] or there
    if absent := [name for name in wanted if name not in there] or ([] if wanted else ["at all"]):
        raise FileNotFoundError(
            f"{folder} has no results {', '.join(absent)}; there are: {', '.join(there) or 'none'}: run the experiment with these seeds, or name others"
        )

    def read(name):
        return pd.concat(
            [_table(Path(folder) / t / f"{name}.csv.gz").assign(folder=t) for t in wanted],
            ignore_index=True,
        )

    def each(name):
        return {t: read_json(Path(folder) / t / f"{name}.json", {}) for t in wanted}

    rows, cards = read("rows"), each("cards")
    of_panel = {
        panel: {
            f"{t}:{name}": card
            for t, found in cards.items()
            for name, card in found.items()
            if name.split("/")[0] == panel
        }
        for panel in rows.panel.unique()
    }
    for panel, found in of_panel.items():
        same_protocol(
            {name: {fact: card.get(fact) for fact in SAME} for name, card in found.items()},
            may_differ=(),
        )
        for _, part in rows[(rows.panel == panel) & ~rows.attack.eq("none")].groupby(
            ["attack", "lr"], dropna=False
        ):
            alike = {
                f"{t}:{name}": found[f"{t}:{panel}/attack/{name}"]
                for t, name in part[["folder", "name"]].drop_duplicates().itertuples(index=False)
                if f"{t}:{panel}/attack/{name}" in found
            }
            if alike:
                same_protocol(
                    {
                        name: {fact: card.get(fact) for fact in TRAINED}
                        for name, card in alike.items()
                    },
                    may_differ=(),
                )
    courses = next(
        (found for t in wanted if (found := read_json(Path(folder) / t / "courses.json"))), []
    )
    return Results(rows, read("records"), cards, each("numbers"), courses)
