"""One GPU for each of several notebooks."""

import contextlib
import os
import subprocess
import sys

import pytest
from toys import ROOT

from mu.notebooks.gpus import one_gpu, visible_gpus

HOLD = """import sys, time
from mu.notebooks.gpus import one_gpu
with one_gpu(sys.argv[1], ['0', '1']) as name:
    print(name, flush=True)
    time.sleep(600)"""


def test_each_takes_its_own_gpu_and_releases_it(tmp_path):
    names = ["0", "MIG-1/0"]
    with one_gpu(tmp_path, names) as first:
        with one_gpu(tmp_path, names) as second:
            assert (first, second) == ("0", "MIG-1/0")
            message = r"all GPUs \(0, MIG-1/0\) are taken by other notebooks.*gpu=2"
            with pytest.raises(RuntimeError, match=message), one_gpu(tmp_path, names):
                raise AssertionError("a third of two")
        with contextlib.suppress(KeyError), one_gpu(tmp_path, names) as again:
            assert again == "MIG-1/0"
            raise KeyError("a notebook that failed")
        with one_gpu(tmp_path, names) as again:
            assert again == "MIG-1/0"
    with one_gpu(tmp_path, names) as again:
        assert again == "0"


def test_a_gpu_of_another_process_is_free_once_that_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"0\n"
        with one_gpu(tmp_path, ["0", "1"]) as other:
            assert other == "1"
    finally:
        holder.kill()
        holder.wait()
    with one_gpu(tmp_path, ["0", "1"]) as other:
        assert other == "0"


def test_a_scheduler_limits_the_visible_gpus(monkeypatch):
    for value, names in (("3", ["3"]), ("GPU-ab, GPU-cd", ["GPU-ab", "GPU-cd"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]
