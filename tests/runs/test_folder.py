"""Run folders: a stopped or killed run resumes and ends with the same numbers."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from flat import unlearn
from safetensors.torch import load_file

import mu.files
from mu import ROOT
from mu.files import read_json, save_tensors
from mu.publish.weights import load_weights
from mu.runs.folder import finish, resume, run_loop
from mu.state import State
from mu.train import finetune

OPTIONS = dict(
    batch_size=1,
    trajectory_reuse=4,
    retain=1.0,
    relearn=0.3,
    self_destruct=1.0,
    inner_steps=(1, 2),
    inner_lr=(1e-4, 4e-4),
    inner_optimizer="adam",
    inner_batch_size=4,
)


def make_run(steps):
    """Return a state and its loop over `unlearn`, the same in this process and in a killed one."""
    torch.set_num_threads(1)
    state = State(tiny.make_unet(), "u", lr=1e-3, seed=7)
    parts = (tiny.frozen(tiny.make_unet()), tiny.make_scheduler(), *tiny.make_sets())
    return state, unlearn(state, *parts, steps=steps, **OPTIONS)


def make_attack():
    return State(tiny.make_unet(), "f", lr=1e-3, optimizer="adam", seed=3)


def without_time(records):
    """Return what two equal runs share: all but the seconds."""
    return [(r.step, r.losses, r.passes) for r in records]


def saved_records(folder):
    return [(r["step"], r["losses"], r["passes"]) for r in read_json(folder / "records.json")]


def assert_equal(unet, other):
    assert torch.equal(tiny.weights(unet), tiny.weights(other))


# --- results ---------------------------------------------------------------------------------


def test_a_finished_run_is_a_diffusers_unet(tmp_path, unet):
    save_tensors({"a": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    for _ in range(2):  # the second time over the first
        finish(tmp_path, unet)
        assert_equal(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), unet)
        assert [file.name for file in tmp_path.iterdir()] == ["unet"]
    other = tiny.make_unet(seed=1)
    assert not torch.equal(tiny.weights(other), tiny.weights(unet))
    assert load_weights(other, tmp_path) == load_weights(other, tmp_path / "unet")
    assert_equal(other, unet)


def test_a_result_that_does_not_fit_is_refused(tmp_path, unet):
    finish(tmp_path, unet)
    wider = tiny.make_unet(cross_attention_dim=24)
    before = tiny.weights(wider)
    match = r"unet has another architecture: down_blocks.1.\S+ is \(\d+, 16\), expected \(\d+, 24\)"
    with pytest.raises(ValueError, match=match):
        load_weights(wider, tmp_path / "unet")
    assert torch.equal(tiny.weights(wider), before)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_weights(unet, tmp_path / "unfinished")


def test_leftovers_of_killed_processes_are_deleted(tmp_path, unet):
    (tmp_path / ".unet.7.old").mkdir()
    for name in (".tmp1", ".records.json.7.tmp"):
        (tmp_path / name).write_text("half")
    finish(tmp_path, unet)
    assert [file.name for file in tmp_path.iterdir()] == ["unet"]


# --- resuming --------------------------------------------------------------------------------


def test_a_stopped_run_resumes_with_the_same_records(tmp_path, sets, noise_scheduler):
    """The steps since the last checkpoint are repeated with the same numbers."""
    folder = tmp_path / "run"

    def loop(state):
        records = finetune(state, noise_scheduler, sets[0], steps=7)
        return run_loop(folder, state, records, checkpoint_every=2)

    whole = make_attack()
    expected = without_time(finetune(whole, noise_scheduler, sets[0], steps=7))

    for record in loop(make_attack()):
        if record.step == 5:
            break
    assert int(load_file(folder / "checkpoint.safetensors")["step"]) == 4
    state = resume(folder, make_attack())
    assert state.step == 4
    again = list(loop(state))
    assert [r.step for r in again] == [5, 6, 7]
    assert without_time(again) == expected[4:]
    assert saved_records(folder) == expected
    assert_equal(state.unet, whole.unet)
    final = resume(folder, make_attack())  # the end is saved, though 7 is no multiple of 2
    assert final.step == 7
    assert_equal(final.unet, whole.unet)
    assert list(loop(final)) == []
    assert len(read_json(folder / "records.json")) == 7
    assert resume(tmp_path / "elsewhere", make_attack()).step == 0


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, sets, noise_scheduler, monkeypatch):
    def loop(state, **options):
        records = finetune(state, noise_scheduler, sets[0], steps=4)
        return run_loop(tmp_path, state, records, **options)

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def saved_steps():
        return [record["step"] for record in read_json(tmp_path / "records.json")]

    state = make_attack()
    with pytest.raises(OSError, match="the disk is full"):
        for record in loop(state, checkpoint_every=1):
            if record.step == 2:
                kept = tiny.weights(state.unet)
                monkeypatch.setattr(mu.files, "save_file", no_space)
    monkeypatch.undo()
    state = resume(tmp_path, make_attack())
    assert state.step == 2
    assert torch.equal(tiny.weights(state.unet), kept)
    assert saved_steps() == [1, 2, 3]  # written before the checkpoint that failed
    for _ in loop(state):
        pass
    assert saved_steps() == [1, 2, 3, 4]


def test_a_killed_run_resumes_from_a_whole_checkpoint(tmp_path):
    """A process is killed with SIGKILL; its checkpoint is whole whenever it is read."""
    here = Path(__file__).parent
    code = (
        "import test_folder\n"
        "from mu.runs.folder import run_loop\n"
        "state, loop = test_folder.make_run(1000)\n"
        f"for record in run_loop({str(tmp_path)!r}, state, loop, checkpoint_every=1): pass"
    )
    path = os.pathsep.join(map(str, (ROOT, here.parent, here)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE
    )
    file, reads, began = tmp_path / "checkpoint.safetensors", 0, time.time()
    try:
        while not file.exists() or int(load_file(file)["step"]) < 2:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            assert time.time() - began < 120
            reads += file.exists()
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert reads

    done = int(load_file(file)["step"])
    assert done >= 2
    state, loop = make_run(done + 2)
    resume(tmp_path, state)
    assert state.step == done
    for _ in run_loop(tmp_path, state, loop):
        pass
    whole, loop = make_run(done + 2)
    assert saved_records(tmp_path) == without_time(loop)
    assert_equal(state.unet, whole.unet)


def test_a_damaged_checkpoint_is_named(tmp_path):
    state, loop = make_run(2)
    for _ in run_loop(tmp_path, state, loop, checkpoint_every=1):
        pass
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:20] + b"x" + whole[21:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint.safetensors is damaged.*: delete it to b"):
            resume(tmp_path, make_run(2)[0])
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged, or of another training .this checkpoint trains"):
        resume(tmp_path, make_attack())
    file.unlink()
    assert resume(tmp_path, make_run(2)[0]).step == 0
