"""Experiments on tiny random components: a folder, and notebooks that papermill executes in it."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import tiny

from mu.notebooks.run import execute, read_parameters

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SETS = {
    "defender/forget": ["a cat", "a photo of a cat", "a cat"],
    "defender/retain-related": ["a tiger", "a drawing of a tiger"],
    "defender/retain-unrelated": ["a banana", "a cup", "a photo of a banana"],
    "attacker/forget": ["cat", "an emoji of a cat"],
    "attacker/clean": ["banana", "cup"],
}
PROBE = {
    "forget": {"a cat": "concept:cat"},
    "related": {"a tiger": "concept:tiger"},
    "unrelated": {"a banana": "concept:banana"},
}
TRAINING = dict(
    steps=2,
    batch_size=2,
    retain_batch_size=2,
    trajectory_steps=2,
    trajectory_reuse=2,
    checkpoint_every=1,
)
META = TRAINING | dict(
    phases=[],
    validation={},
    rehearsal_images=0,
    relearn=1.0,
    inner_steps=[1, 2],
    inner_batch_size=2,
    head_start=[0, 0],
    horizon=[0, 0],
    one_prompt=0.0,
    clean_every=2,
    retain_prompts=4,
)
ATTACK = dict(at="0,1,2", seeds="0,1", batch_size=2)
SHORT_ATTACK = dict(at="0,1", seeds="0", batch_size=2)
DRAWING = dict(probe_seeds="2,1,1", sampling_steps=2)


@dataclass(frozen=True)
class Experiment:
    """A folder with a model, a judge and concept sets; runs and a report below it."""

    base: Path

    @property
    def runs(self):
        return self.base / "runs"

    @property
    def report(self):
        return self.base / "report"

    @property
    def places(self):
        """Parameters that most notebooks have."""
        folders = dict(model="model", sets="sets", judge="judge", out="runs")
        return {name: str(self.base / folder) for name, folder in folders.items()} | DRAWING

    def run(self, stem, output=None, **parameters):
        """Execute a notebook; return False if its output is up to date."""
        notebook = NOTEBOOKS / f"{stem}.ipynb"
        known = read_parameters(notebook)
        given = {name: value for name, value in self.places.items() if name in known}
        target = self.report / "notebooks" / f"{output or stem}.ipynb"
        return execute(notebook, target, given | parameters)

    def train(self):
        """Execute the notebooks that train an unlearned and a meta-unlearned model."""
        assert self.run("20_unlearn", **TRAINING)
        assert self.run("21_meta_unlearn", **META)

    def attack(self):
        """Execute the default attack on both models."""
        assert self.run("30_attack_finetune", **ATTACK)


@contextmanager
def tiny_experiment(base):
    """Create the components below `base`; the kernels of notebooks then import this `mu`."""
    tiny.make_pipeline(base / "model")
    tiny.make_judge().save_pretrained(base / "judge")
    for seed, (name, captions) in enumerate(SETS.items()):
        tiny.make_images(base / "sets" / name, captions, seed=seed)
    (base / "sets" / "probe.json").write_text(json.dumps(PROBE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Experiment(base)


def stamps(folder):
    """Return file → time of the last change, for all files below a folder."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return {file: file.stat().st_mtime_ns for file in files}


def read(*parts):
    """Return the contents of a JSON or CSV file."""
    file = Path(*parts)
    return pd.read_csv(file) if file.suffix == ".csv" else json.loads(file.read_text())


def assert_no_warnings(experiment):
    """Fail if an executed notebook wrote to stderr."""
    files = list((experiment.report / "notebooks").glob("*.ipynb"))
    assert files
    for file in files:
        outputs = [o for c in nbformat.read(file, 4).cells for o in c.get("outputs", [])]
        assert not [o.text for o in outputs if o.get("name") == "stderr"], file.name
