"""Finished runs by name, and their weights in a pipeline."""

import pytest
import tiny
import torch

from mu.publish.export import save_model
from mu.runs.folder import finished_runs, load_run


def test_missing_runs_are_named_with_the_available_ones(pipe, tmp_path):
    save_model(pipe.unet, tmp_path / "meta" / "unet")
    assert finished_runs(tmp_path, "original, meta") == ["original", "meta"]
    message = "first, second: no finished run below .*; there are: meta"
    with pytest.raises(FileNotFoundError, match=message):
        finished_runs(tmp_path, "original,first,meta,second")


def test_a_pipeline_loads_a_run_and_the_original_again(pipe, tmp_path):
    original = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    other = tiny.make_unet(seed=7)
    save_model(other, tmp_path / "meta" / "unet")
    assert load_run(pipe, original, tmp_path, "meta").endswith("meta/unet")
    assert torch.equal(tiny.weights(pipe.unet), tiny.weights(other))
    assert load_run(pipe, original, tmp_path, "original") == ""
    assert all(torch.equal(t, original[name]) for name, t in pipe.unet.state_dict().items())
