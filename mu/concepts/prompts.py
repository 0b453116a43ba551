"""Prompts to measure with: I2P's by their rows, captions of COCO, or any CSV with a column `prompt`. Always a table with `prompt` and `seed`.

The prompts of I2P and the captions are read from the hub at run time and never copied here; that part could not be run where this was written (no hub)."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError
from tqdm import tqdm

from mu import ROOT
from mu.extras import extra

DATA = ROOT / "data"
I2P, COCO = "AIML-TUDA/i2p", "sayakpaul/coco-30-val-2014"  # MIT; captions of COCO 2014, validation
SEEDS, GUIDANCE = (
    ("seed", "evaluation_seed", "sd_seed"),
    ("guidance", "evaluation_guidance", "sd_guidance_scale"),
)  # what the tables of the field call them


def read_prompts(source, rows=None, limit=None):
    """Table of prompts: `prompt`, `seed` (where the source has none, the number of the row, so that no two start from one noise), `row`, and where the source has them `guidance` (NaN where
    its cell is blank), `label`, `image` and its other columns.

    source: "i2p-nudity" (the 142 of I2P that are known as its nudity prompts), "i2p" (all 4,703), "coco", or a path to a CSV. rows: row numbers to keep, from 0.
    limit: at most so many, the first. Raises FileNotFoundError for no such file, or for a hub that cannot be reached (what to fetch, and where to put it);
    ValueError for a CSV that is empty, not UTF-8 or not a table, one without prompts (lists its columns), an empty prompt or a guidance that is no number (names its row), a row that is
    not there, or nothing left."""
    if limit is not None and limit < 1:
        raise ValueError(
            f"limit is a number of prompts from 1, got {limit}: leave it out to keep all"
        )
    if source in ("i2p", "i2p-nudity"):
        table = read_i2p(only_nudity=source == "i2p-nudity")
    elif source == "coco":
        table = read_coco(limit if rows is None else max(rows) + 1)
    elif Path(source).is_file():
        table = read_table(source)
    else:
        raise FileNotFoundError(
            f"there is no file of prompts {str(source)!r}: name a CSV with a column `prompt`, or one of i2p-nudity, i2p, coco"
        )
    table = named(table, source)
    if rows is not None:
        absent = sorted(set(rows) - set(table.row))
        if absent:
            raise ValueError(
                f"{source} has no rows {', '.join(map(str, absent[:5]))}: its rows go from {table.row.min()} to {table.row.max()}"
            )
        table = table.set_index("row", drop=False).loc[list(rows)]
    return table.head(limit).reset_index(drop=True)


def read_table(file):
    """A CSV as a table, blank cells as "". Raises ValueError that names the file and the mend for one that is empty, not UTF-8, or has more cells in a line than columns."""
    try:
        table = pd.read_csv(file, keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise ValueError(
            f"{file} is empty: its first line must name the columns, one of them `prompt`; below it is a prompt a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 (byte {error.start}): save it as CSV UTF-8, or convert it by `iconv -f latin1 -t utf-8`"
        ) from error
    except pd.errors.ParserError as error:
        raise ValueError(
            f"{file} is not a table ({str(error).strip()}): put a prompt that has commas into double quotes"
        ) from error
    if not isinstance(
        table.index, pd.RangeIndex
    ):  # what pandas makes of lines that are longer than the header
        raise ValueError(
            f"{file} has more cells in a line than columns ({', '.join(map(str, table.columns))}): put a prompt that has commas into double quotes"
        )
    return table


def to_rows(table):
    """What `mu.measures.gallery.draw_folder` draws: a dict a prompt, with `prompt`, `seed`, and `guidance` where the table has one; the others get the common one."""
    names = [name for name in ("prompt", "seed", "guidance") if name in table]
    return [
        {name: value for name, value in row.items() if name != "guidance" or pd.notna(value)}
        for row in table[names].to_dict("records")
    ]


def named(table, source):
    """The table with the columns that the rest of the code expects, each prompt and seed checked."""
    if "prompt" not in table.columns:
        raise ValueError(
            f"{source} has no column `prompt`; it has: {', '.join(map(str, table.columns))}. Rename the one with the prompts"
        )
    given = table
    for name, known in (("seed", SEEDS), ("guidance", GUIDANCE)):
        found = next((column for column in known if column in table.columns), None)
        if found:
            table = table.assign(**{name: pd.to_numeric(table[found], errors="coerce")})
        elif name == "seed":
            table = table.assign(seed=range(len(table)))
    table = table.assign(prompt=table.prompt.astype(str).str.strip())
    if "row" not in table.columns:
        table = table.assign(row=range(len(table)))
    strange = (
        (given[found].astype(str).str.strip() != "") & ~np.isfinite(table.guidance.astype(float))
        if found
        else pd.Series(False, table.index)
    )
    for words, wrong in (
        ("an empty prompt", table.prompt == ""),
        ("no whole number as seed", table.seed.isna() | (table.seed % 1 != 0)),
        ("no number as guidance, where a blank would be the common one,", strange),
    ):
        if wrong.any():
            raise ValueError(
                f"{source} has {words} in row {table.row[wrong].iloc[0]} (rows are counted from 0, without the header): fill it in, or take the row out"
            )
    if not len(table):
        raise ValueError(f"{source} holds no prompt: write one a line below the header")
    return table.astype({"seed": int})


def hub_file(repo, file):
    """Path of a file of a data set of the hub, from the cache where it is there. Raises FileNotFoundError or PermissionError with the mend."""
    try:
        return hf_hub_download(repo, file, repo_type="dataset")
    except GatedRepoError as error:
        raise PermissionError(
            f"the data set {repo} is gated: accept its conditions on its page, then `hf auth login` (or set HF_TOKEN) and run again"
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"the data set {repo} cannot be reached from here ({type(error).__name__}), and {file} is not in the cache {constants.HF_HUB_CACHE}. With a network: "
            f"`hf download {repo} {file} --repo-type dataset`; copy the cache's folder here, or save the file itself and name its path in place of the source"
        ) from error


def read_i2p(only_nudity=True):
    """I2P's table with `row`, the number of the row; with only_nudity the rows of `data/i2p_nudity_142.csv`, with the seeds and guidance of that file.

    Raises ValueError where the set of the hub is another one than these rows were taken from: its number of rows or its seeds differ."""
    table = pd.read_csv(hub_file(I2P, "i2p_benchmark.csv"), keep_default_na=False).reset_index(
        names="row"
    )
    if len(table) != 4703:
        raise ValueError(
            f"{I2P} has {len(table)} rows, and the row numbers here are those of its 4,703: it is another version, use a CSV of your own"
        )
    if not only_nudity:
        return table
    chosen = pd.read_csv(DATA / "i2p_nudity_142.csv")
    table = table.iloc[chosen.i2p_row].reset_index(drop=True)
    column = next((name for name in ("sd_seed", "evaluation_seed") if name in table.columns), None)
    if column and (table[column].astype("int64") != chosen.evaluation_seed).any():
        wrong = chosen.i2p_row[table[column].astype("int64") != chosen.evaluation_seed]
        raise ValueError(
            f"the seeds of {I2P} differ from those of data/i2p_nudity_142.csv, first in row {wrong.iloc[0]}: it is another version, use a CSV of your own"
        )
    return table[["row", "prompt"]].assign(
        seed=chosen.evaluation_seed, guidance=chosen.evaluation_guidance.astype(float)
    )


def read_coco(limit=None, repo=COCO):
    """Captions of COCO as `prompt`, with their pictures (PIL) as `image`: 30,000, or the first `limit`, which are then fetched alone.

    Raises ImportError that names the pip command; FileNotFoundError where the hub cannot be reached."""
    datasets = extra("datasets", "datasets")
    try:
        data = datasets.load_dataset(repo, split="train", streaming=limit is not None)
        data = data.take(limit) if limit is not None else data
        found = [
            {"prompt": line["caption"], "image": line["image"]}
            for line in tqdm(data, "captions", limit, file=sys.stdout)
        ]
    except (OSError, ConnectionError) as error:
        raise FileNotFoundError(
            f"the data set {repo} cannot be reached from here ({type(error).__name__}). With a network: `hf download {repo} --repo-type dataset`, "
            "and copy the hub's cache here; or save captions as a CSV with a column `prompt`, and name it"
        ) from error
    captions = [
        line["prompt"][0] if isinstance(line["prompt"], (list, tuple)) else line["prompt"]
        for line in found
    ]
    return pd.DataFrame(found).assign(prompt=captions)
