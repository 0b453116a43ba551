"""Run folders: whole files or none, one run a folder, and a killed run that ends with the same numbers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import mu.runs.folder
from mu.files import atomic, digest, read_json, save_json, save_tensors
from mu.models import load_pipeline
from mu.params import open_run, protocol
from mu.publish.weights import load_weights, save_model, save_pipeline
from mu.runs.folder import finish, resume, run_loop
from mu.train import State, finetune, unlearn

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


def make_run():
    """A state and its loop over `unlearn`, from fresh components: the same in this process and in one that is killed."""
    torch.set_num_threads(1)
    state = State(tiny.make_unet(), "u", lr=1e-3, seed=7)
    return state, lambda steps: unlearn(
        state,
        tiny.frozen(tiny.make_unet()),
        tiny.make_scheduler(),
        *tiny.make_sets(),
        steps=steps,
        **OPTIONS,
    )


def facts(records):
    return [(r["step"], r["losses"], r["passes"]) for r in records]


# --- files ---------------------------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("where", ["write", "fsync", "safetensors"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, earlier, where):
    file = tmp_path / "kept.json"
    if earlier:
        save_json({"a": 1}, file)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}

    def save():
        return save_json({"a": 2}, file)

    if where == "write":

        def half(path, text):
            path.write_bytes(text[:3].encode())
            no_space()

        monkeypatch.setattr(Path, "write_text", half)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    else:

        def half(tensors, path):
            path.write_bytes(b"half")
            raise RuntimeError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(mu.runs.folder, "save_file", half)

        def save():
            return save_tensors({"a": torch.ones(2)}, file)

    with pytest.raises(
        OSError, match="the disk is full: .*kept.json was not written.*free space"
    ) as caught:
        save()
    assert caught.value.errno == errno.ENOSPC
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_any_error_leaves_nothing_half_written(tmp_path, error):
    file = tmp_path / "deep" / "kept.txt"
    with atomic(file) as temporary:
        temporary.write_text("whole")
    with pytest.raises(error), atomic(file) as temporary:
        temporary.write_text("ha")
        assert file.read_text() == "whole" and temporary.parent == file.parent
        raise error("stop")
    assert [f.name for f in file.parent.iterdir()] == ["kept.txt"] and file.read_text() == "whole"


def test_json_and_tensors_come_back(tmp_path):
    value = {"rows": [{"hit": 1, "prompt": "a cat"}], "lr": 1e-5}
    save_json(value, tmp_path / "a.json")
    assert (
        read_json(tmp_path / "a.json") == value
        and read_json(tmp_path / "b.json") is None
        and read_json(tmp_path / "b.json", []) == []
    )
    tensors = {
        "step": torch.tensor(3),
        "weights": torch.randn(4, 6).T,
        "state": torch.arange(5, dtype=torch.uint8),
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors
    )


# --- run folders ---------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_run(tmp_path):
    params = {"concept": "cat", "lr": 1e-5, "inner_lr": (1e-5, 1e-4), "steps": 10}
    folder = open_run(tmp_path / "run", params)
    assert json.loads((folder / "params.json").read_text()) == params | {"inner_lr": [1e-5, 1e-4]}
    written = (folder / "params.json").stat().st_mtime_ns
    assert open_run(folder, params) == folder
    for other, name in [
        (params | {"lr": 2e-5}, r"lr=1e-05, not the requested 2e-05"),
        ({k: v for k, v in params.items() if k != "steps"}, "steps=10, not the requested None"),
        (params | {"zeta": 4}, "zeta=None, not the requested 4"),
        (params | {"inner_lr": (1e-5, 1e-3)}, "inner_lr="),
    ]:
        with pytest.raises(
            ValueError,
            match=f"{folder} holds a run with {name}.*another folder, or delete this one",
        ):
            open_run(folder, other)
    assert (folder / "params.json").stat().st_mtime_ns == written


def test_a_walk_puts_a_stale_run_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("MU_STALE", "aside")
    for lr in (1.0, 2.0, 2.0, 3.0):
        folder = open_run(tmp_path / "run", {"lr": lr})
        (folder / "metrics.json").write_text(str(lr))
    assert read_json(folder / "params.json") == {"lr": 3.0} and sorted(
        p.name for p in folder.iterdir()
    ) == ["metrics.json", "params.json"], "begun anew"
    assert [(tmp_path / "aside" / f"run-{n}" / "metrics.json").read_text() for n in (1, 2)] == [
        "1.0",
        "2.0",
    ], "and nothing lost"


def test_protocol_holds_versions_machine_and_commit():
    card = protocol(judge="abc", seeds=[0, 1])
    assert card["judge"] == "abc" and card["seeds"] == [0, 1]
    assert (
        card["versions"]["torch"] == torch.__version__.split("+")[0]
        or card["versions"]["torch"] == torch.__version__
    )
    assert card["versions"].keys() >= {"torch", "diffusers", "transformers", "safetensors"}
    assert card["python"] == sys.version.split()[0] and "cores" in card["machine"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert card["commit"] == (head.stdout.strip() or "not a git checkout")
    json.dumps(card)


def test_protocol_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert protocol()["commit"] == "not a git checkout"


def test_digest_tells_contents_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "a") and len(first) == 12
    (tmp_path / "a" / "x").write_text("2")
    assert digest(tmp_path / "a") != first != digest(tmp_path / "a" / "x")


def test_a_finished_run_is_a_unet_of_diffusers(tmp_path, unet):
    from diffusers import UNet2DConditionModel

    save_tensors({"a": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    for _ in range(2):  # the second time over the first
        finish(tmp_path, unet)
        plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        assert torch.equal(tiny.weights(plain), tiny.weights(unet)) and [
            f.name for f in tmp_path.iterdir()
        ] == ["unet"]
    other = tiny.make_unet(seed=1)
    assert not torch.equal(tiny.weights(other), tiny.weights(unet))
    assert load_weights(other, tmp_path) == load_weights(other, tmp_path / "unet") and torch.equal(
        tiny.weights(other), tiny.weights(unet)
    )
    wider = tiny.make_unet(cross_attention_dim=24)
    before = tiny.weights(wider)
    with pytest.raises(
        ValueError,
        match=r"unet is of another architecture: down_blocks.1.\S+ is \(\d+, 16\) there and \(\d+, 24\) here",
    ):
        load_weights(wider, tmp_path / "unet")
    assert torch.equal(tiny.weights(wider), before)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_weights(other, tmp_path / "unfinished")


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_with_the_same_records(tmp_path, sets, noise_scheduler):
    """Stopped between two checkpoints: the steps since the last one are done again, and are the same."""

    def make():
        return State(tiny.make_unet(), "f", lr=1e-3, optimizer="adam", seed=3)

    def loop(state):
        return run_loop(
            tmp_path / "run",
            state,
            finetune(state, noise_scheduler, sets[0], steps=7),
            checkpoint_every=2,
        )

    whole = make()
    expected = list(finetune(whole, noise_scheduler, sets[0], steps=7))

    for record in loop(make()):
        if record.step == 5:
            break
    assert int(load_file(tmp_path / "run" / "checkpoint.safetensors")["step"]) == 4
    state = resume(tmp_path / "run", make())
    assert state.step == 4
    again = list(loop(state))
    assert [r.step for r in again] == [5, 6, 7]
    assert [(r.step, r.losses) for r in again] == [(r.step, r.losses) for r in expected[4:]]
    assert [(r["step"], r["losses"]) for r in read_json(tmp_path / "run" / "records.json")] == [
        (r.step, r.losses) for r in expected
    ]
    assert torch.equal(tiny.weights(state.unet), tiny.weights(whole.unet))
    final = resume(tmp_path / "run", make())  # the end is kept, though 7 is no multiple of 2
    assert (
        final.step == 7
        and torch.equal(tiny.weights(final.unet), tiny.weights(whole.unet))
        and list(loop(final)) == []
    )
    assert len(read_json(tmp_path / "run" / "records.json")) == 7
    assert resume(tmp_path / "elsewhere", make()).step == 0


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, sets, noise_scheduler, monkeypatch):
    state = State(tiny.make_unet(), "f", lr=1e-3, optimizer="adam")
    with pytest.raises(OSError, match="the disk is full"):
        for record in run_loop(
            tmp_path, state, finetune(state, noise_scheduler, sets[0], steps=4), checkpoint_every=1
        ):
            if record.step == 2:
                kept = tiny.weights(state.unet)
                monkeypatch.setattr(mu.runs.folder, "save_file", no_space)
    monkeypatch.undo()
    state = resume(tmp_path, State(tiny.make_unet(), "f", lr=1e-3, optimizer="adam"))
    assert state.step == 2 and torch.equal(tiny.weights(state.unet), kept)
    assert [r["step"] for r in read_json(tmp_path / "records.json")] == [
        1,
        2,
        3,
    ]  # written before the checkpoint that failed
    for _ in run_loop(tmp_path, state, finetune(state, noise_scheduler, sets[0], steps=4)):
        pass
    assert [r["step"] for r in read_json(tmp_path / "records.json")] == [1, 2, 3, 4]


def test_kill_9_and_go_on(tmp_path):
    """A process that writes a run folder is killed; meanwhile its checkpoint is read over and over and is always whole."""
    here = Path(__file__).parents[1]
    code = (
        "import test_runs, mu.runs.folder; state, loop = test_runs.make_run()\n"
        f"for record in mu.runs.folder.run_loop({str(tmp_path)!r}, state, loop(1000), checkpoint_every=1): pass"
    )
    environment = os.environ | {
        "PYTHONPATH": f"{Path(mu.__file__).parent.parent}{os.pathsep}{here}",
        "OMP_NUM_THREADS": "1",
    }
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

    state, loop = make_run()
    resume(tmp_path, state)
    done, steps = state.step, state.step + 2
    assert done >= 2
    for _ in run_loop(tmp_path, state, loop(steps)):
        pass
    whole, loop = make_run()
    expected = [(r.step, r.losses, r.passes) for r in loop(steps)]
    assert facts(read_json(tmp_path / "records.json")) == expected
    assert torch.equal(tiny.weights(state.unet), tiny.weights(whole.unet))


def test_saved_models_name_no_place_of_this_machine(pipe, sd_folder, tmp_path):
    pipe.vae.register_to_config(
        _name_or_path=str(sd_folder / "vae")
    )  # as parts that were loaded alone have it
    save_model(pipe, tmp_path / "model")
    save_pipeline(pipe, tmp_path / "published", "a card")
    assert (
        load_pipeline(str(tmp_path / "model")).vae.config.sample_size == pipe.vae.config.sample_size
    )
    for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md")]:
        assert str(sd_folder) not in file.read_text(), file
