"""10_prepare_concepts on the pocket model."""

import base64
import io
import os
import re
import shutil

import nbformat
import numpy as np
import pytest
from concepts.builds import ROOT, SETS, save_emoji
from PIL import Image

from mu.concepts.presets import PRESETS
from mu.concepts.sets import is_harmful
from mu.files import read_json
from mu.notebooks.run import execute


def run(folder, **parameters):
    """Run 10_prepare_concepts on the pocket model; returns its text, images and cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        small = dict(
            out=str(folder / "runs"),
            sampling_steps=2,
            shown=2,
            images_a_prompt=1,
            images_a_concept=1,
            candidates=str(ROOT / "data" / "pocket-concepts.csv"),
            presets=PRESETS,
        )
        assert execute(
            ROOT / "notebooks" / "10_prepare_concepts.ipynb",
            folder / "10.ipynb",
            small | parameters,
        )
    executed = nbformat.read(folder / "10.ipynb", 4)
    outputs = [
        output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    return (
        text,
        [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})],
        executed,
    )


def changing(png):
    """Return the share of differing neighbour pixels in an image's first row of tiles."""
    row = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), float)[:90]
    return (np.abs(np.diff(row, axis=1)).max(-1) > 0).mean()


def test_the_notebook_suggests_related_concepts_and_stops(tmp_path):
    text, shown, executed = run(tmp_path, concept="dragon")
    assert "crocodile" in text
    assert "No set was built" in text
    assert "related = " in text
    assert len(shown) == 1
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "10.html").is_file()
    assert "Exception" not in (tmp_path / "10.html").read_text()
    assert not [
        cell for cell in executed.cells[-6:] if cell.cell_type == "code" and cell.execution_count
    ]


def test_the_notebook_builds_a_preset(tmp_path):
    text, shown, _ = run(tmp_path, preset="cat")
    folder = tmp_path / "runs" / "sets" / "cat"
    assert read_json(folder / "concept.json")["images"] == {
        "defender/forget": 3,
        "defender/retain-related": 9,
        "defender/retain-unrelated": 24,
        "attacker/forget": 3,
        "attacker/clean": 8,
    }
    assert f"sets = '{folder}'" in text
    assert re.search(r"defender +attacker", text), "the table of images and prompts per side"
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 5
    assert len(shown) == 2
    assert changing(shown[-1]) > 0.5


def test_the_notebook_imports_a_folder_and_blurs_a_harmful_concept(tmp_path):
    source = save_emoji(tmp_path / "mine", [f"{i}.png" for i in range(6)])
    text, shown, _ = run(
        tmp_path,
        concept="cat",
        related="tiger",
        unrelated="apple,book",
        images=str(source),
        harmful=True,
    )
    made = read_json(tmp_path / "runs" / "sets" / "cat" / "concept.json")
    assert made["harmful"]
    assert made["imported_from"] == str(source)
    assert made["images"]["attacker/forget"] == 2
    assert changing(shown[-1]) < 0.3, "blurred beyond recognition"


def test_the_notebook_declares_a_finished_folder_harmful(tmp_path):
    shutil.copytree(SETS / "cat", tmp_path / "mine")
    text, shown, _ = run(tmp_path, sets=str(tmp_path / "mine"), harmful=True)
    assert "concept.json declares the concept harmful" in text
    assert is_harmful(tmp_path / "mine")
    assert changing(shown[-1]) < 0.3
