"""The same tiny notebook in each precision that this machine can do."""

import pytest
import torch
from experiment import TRAINING, read, tiny_experiment

from mu.devices import cpu_precision

pytestmark = pytest.mark.notebooks
PRECISIONS = ("auto", "no", "bf16", *(["fp16"] if torch.cuda.is_available() else []))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with tiny_experiment(tmp_path_factory.mktemp("experiment")) as made:
        yield made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_runs_and_states_its_precision(experiment, precision):
    out = experiment.base / precision
    output = f"20_{precision}"
    assert experiment.run("20_unlearn", output, **TRAINING, out=str(out), precision=precision)
    card = read(out, "unlearned", "metrics.json")["protocol"]
    assert card["precision"] == precision
    assert len(read(out, "unlearned", "records.json")) == TRAINING["steps"]
    if precision == "auto":
        assert card["computed_in"] in ("no", "bf16", "fp16")
        if not torch.cuda.is_available():
            assert card["computed_in"] == cpu_precision()
    else:
        assert "computed_in" not in card
