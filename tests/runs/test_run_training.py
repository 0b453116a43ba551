"""One training from its params.json: every method, interruption, LoRA, starts, references."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import LOOP, META_ALONE, describe, difference, is_closed, result

from mu.files import read_json
from mu.models import load_pipeline
from mu.params import open_run
from mu.runs.parameters import METHODS, check_method
from mu.runs.train import train_run

ROOT = Path(__file__).parents[2]
META_WEIGHTS = ("relearn", "self_destruct", "clean")
PLAIN = {name: value for name, value in LOOP.items() if name not in META_WEIGHTS}


def load(model):
    return load_pipeline(str(model), precision="no")


def in_subset(name, method):
    """Return whether a method trains or edits the parameter of this name."""
    subset = "x" if is_closed(method) else METHODS[method][1]
    return subset == "f" or ("attn2" in name) == (subset == "x")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_its_meta_unlearning(method, family, training_sets, request, tmp_path):
    model, closed = request.getfixturevalue(f"{family}_folder"), is_closed(method)
    pipe = load(model)
    start = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    loop = None if closed else PLAIN
    plain = describe(tmp_path / "plain", model, training_sets, method=method, loop=loop)
    history = train_run(plain, pipe)
    trained = dict(pipe.unet.named_parameters())
    moved = {name for name, p in trained.items() if not torch.equal(p, start[name])}
    assert moved
    assert all(in_subset(name, method) for name in moved)
    assert history.index[0] == 1
    assert all(torch.isfinite(p).all() for p in trained.values())
    for name, p in result(plain).items():
        assert torch.equal(p, trained[name]), name

    changes = dict(start=str(plain), closed_form=None, loop=META_ALONE if closed else LOOP)
    meta = describe(tmp_path / "meta", model, training_sets, method=method, **changes)
    history = train_run(meta, load(model))
    assert len(history) == 4
    assert history["forget after"].notna().sum() == 3
    assert ("unlearn" in history) == (not closed)
    assert difference(result(meta), result(plain)) > 0


def count_records(folder):
    return len(read_json(folder / "records.json", []))


def kill_after_two_records(folder):
    """Start a training in another process and kill it; returns what it wrote to stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mu.runs.train", str(folder), "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while count_records(folder) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.communicate()[1].decode()


def numbers(folder):
    """Return what two equal runs share: everything but the time."""
    return [(r["step"], r["losses"]) for r in read_json(folder / "records.json")]


@pytest.mark.parametrize(
    "method, changes", [("sdd", dict(subset="lora")), ("rece", dict(loop=META_ALONE))]
)
def test_a_killed_training_ends_with_the_same_numbers(
    method, changes, sd_folder, training_sets, tmp_path
):
    changes = {"loop": LOOP | {"steps": 6}, "method": method} | changes
    whole = describe(tmp_path / "whole", sd_folder, training_sets, **changes)
    killed = describe(tmp_path / "killed", sd_folder, training_sets, **changes)
    train_run(whole, checkpoint_every=1)
    errors = kill_after_two_records(killed)
    # safetensors writes to a file of such a name, so a kill may leave one
    (killed / ".tmpAbCdEf").write_bytes(b"half")
    assert count_records(killed) >= 2, errors[-500:]
    assert not (killed / "unet").exists(), "the training ended before it was killed"
    train_run(killed, checkpoint_every=1)
    assert numbers(whole) == numbers(killed)
    resumed = result(killed)
    assert all(torch.equal(p, resumed[name]) for name, p in result(whole).items())
    files = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in killed.iterdir()) == files, "the interruption left files"


def test_a_lora_run_saves_its_adapters_and_a_plain_unet(sd_folder, training_sets, tmp_path):
    runtime = {
        "frozen_dtype": "none",
        "accumulation": 2,
        "snapshot": "cpu",
        "gradient_checkpointing": True,
        "offload": True,
    }
    changes = dict(method="esd-x", subset="lora", weights_dtype="half")
    folder = describe(tmp_path / "run", sd_folder, training_sets, runtime, **changes)
    train_run(folder)
    plain, found = load(sd_folder), result(folder)
    before = plain.unet.state_dict()
    assert found.keys() == before.keys()
    assert (folder / "lora").is_dir()
    assert difference(before, found) > 0.02
    plain.load_lora_weights(folder / "lora")
    plain.fuse_lora()
    plain.unload_lora_weights()
    for name, p in plain.unet.state_dict().items():  # the run's weights are of half precision
        torch.testing.assert_close(p, found[name].float(), rtol=0, atol=5e-3)


def test_a_closed_form_can_start_from_unlearned_weights(sd_folder, training_sets, tmp_path):
    """The result has the start's weights outside the cross attention, and the edit inside."""
    runs = {
        "start": dict(method="esd-u", closed_form=None),
        "both": dict(method="uce", loop=None, start=str(tmp_path / "start")),
        "alone": dict(method="uce", loop=None),
    }
    found = {}
    for name, changes in runs.items():
        folder = describe(tmp_path / name, sd_folder, training_sets, **changes)
        train_run(folder)
        found[name] = result(folder)
    for name, p in found["both"].items():
        edited = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.equal(p, found["alone" if edited else "start"][name]), name
    assert difference(found["both"], found["start"]) > 1e-4
    assert difference(found["both"], found["alone"]) > 1e-4


def test_a_run_without_the_original_as_reference_is_refused(sd_folder, training_sets, tmp_path):
    changes = dict(subset="lora", start=str(tmp_path / "other"), closed_form=None)
    runtime = {"frozen_dtype": "none"}
    folder = describe(tmp_path / "run", sd_folder, training_sets, runtime, **changes)
    message = "needs a start from the original model.*choose frozen_dtype half or same"
    with pytest.raises(ValueError, match=message):
        train_run(folder)


@pytest.mark.parametrize(
    "changes, runtime", [({}, {}), (dict(subset="lora"), {"frozen_dtype": "none"})]
)
def test_retention_after_a_closed_form_keeps_the_edit_else_the_original(
    changes, runtime, sd_folder, training_sets, tmp_path
):
    """The drift of the first step is 0 from the edited model, and positive from the original."""

    def drift(name, runtime=None, **changes):
        folder = describe(tmp_path / name, sd_folder, training_sets, runtime, **changes)
        return train_run(folder)["related drift"].iloc[0]

    edited = describe(tmp_path / "edited", sd_folder, training_sets, method="uce", loop=None)
    train_run(edited)
    changes = dict(method="uce", loop=META_ALONE | {"steps": 1}) | changes
    assert drift("closed form", runtime, **changes) < 1e-12
    changes |= dict(start=str(edited), closed_form=None)
    assert drift("its result", runtime, **changes) < 1e-12
    assert drift("esd", start=str(edited), loop=LOOP | {"steps": 1}) > 1e-8


def test_missing_parameters_have_defaults(sd_folder, training_sets, tmp_path):
    loop = {"steps": 1, "batch_size": 1, "trajectory_steps": 2}
    params = {"model": str(sd_folder), "sets": str(training_sets), "loop": loop}
    assert len(train_run(open_run(tmp_path / "run", params))) == 1


def test_unknown_methods_and_missing_runs_are_named(tmp_path):
    message = "'esd-u-3': choose esd-x, esd-u, esd-f, sdd, uce, rece .*eta = 3.0"
    with pytest.raises(ValueError, match=message):
        check_method("esd-u-3")
    with pytest.raises(FileNotFoundError, match="nothing has no params.json: run 20_unlearn"):
        train_run(tmp_path / "nothing")
