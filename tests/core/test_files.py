"""Files and run parameters: complete or absent, and one run per folder."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mu.files
from mu.files import atomic, digest, locked, read_json, save_json, save_tensors
from mu.params import open_run, protocol


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_half_a_text(path, text):
    path.write_bytes(text[:3].encode())
    no_space()


def write_half_a_tensor(tensors, path):
    path.write_bytes(b"half")
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize(
    "owner, name, fail",
    [
        (Path, "write_text", write_half_a_text),
        (os, "fsync", no_space),
        (mu.files, "save_file", write_half_a_tensor),
    ],
)
def test_a_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch, earlier, owner, name, fail):
    file = tmp_path / "kept.json"
    if earlier:
        save_json({"a": 1}, file)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(owner, name, fail)
    match = "the disk is full: .*kept.json was not written.*free space"
    with pytest.raises(OSError, match=match) as caught:
        if name == "save_file":
            save_tensors({"a": torch.ones(2)}, file)
        else:
            save_json({"a": 2}, file)
    assert caught.value.errno == errno.ENOSPC
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_folder_is_named(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", refuse)
    match = "kept.json may not be written .*: choose another folder for results"
    with pytest.raises(OSError, match=match) as caught:
        save_json({}, tmp_path / "kept.json")
    assert caught.value.errno == number
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/kept.json may not be written"):
        save_json({}, tmp_path / "file" / "kept.json")


def test_damaged_json_is_named(tmp_path):
    save_json({"a": [1, 2]}, tmp_path / "a.json")
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:9])
    with pytest.raises(ValueError, match="a.json is damaged .*: restore it, or delete it"):
        read_json(tmp_path / "a.json")


def test_a_folder_has_one_writer(tmp_path):
    with locked(tmp_path / "run"):
        match = "another process is writing to .*run: wait for it"
        with pytest.raises(RuntimeError, match=match), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []
    code = f"from mu.files import locked\nwith locked({str(tmp_path / 'run')!r}): input()"
    command = [sys.executable, "-c", f"{code}"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2])
    while not (tmp_path / "run" / ".lock").exists():
        assert holder.poll() is None
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match="another process"), locked(tmp_path / "run"):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path / "run"):  # a killed process holds nothing
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_half_written_file(tmp_path, error):
    file = tmp_path / "deep" / "kept.txt"
    with atomic(file) as temporary:
        temporary.write_text("whole")
    with pytest.raises(error), atomic(file) as temporary:
        temporary.write_text("ha")
        assert file.read_text() == "whole"
        assert temporary.parent == file.parent
        raise error("stop")
    assert [f.name for f in file.parent.iterdir()] == ["kept.txt"]
    assert file.read_text() == "whole"


def test_json_and_tensors_are_read_back(tmp_path):
    value = {"rows": [{"hit": 1, "prompt": "a cat"}], "lr": 1e-5}
    save_json(value, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == value
    assert read_json(tmp_path / "b.json") is None
    assert read_json(tmp_path / "b.json", []) == []
    tensors = {
        "step": torch.tensor(3),
        "weights": torch.randn(4, 6).T,
        "state": torch.arange(5, dtype=torch.uint8),
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert torch.equal(found[name], t)
        assert found[name].dtype == t.dtype


def test_the_digest_depends_on_the_contents(tmp_path):
    file = tmp_path / "a" / "x"
    file.parent.mkdir()
    file.write_text("1")
    first = digest(file.parent)
    assert first == digest(file.parent)
    assert len(first) == 12
    file.write_text("2")
    assert digest(file.parent) != first != digest(file)


def test_a_folder_holds_one_run(tmp_path):
    params = {"concept": "cat", "lr": 1e-5, "inner_lr": (1e-5, 1e-4), "steps": 10}
    folder = open_run(tmp_path / "run", params)
    assert json.loads((folder / "params.json").read_text()) == params | {"inner_lr": [1e-5, 1e-4]}
    written = (folder / "params.json").stat().st_mtime_ns
    assert open_run(folder, params) == folder
    without_steps = {name: value for name, value in params.items() if name != "steps"}
    for other, differs in [
        (params | {"lr": 2e-5}, r"lr=1e-05, not the requested 2e-05"),
        (without_steps, "steps=10, not the requested None"),
        (params | {"zeta": 4}, "zeta=None, not the requested 4"),
        (params | {"inner_lr": (1e-5, 1e-3)}, "inner_lr="),
    ]:
        match = f"{folder} holds a run with {differs}.*another folder, or delete this one"
        with pytest.raises(ValueError, match=match):
            open_run(folder, other)
    assert (folder / "params.json").stat().st_mtime_ns == written


def test_a_stale_run_is_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("MU_STALE", "aside")
    for lr in (1.0, 2.0, 2.0, 3.0):
        folder = open_run(tmp_path / "run", {"lr": lr})
        (folder / "metrics.json").write_text(str(lr))
    assert read_json(folder / "params.json") == {"lr": 3.0}
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.json", "params.json"]
    for n, kept in ((1, "1.0"), (2, "2.0")):
        assert (tmp_path / "aside" / f"run-{n}" / "metrics.json").read_text() == kept


def test_the_protocol_holds_versions_machine_and_commit():
    card = protocol(judge="abc", seeds=[0, 1])
    assert card["judge"] == "abc"
    assert card["seeds"] == [0, 1]
    assert card["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert card["versions"].keys() >= {"torch", "diffusers", "transformers", "safetensors"}
    assert card["python"] == sys.version.split()[0]
    assert "cores" in card["machine"]
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert card["commit"] == (head.stdout.strip() or "not a git checkout")
    json.dumps(card)


def test_the_protocol_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert protocol()["commit"] == "not a git checkout"
