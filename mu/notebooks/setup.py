"""Prepare a notebook's kernel: working directory, seeds, logging, display."""

import os
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from mu.params import protocol

THEME = {"figure.dpi": 110, "savefig.bbox": "tight", "svg.fonttype": "none", "pdf.fonttype": 42}


def setup(seed=0):
    """Prepare the kernel of a notebook; returns the versions of the libraries.

    Changes to the repository's root, where all paths of the notebooks start (JupyterLab starts in
    `notebooks/`), seeds torch, switches off the progress bars of loading files, and sets how
    tables and figures look.
    """
    if Path.cwd().name == "notebooks":
        os.chdir("..")
    torch.manual_seed(seed)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pd.set_option("display.max_colwidth", None)
    pd.set_option("display.precision", 3)
    sns.set_theme("notebook", "whitegrid", rc=THEME)
    return protocol()["versions"]
