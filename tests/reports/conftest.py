from pathlib import Path

import pandas as pd
import pytest
import synthetic

from mu.reports.collect import collect, read_results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """The report folder of two trainings, the first of which has a panel."""
    base = tmp_path_factory.mktemp("experiment")
    for seed in (0, 1):
        synthetic.experiment(base / str(seed), seed)
    panel, sets = base / "0" / "robot-pocket", "robot (9)"
    unlearned = synthetic.ALL | {"forget": 0.0}
    plain = {"method": "esd-f", "loop": {"eta": 1.0}}
    meta = {"method": "esd-f", "loop": {"eta": 1.0} | synthetic.META}
    synthetic.run(panel, "original", synthetic.ALL, {}, sets=sets)
    synthetic.run(panel, "unlearned", unlearned, plain, sets=sets)
    synthetic.run(panel, "meta", unlearned, meta, sets=sets)
    curves = {
        run: {0: unlearned, 100: synthetic.ALL | {"forget": score}}
        for run, score in (("unlearned", 0.9), ("meta", 0.2))
    }
    synthetic.attack(panel, "hrm-m", curves, attack="forget", prompts=0, sets=sets)
    report = base / "report"
    for seed in (0, 1):
        collect(base / str(seed), report / "raw" / str(seed), str(seed), pictures=seed == 0)
    return report


@pytest.fixture(scope="session")
def results(collected):
    return read_results(collected / "raw")


@pytest.fixture
def uce(results):
    """Rows of UCE and the original, without the panel."""
    rows = results.rows
    return rows[(rows.panel == "") & rows.method.isin(["uce", ""])]


@pytest.fixture(scope="session")
def published():
    """The published numbers of the paper, by table."""
    names = ("nudity", "quality")
    return {name: pd.read_csv(ROOT / "data" / f"paper_{name}.csv") for name in names}


@pytest.fixture
def two_phases():
    """Cards of a UCE model that was meta-unlearned in two phases, and of an ESD model in one."""
    phases = [{"name": "ascend", "steps": 30}, {"name": "grow", "steps": 10}]
    loop = {"steps": 0, "inner_steps": [1, 2], "horizon": [9, 9], "phases": phases}
    return {
        "/uce-meta": {"run": {"start": "runs/uce", "loop": loop}},
        "/uce": {"run": {"start": "", "loop": None}},
        "/esd-u-3-meta": {"run": {"start": "", "loop": {"steps": 7, "inner_steps": [1, 2]}}},
    }
