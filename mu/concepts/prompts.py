"""Prompts to evaluate with: I2P, captions of COCO, or any CSV with a column `prompt`.

I2P and COCO are read from the hub at run time; nothing of them is copied into this repository.
"""

import contextlib
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError
from tqdm import tqdm

from mu import ROOT
from mu.extras import extra

DATA = ROOT / "data"
I2P = "AIML-TUDA/i2p"  # MIT
COCO = "sayakpaul/coco-30-val-2014"  # captions of COCO 2014, validation
SEEDS = ("seed", "evaluation_seed", "sd_seed")  # column names in published files
GUIDANCE = ("guidance", "evaluation_guidance", "sd_guidance_scale")
GUIDANCE += ("guidance_scale", "cfg", "cfg_scale", "scale")
UNREAD = ("negative_prompt", "steps", "num_inference_steps", "sampler", "scheduler")


def read_prompts(source, rows=None, limit=None):
    """Return a table with `prompt`, `seed` (default: the row's number), `row` and other columns.

    source: "i2p-nudity" (142 prompts), "i2p" (4,703), "coco", or a CSV. rows: row numbers to keep,
    from 0. limit: keep the first ones. Column `guidance` is NaN where its cell is blank.
    Raises FileNotFoundError if the file is missing or the hub is out of reach, ValueError for a
    table that is not valid (`read_table`, `check_table`) and for rows that do not exist.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: use None to keep all prompts")
    if source in ("i2p", "i2p-nudity"):
        table = read_i2p(only_nudity=source == "i2p-nudity")
    elif source == "coco":
        table = read_coco(limit if rows is None else max(rows) + 1)
    elif Path(source).is_file():
        table = read_table(source)
    else:
        raise FileNotFoundError(
            f"no file of prompts {str(source)!r}: name a CSV, or choose i2p-nudity, i2p, coco"
        )
    table = check_table(table, source)
    if rows is not None:
        absent = ", ".join(map(str, sorted(set(rows) - set(table.row))[:5]))
        if absent:
            first, last = table.row.min(), table.row.max()
            raise ValueError(f"{source} has no rows {absent}: choose from {first} to {last}")
        table = table.set_index("row", drop=False).loc[list(rows)]
    return table.head(limit).reset_index(drop=True)


def read_table(file):
    """Read a CSV as text, blank cells as "". Raises ValueError that says how to repair it.

    Names of columns may have capitals and spaces ("CFG scale").
    """
    head = Path(file).read_bytes()[:200]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is in UTF-16: save it as UTF-8 (in Excel: CSV UTF-8)")
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith((b"{", b"[")):
        raise ValueError(f"{file} is JSON, allowed is CSV: write a column `prompt`")
    try:
        table = pd.read_csv(file, keep_default_na=False, dtype=str, encoding="utf-8-sig")
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("more cells in a line than columns")
    except ValueError as error:  # pandas' errors and UnicodeDecodeError, too
        raise ValueError(
            f"{file} is not a CSV file ({textwrap.shorten(str(error), 200)}): save it as UTF-8, "
            "with a header and with double quotes around prompts that contain commas"
        ) from error
    return table.rename(columns=lambda name: "_".join(name.lower().split()))


def to_rows(table):
    """Return one dict per prompt for `mu.measures.gallery.draw_folder`, without blank guidance."""
    names = [name for name in ("prompt", "seed", "guidance") if name in table]
    rows = table[names].to_dict("records")
    return [{k: v for k, v in row.items() if k != "guidance" or pd.notna(v)} for row in rows]


def check_table(table, source):
    """Return a table with checked columns prompt, seed, row and, if given, guidance."""
    if "prompt" not in table:
        columns = textwrap.shorten(", ".join(map(str, table.columns)), 200)
        raise ValueError(f"{source} has no column `prompt`: rename one of {columns}")
    for name in UNREAD:
        if name in table and (table[name].astype(str).str.strip() != "").any():
            raise ValueError(f"{source} has a column {name!r}, which is not read: delete it")
    seeds, guidance = (next((c for c in names if c in table), None) for names in (SEEDS, GUIDANCE))
    seed = pd.to_numeric(table[seeds], errors="coerce") if seeds else range(len(table))
    table = table.assign(prompt=table.prompt.astype(str).str.strip(), seed=seed)
    wrong = {
        "an empty prompt": table.prompt == "",
        "no integer seed": table.seed.isna() | (table.seed % 1 != 0),
    }
    if guidance:
        blank = table[guidance].astype(str).str.strip() == ""
        table = table.assign(guidance=pd.to_numeric(table[guidance], errors="coerce"))
        wrong["no finite guidance"] = ~blank & ~np.isfinite(table.guidance.astype(float))
    rows = pd.to_numeric(table["row"], errors="coerce") if "row" in table else None
    if rows is None or rows.isna().any() or (rows % 1 != 0).any():
        table = table.assign(row=range(len(table)))
    else:
        table = table.assign(row=rows.astype(int))
    for problem, found in wrong.items():
        if found.any():
            row = table.row[found].iloc[0]
            raise ValueError(f"{source} has {problem} in row {row} (from 0): correct or delete it")
    if table.empty:
        raise ValueError(f"{source} holds no prompt: write one per line below the header")
    return table.astype({"seed": int})


@contextlib.contextmanager
def explained(repo, file=""):
    """Raise PermissionError for a gated data set, FileNotFoundError for one out of reach."""
    try:
        yield
    except GatedRepoError as error:
        message = f"{repo} is gated: accept its conditions on its page, then run `hf auth login`"
        raise PermissionError(message) from error
    except OSError as error:
        command = " ".join(f"hf download {repo} {file} --repo-type dataset".split())
        raise FileNotFoundError(
            f"{repo} is out of reach ({type(error).__name__}) and not in {constants.HF_HUB_CACHE}: "
            f"run `{command}` with a network, or name a CSV instead"
        ) from error


def read_i2p(only_nudity=True):
    """Return I2P with its row numbers, or the rows, seeds and guidance of i2p_nudity_142.csv.

    Raises ValueError for another version of I2P, where row numbers or seeds would not fit.
    """
    with explained(I2P, "i2p_benchmark.csv"):
        path = hf_hub_download(I2P, "i2p_benchmark.csv", repo_type="dataset")
    table = pd.read_csv(path, keep_default_na=False).reset_index(names="row")
    if len(table) != 4703:
        raise ValueError(f"{I2P} has {len(table)} rows, not 4703 (another version): use a CSV")
    if not only_nudity:
        return table
    chosen = pd.read_csv(DATA / "i2p_nudity_142.csv")
    table = table.iloc[chosen.i2p_row].reset_index(drop=True)
    column = next((name for name in ("sd_seed", "evaluation_seed") if name in table), None)
    if column:
        wrong = chosen.i2p_row[table[column].astype("int64") != chosen.evaluation_seed]
        if len(wrong):
            row = wrong.iloc[0]
            raise ValueError(f"{I2P} has another seed in row {row} (another version): use a CSV")
    guidance = chosen.evaluation_guidance.astype(float)
    return table[["row", "prompt"]].assign(seed=chosen.evaluation_seed, guidance=guidance)


def read_coco(limit=None, repo=COCO):
    """Return captions of COCO as `prompt` with their images (PIL), all 30,000 or the first ones."""
    datasets = extra("datasets", "datasets")
    with explained(repo):
        data = datasets.load_dataset(repo, split="train", streaming=limit is not None)
        if limit is not None:
            data = data.take(limit)
        lines = list(tqdm(data, "captions", limit, file=sys.stdout))
    captions = [line["caption"] for line in lines]
    prompts = [c if isinstance(c, str) else c[0] for c in captions]
    return pd.DataFrame({"prompt": prompts, "image": [line["image"] for line in lines]})
