"""Bad inputs: each message has the value, what is allowed, and a fix; earlier results stay."""

import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from mu.attacks import finetune, search
from mu.concepts.build import read_imports
from mu.concepts.prompts import read_prompts
from mu.files import digest, locked, read_json, save_json
from mu.images import open_image
from mu.models import encode_prompts, load_pipeline
from mu.notebooks.run import execute, main
from mu.params import open_run
from mu.publish.weights import load_weights
from mu.runs.folder import finished_runs, resume
from mu.runs.parameters import RANGES, describe, make_phases
from mu.sampling import draw_images
from mu.state import State

NOTEBOOK = "notebooks/20_unlearn.ipynb"


def outside(allowed):
    """Return values outside a range: too low, too high, no number, not whole, a wrong pair."""
    bad = [math.nan, math.inf, "1", True, None]
    if allowed.low > -math.inf:
        bad.append(allowed.low if allowed.open_low else allowed.low - 1)
    if allowed.high < math.inf:
        bad.append(allowed.high if allowed.open_high else allowed.high + 1)
    if allowed.whole:
        bad.append(allowed.low + 1.5)
    if allowed.pair:
        bad += [[4, 3], [1, 2, 3], [math.nan, 4]]
    return bad


def numbers(place, name, bad):
    base = {"model": "m", "sets": "s", "method": "esd-f", "steps": 2}
    describe(base | {name: bad})


def phases(place, name, bad):
    make_phases({"phases": [{"steps": 3, name: bad}]}, "esd", 1e-4)


def attack(place, name, bad):
    finetune.AttackConfig(**{name: bad}).check()


def searching(place, name, bad):
    config = search.SearchConfig(**{name: bad})
    search.make_search("random", None, None, None, (), config)


OF_NUMBERS = [
    (call, name, bad)
    for call, ranges in (
        (numbers, RANGES),
        (phases, {name: RANGES[name] for name in ("steps", "until", "patience", "lr", "keep")}),
        (attack, finetune.RANGES),
        (searching, search.RANGES),
    )
    for name, allowed in ranges.items()
    for bad in outside(allowed)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, sd_folder):
    """A folder with earlier results of every kind."""
    place = tmp_path_factory.mktemp("results")
    save_json({"lr": 1e-4}, place / "run" / "params.json")
    save_json([{"step": 1, "losses": {}}], place / "run" / "records.json")
    unet = load_pipeline(str(sd_folder), precision="no").unet
    unet.save_pretrained(place / "run" / "unet")
    (place / "out.ipynb").write_text("{}")
    (place / "p.csv").write_text("prompt\na cat\n")
    Image.new("RGB", (8, 8)).save(place / "a.png")
    return place


@pytest.mark.parametrize("call, name, bad", OF_NUMBERS)
def test_numbers_out_of_range(call, name, bad):
    with pytest.raises(ValueError) as caught:
        call(None, name, bad)
    message = str(caught.value)
    assert message.startswith(f"{name} is {bad!r}, allowed is a ")
    assert "for example" in message


def unet():
    return tiny.make_unet()


def saved(place, tensors, name="new.safetensors"):
    save_file(tensors, place / name)
    return place / name


def written(place, name, data):
    (place / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return place / name


def noise(place, size, name="new.tif"):
    Image.fromarray(np.full((4, 4), size, np.float32)).save(place / name)
    return place / name


def one_caption(place):
    folder = place / "new"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(place / "a.png", folder / name)
    (folder / "a.txt").write_text("a cat")
    read_imports(folder)


def held(place):
    with locked(place / "run"), locked(place / "run"):
        pass


def checkpoint(place):
    written(place, "checkpoint.safetensors", b"half")
    resume(place, State(unet(), "f"))


# name → (call, the value, what is allowed or wrong, the fix)
OTHERS = {
    "method": (lambda p: describe({"method": "esd", "steps": 1}), "'esd'", "choose esd-x", "eta"),
    "phase's key": (
        lambda p: make_phases({"phases": [{"stepz": 3}]}, "esd", 1e-4),
        "'stepz'",
        "unknown key",
        "choose name, steps",
    ),
    "validation's key": (
        lambda p: make_phases({"validation": {"often": 3}}, "esd", 1e-4),
        "'often'",
        "unknown key",
        "choose every",
    ),
    "parameter": (
        lambda p: make_phases({"zeta": 3, "steps": 1}, "esd", 1e-4),
        "'zeta'",
        "unknown parameter",
        "choose unlearn",
    ),
    "subset": (lambda p: State(unet(), "all"), "'all'", "unknown subset", "choose x, u, f, lora"),
    "optimizer": (
        lambda p: State(unet(), "f", optimizer="lion"),
        "'lion'",
        "unknown optimizer",
        "choose ",
    ),
    "model": (lambda p: load_pipeline("pockets"), "'pockets'", "unknown model", "choose pocket"),
    "a file as model": (
        lambda p: load_pipeline(str(p / "a.png")),
        "a.png",
        "allowed is a folder",
        "convert it",
    ),
    "a part as model": (
        lambda p: load_pipeline(str(p / "run")),
        "run",
        "no model_index.json",
        "name the folder of the whole",
    ),
    "family": (
        lambda p: load_pipeline("pocket", family="sdxl"),
        "'pocket'",
        "of family 'sd'",
        "choose another",
    ),
    "dtype": (
        lambda p: load_pipeline("pocket", dtype="quarter"),
        "'quarter'",
        "unknown weights_dtype",
        "choose full or half",
    ),
    "precision": (
        lambda p: load_pipeline("pocket", precision="fp8"),
        "'fp8'",
        "unknown precision",
        "choose ",
    ),
    "fp16 on a CPU": (
        lambda p: load_pipeline("pocket", device="cpu", precision="fp16"),
        "'fp16'",
        "needs a GPU",
        "choose auto",
    ),
    "a prompt that is too long": (
        lambda p: encode_prompts(load_pipeline("pocket"), ["cat " * 90]),
        "cat cat",
        "at most 20",
        "shorten",
    ),
    "steps of a sampler": (
        lambda p: draw_images(load_pipeline("pocket"), {}, {}, [0], steps=0),
        "sampling_steps is 0",
        "a whole number from 1",
        "set it to",
    ),
    "guidance": (
        lambda p: draw_images(load_pipeline("pocket"), {}, {}, [0], guidance=math.nan),
        "sampling_guidance is nan",
        "allowed is a number",
        "set it to",
    ),
    "weights that are not there": (
        lambda p: load_weights(unet(), p / "nowhere"),
        "nowhere",
        "neither a file nor a folder",
        "hf download",
    ),
    "weights of another model": (
        lambda p: load_weights(unet(), saved(p, {"conv_in.weight": torch.ones(2, 2)})),
        "(2, 2)",
        "expected (16, 4, 3, 3)",
        "another architecture",
    ),
    "weights with NaN": (
        lambda p: load_weights(unet(), saved(p, {"conv_in.bias": torch.full((16,), math.nan)})),
        "conv_in.bias",
        "NaN or infinite",
        "refused",
    ),
    "no weights": (
        lambda p: load_weights(unet(), written(p, "new.safetensors", "oid sha256")),
        "new.safetensors",
        "damaged",
        "fetch it again",
    ),
    "LoHa": (
        lambda p: load_weights(unet(), saved(p, {"lora_unet_x.hada_w1_a": torch.ones(2)})),
        "LoHa",
        "allowed is plain LoRA",
        "fuse it",
    ),
    "half of a LoRA": (
        lambda p: load_weights(unet(), saved(p, {"unet.conv_in.lora_A.weight": torch.ones(2)})),
        "conv_in.lora_A",
        "is incomplete",
        "fetch it again",
    ),
    "a broken image": (
        lambda p: open_image(written(p, "new.png", b"\x89PNG")),
        "new.png",
        "not a readable image",
        "remove or replace",
    ),
    "levels": (
        lambda p: open_image(noise(p, 300.0)),
        "300",
        "not from 0 to 1",
        "remove or replace",
    ),
    "no images": (
        lambda p: read_imports(p / "run" / "unet"),
        "unet",
        "no images",
        "add .png",
    ),
    "captions of another kind": (
        lambda p: (written(p, "captions.json", "{}"), read_imports(p)),
        ".json",
        "is not read",
        "write captions to metadata.jsonl",
    ),
    "one caption": (one_caption, "b.png", "have no caption", "give each one"),
    "prompts that are not there": (
        lambda p: read_prompts(str(p / "q.csv")),
        "q.csv",
        "no file of prompts",
        "name a CSV",
    ),
    "prompts in JSON": (
        lambda p: read_prompts(written(p, "new.csv", "[1]")),
        "new.csv",
        "allowed is CSV",
        "write a column",
    ),
    "prompts in UTF-16": (
        lambda p: read_prompts(written(p, "new.csv", "prompt".encode("utf-16"))),
        "new.csv",
        "UTF-16",
        "save it as UTF-8",
    ),
    "a column that is not read": (
        lambda p: read_prompts(written(p, "new.csv", "prompt,negative_prompt\na,b\n")),
        "'negative_prompt'",
        "is not read",
        "delete it",
    ),
    "a seed": (
        lambda p: read_prompts(written(p, "new.csv", "prompt,seed\na,x\n")),
        "row 0",
        "no integer seed",
        "correct or delete",
    ),
    "a row": (lambda p: read_prompts(p / "p.csv", rows=[7]), "7", "has no rows", "choose from 0"),
    "a limit": (lambda p: read_prompts(p / "p.csv", limit=0), "0", "at least 1", "use None"),
    "a damaged JSON": (
        lambda p: read_json(written(p, "new.json", '{"a": ')),
        "new.json",
        "is damaged",
        "restore it",
    ),
    "a damaged checkpoint": (checkpoint, "checkpoint.safetensors", "is damaged", "delete it"),
    "two writers": (held, "run", "another process is writing", "wait for it"),
    "another run": (
        lambda p: open_run(p / "run", {"lr": 2}),
        "lr=0.0001",
        "not the requested",
        "ch",
    ),
    "a run that is not there": (
        lambda p: finished_runs(p, "meta"),
        "meta",
        "there are: run",
        "Run 20_unlearn",
    ),
    "output is the notebook": (
        lambda p: execute(NOTEBOOK, NOTEBOOK),
        NOTEBOOK,
        "is the notebook itself",
        "name another file",
    ),
    "output is no notebook": (
        lambda p: execute(NOTEBOOK, p / "out.html"),
        "out.html",
        "must end with .ipynb",
        "",
    ),
    "a parameter of a notebook": (
        lambda p: main([NOTEBOOK, str(p / "out.ipynb"), "-p", "step", "3"]),
        "'step'",
        "unknown parameter",
        "choose ",
    ),
    "a type": (
        lambda p: main([NOTEBOOK, str(p / "out.ipynb"), "-p", "steps", "-x"]),
        "'-x'",
        "must be int",
        "default",
    ),
    "a profile": (
        lambda p: main([NOTEBOOK, str(p / "out.ipynb"), "--profile", "t4"]),
        "'t4'",
        "no profile",
        "choose colab-t4",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bad_inputs_are_explained_and_results_stay(results, tmp_path, name):
    call, *parts = OTHERS[name]
    place = tmp_path / "place"
    shutil.copytree(results, place)
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError, SystemExit)) as caught:
        call(place)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert len(message) < 1500, "long messages are cut"
    assert digest(place / "run") == digest(results / "run")
    for file in ("out.ipynb", "a.png", "p.csv"):
        assert (place / file).read_bytes() == (results / file).read_bytes()
