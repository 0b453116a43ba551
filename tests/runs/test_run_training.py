"""A training from its params.json: every method, one process or several, stopped and gone on with, SD and SDXL."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from mu.files import read_json
from mu.models import load_pipeline
from mu.params import open_run
from mu.runs.parameters import METHODS, check_method
from mu.runs.train import launch, train_run

ROOT = Path(__file__).parents[2]
LOOP = dict(
    steps=4,
    batch_size=2,
    trajectory_steps=4,
    trajectory_reuse=2,
    retain=1.0,
    retain_batch_size=4,
    relearn=0.5,
    self_destruct=1.0,
    clean=1.0,
    clean_every=3,
    inner_steps=[1, 2],
    inner_lr=[1e-3, 2e-3],
    inner_optimizer=["sgd", "adam"],
    inner_batch_size=2,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("sets")
    for name, captions in {
        "forget": ["a cat", "a photo of a cat"],
        "retain-related": ["a tiger", "a tiger"],
        "retain-unrelated": ["a banana", "a cup", "a cup"],
    }.items():
        tiny.make_images(base / "defender" / name, captions, seed=len(name))
    return base


def describe(folder, model, sets, runtime=None, **changes):
    """A run folder with its params.json."""
    params = dict(
        model=str(model),
        sets=str(sets),
        method="esd-f",
        subset="",
        rank=2,
        weights_dtype="full",
        precision="no",
        start="",
        replace="",
        retain_prompts=3,
        lr=1e-2,
        optimizer="adamw",
        ema=0.9,
        seed=3,
        closed_form=dict(forget=["cat"], preserve=["tiger", "cup"]),
        loop=LOOP,
    )
    params |= changes
    closed = METHODS[params["method"]][0] is None
    return open_run(
        folder,
        params
        | {"closed_form": changes.get("closed_form", params["closed_form"] if closed else None)},
        runtime,
    )


def result(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def difference(one, two):
    """Largest difference between the weights of two results."""
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_a_parameter(method, family, folders, request, tmp_path):
    model = request.getfixturevalue(f"{family}_folder")
    pipe = load_pipeline(str(model))
    start = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    closed = METHODS[method][0] is None
    plain = describe(
        tmp_path / "plain",
        model,
        folders,
        method=method,
        loop=None
        if closed
        else {
            name: value
            for name, value in LOOP.items()
            if name not in ("relearn", "self_destruct", "clean")
        },
    )
    history = train_run(plain, pipe)
    moved = {name for name, p in pipe.unet.named_parameters() if not torch.equal(p, start[name])}
    inside = {"x": lambda n: "attn2" in n, "u": lambda n: "attn2" not in n, "f": lambda n: True}[
        {"uce": "x", "rece": "x"}.get(method, METHODS[method][1])
    ]
    assert (
        moved
        and all(inside(name) for name in moved)
        and history.index[0] == 1
        and all(torch.isfinite(p).all() for p in pipe.unet.parameters())
    )
    for name, p in result(plain).items():
        assert torch.equal(p, dict(pipe.unet.named_parameters())[name]), name
    meta = describe(
        tmp_path / "meta",
        model,
        folders,
        method=method,
        start=str(plain),
        closed_form=None,
        loop=LOOP | ({"unlearn": 0.0} if closed else {}),
    )
    history = train_run(meta, load_pipeline(str(model)))
    assert (
        len(history) == 4
        and history["forget after"].notna().sum() == 3
        and ("unlearn" in history) == (not closed)
    )
    assert difference(result(meta), result(plain)) > 0


@pytest.mark.parametrize(
    "method, changes", [("sdd", dict(subset="lora")), ("rece", dict(loop=LOOP | {"unlearn": 0.0}))]
)
def test_a_killed_training_ends_with_the_same_numbers(
    method, changes, sd_folder, folders, tmp_path
):
    """kill -9 after the second checkpoint; then the same call again."""
    whole, killed = (
        describe(
            tmp_path / name,
            sd_folder,
            folders,
            method=method,
            **{"loop": LOOP | {"steps": 6}} | changes,
        )
        for name in ("whole", "killed")
    )
    train_run(whole, checkpoint_every=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "mu.runs.train", str(killed), "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while (
        len(read_json(killed / "records.json", [])) < 2
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed / ".tmpAbCdEf").write_bytes(
        b"half"
    )  # as safetensors names a file that it is writing: a kill may come then, too
    done = len(read_json(killed / "records.json", []))
    assert done >= 2 and not (killed / "unet").exists(), process.stderr.read().decode()[-500:]
    train_run(killed, checkpoint_every=1)

    def facts(folder):
        return [(r["step"], r["losses"]) for r in read_json(folder / "records.json")]

    assert facts(whole) == facts(killed) and all(
        torch.equal(p, result(killed)[name]) for name, p in result(whole).items()
    )
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir()), (
        "nothing is left of the interruption"
    )


def test_a_lora_run_leaves_its_adapters_and_a_plain_unet(sd_folder, folders, tmp_path):
    folder = describe(
        tmp_path / "run",
        sd_folder,
        folders,
        {
            "frozen_dtype": "none",
            "accumulation": 2,
            "snapshot": "cpu",
            "gradient_checkpointing": True,
            "offload": True,
        },
        method="esd-x",
        subset="lora",
        weights_dtype="half",
    )
    train_run(folder)
    plain = load_pipeline(str(sd_folder))
    assert set(result(folder)) == set(plain.unet.state_dict()) and (folder / "lora").is_dir()
    expected = result(folder)
    assert (
        max((p - expected[name].float()).abs().max() for name, p in plain.unet.state_dict().items())
        > 0.02
    )
    plain.load_lora_weights(folder / "lora")
    plain.fuse_lora()
    plain.unload_lora_weights()
    for name, p in plain.unet.state_dict().items():
        torch.testing.assert_close(
            p, expected[name].float(), rtol=0, atol=5e-3
        )  # the run's weights are of half precision


def test_a_closed_form_may_start_from_what_others_have_unlearned(sd_folder, folders, tmp_path):
    """Both count: the start's weights outside the cross attention, and the edit inside."""
    start, both, alone = (
        describe(tmp_path / name, sd_folder, folders, **changes)
        for name, changes in (
            ("start", dict(method="esd-u", closed_form=None)),
            ("both", dict(method="uce", loop=None, start=str(tmp_path / "start"))),
            ("alone", dict(method="uce", loop=None)),
        )
    )
    for folder in (start, both, alone):
        train_run(folder)
    one, two, three = map(result, (start, both, alone))
    for name in one:
        edited = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.equal(two[name], three[name] if edited else one[name]), name
    assert difference(two, one) > 1e-4 < difference(two, three)


def test_the_reference_is_the_original_or_the_run_is_refused(sd_folder, folders, tmp_path):
    folder = describe(
        tmp_path / "run",
        sd_folder,
        folders,
        {"frozen_dtype": "none"},
        subset="lora",
        start=str(tmp_path / "other"),
        closed_form=None,
    )
    with pytest.raises(
        ValueError, match="needs a start from the original model.*choose frozen_dtype half or same"
    ):
        train_run(folder)


@pytest.mark.parametrize(
    "changes, runtime", [({}, {}), (dict(subset="lora"), {"frozen_dtype": "none"})]
)
def test_after_a_closed_form_retention_holds_the_edit_otherwise_the_original(
    changes, runtime, sd_folder, folders, tmp_path
):
    """The drift of the first step, before anything has moved: none from the edited model, some from the original."""
    loop, drift = LOOP | {"steps": 1}, {}
    edited = describe(tmp_path / "edited", sd_folder, folders, method="uce", loop=None)
    train_run(edited)
    for name, more in {
        "closed form": dict(method="uce", loop=loop | {"unlearn": 0.0}),
        "its result": dict(
            method="uce", start=str(edited), loop=loop | {"unlearn": 0.0}, closed_form=None
        ),
    }.items():
        drift[name] = train_run(
            describe(tmp_path / name, sd_folder, folders, runtime, **more | changes)
        )["related drift"].iloc[0]
    drift["esd"] = train_run(
        describe(tmp_path / "esd", sd_folder, folders, start=str(edited), loop=loop)
    )["related drift"].iloc[0]
    assert drift["closed form"] < 1e-12 > drift["its result"] and drift["esd"] > 1e-8


def test_what_a_run_leaves_out_has_a_default(sd_folder, folders, tmp_path):
    folder = open_run(
        tmp_path / "run",
        {
            "model": str(sd_folder),
            "sets": str(folders),
            "loop": {"steps": 1, "batch_size": 1, "trajectory_steps": 2},
        },
    )
    assert len(train_run(folder)) == 1


def test_unknown_methods_and_missing_runs_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="'esd-u-3': choose esd-x, esd-u, esd-f, sdd, uce, rece .*eta = 3.0"
    ):
        check_method("esd-u-3")
    with pytest.raises(FileNotFoundError, match="nothing has no params.json: run 20_unlearn"):
        train_run(tmp_path / "nothing")


def test_two_processes_give_the_numbers_of_one(sd_folder, folders, tmp_path):
    """Half of each batch to each, by torchrun: equal but for the order of sums, and far nearer than another seed's."""
    for i, (method, changes) in enumerate(
        (("esd-f", {}), ("sdd", {}), ("sdd", dict(precision="bf16")))
    ):
        one, two, other = (
            describe(
                tmp_path / f"{i}-{name}",
                sd_folder,
                folders,
                method=method,
                optimizer="sgd",
                lr=1.0,
                seed=seed,
                loop=LOOP | {"order": "first"},
                **changes,
            )
            for name, seed in (("one", 3), ("two", 3), ("other", 4))
        )
        train_run(one)
        train_run(other)
        environment = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            history = launch(two, load_pipeline(str(sd_folder)), processes=2)
        assert history.passes.tolist() == [r["passes"] for r in read_json(one / "records.json")]
        far, near = difference(result(one), result(other)), difference(result(one), result(two))
        assert near < (0.1 if changes else 1e-4) * far, (method, near, far)
        for mine, theirs in zip(
            read_json(one / "records.json"), read_json(two / "records.json"), strict=False
        ):
            assert theirs["losses"] == pytest.approx(
                mine["losses"], rel=0.15 if changes else 1e-4
            )  # a small drift in bf16 is half rounding


def test_the_notebook_launcher_gives_the_numbers_of_one(sd_folder, folders, tmp_path):
    one, two = (
        describe(tmp_path / name, sd_folder, folders, optimizer="sgd", lr=1.0)
        for name in ("one", "two")
    )
    train_run(one)
    cell = """
import sys
from accelerate import notebook_launcher

def train(folder):
    from mu.launch import train_run
    train_run(folder)
    from accelerate import PartialState
    print(f"process {PartialState().process_index} of {PartialState().num_processes}\\n", end="", flush=True)  # in one piece: two print at once

notebook_launcher(train, (sys.argv[1],), num_processes=2, use_port=sys.argv[2])
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", cell, str(two), port],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert (
        "process 0 of 2" in done.stdout and "process 1 of 2" in done.stdout
    )  # and not two of one, which would give the same numbers
    for mine, theirs in zip(
        read_json(one / "records.json"), read_json(two / "records.json"), strict=True
    ):
        assert theirs["losses"] == pytest.approx(mine["losses"], rel=1e-4)
