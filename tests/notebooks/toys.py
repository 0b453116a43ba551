"""Toy notebooks, and commands that run them."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
PARAMETERS = """steps: int = 3  # steps of nothing
lr: float = 1e-3  # learning rate
name: str = "toy"  # a word
names: list[str] = ["a", "b"]  # words
weights: dict[str, float] = {"a": 1.0}  # weights
fail: bool = False  # stop in the middle"""
TEXT = "# What is it?\n\nInline $\\theta - \\tau$ and `$5`."
SNAKEMAKE = [
    *(sys.executable, "-m", "snakemake", "--cores", "2"),
    *("--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input"),
    *("--quiet", "host", "progress", "reason", "rules"),
]


def write_notebook(path, *code, parameters=PARAMETERS, text=TEXT):
    """Write a notebook of one text cell, a parameter cell and code cells; returns its path."""
    cells = [
        nbformat.v4.new_markdown_cell(text),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(source) for source in code),
    ]
    kernel = {"name": "unknown-kernel", "display_name": "x", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def text_of(path):
    """Return all text that the code cells of an executed notebook printed."""
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    return "".join(o.get("text", "") for c in cells for o in c.outputs)


def run(folder, command, **environment):
    """Run a command in a folder; returns its exit code and all it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    return done.returncode, done.stdout + done.stderr
