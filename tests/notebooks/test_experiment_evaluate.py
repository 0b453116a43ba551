"""Evaluate and publish: notebooks 50 and 60."""

import json

import pytest
import tiny
import torch
from experiment import NOTEBOOKS, assert_no_warnings, read, stamps, tiny_experiment
from safetensors.torch import load_file

pytestmark = pytest.mark.notebooks
# The trained Inception and the trained trunk of LPIPS would be downloaded: both are random here.
SCRIPT = """
import json, os, nbformat
from unittest.mock import patch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
import mu.measures.metrics

os.environ["MPLBACKEND"] = "Agg"
given, notebook = json.loads(sys.argv[1]), nbformat.read(sys.argv[2], 4)
# FeatureExtractorInceptionV3 loads a file, which does not exist: it keeps its random weights.
with patch("torch.load", lambda *_, **__: {}), patch("torch.nn.Module.load_state_dict"):
    inception = FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path="none"
    )
    torch.save(inception.state_dict(), given["inception"])
real = mu.measures.metrics.lpips_network
mu.measures.metrics.lpips_network = lambda net: real(net, pnet_rand=True)
space = {"display": print}
for cell in notebook.cells:
    if cell.cell_type == "code":
        exec(cell.source, space)
        space.update(given if "parameters" in cell.metadata.get("tags", []) else {})
with open(given["out"] + "/measured/evaluation.json") as file:
    print(json.dumps(json.load(file)))
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with tiny_experiment(tmp_path_factory.mktemp("evaluate")) as made:
        made.train()
        made.attack()
        yield made


@pytest.fixture(scope="module")
def everything(experiment):
    """Parameters that switch on every measure but FID and LPIPS."""
    base = experiment.base
    prompts, captions = base / "prompts.csv", base / "captions.csv"
    prompts.write_text("prompt,evaluation_seed,evaluation_guidance\na tiger,3,2.0\na cat,4,3.0\n")
    captions.write_text("prompt\na cup\na banana\na tiger\n")
    return dict(
        nudenet=True,
        least=2,
        prompts=str(prompts),
        captions=str(captions),
        clip=str(tiny.make_clip(base / "clip")),
        attack="forget-6e-05",
        runs="original,unlearned,meta",
    )


def test_all_measures_are_in_one_table_with_its_card(experiment, everything):
    """The evaluation prompts, harmful prompts, captions with CLIP, NudeNet and an attack."""
    assert experiment.run("50_evaluate", **everything)
    folder = experiment.runs / "evaluate"
    saved = read(folder, "evaluation.json")
    numbers = {"forget recognised", "jfd", "change", "flagged", "CLIP score", "steps to revival"}
    assert numbers | {"area under relearning"} <= set(saved["numbers"]["meta"])
    assert saved["numbers"]["original"]["jfd"] == 0
    card = {"judge", "probe_seeds", "sampling_steps", "detector", "flagged_threshold", "clip"}
    card |= {"captions", "jfd_marked", "attack", "versions"}
    assert card <= set(saved["protocol"])
    assert read(folder, "meta", "prompts", "params.json")["blurred"] is True
    assert len(list((folder / "meta" / "prompts").glob("*.png"))) == 2

    before = stamps(folder / "meta")
    assert experiment.run("50_evaluate", output="50_again", **everything, threshold=0.4)
    assert stamps(folder / "meta") == before, "the second evaluation only reads"


def test_an_unknown_run_is_refused(experiment):
    with pytest.raises(RuntimeError, match="nobody: no finished run below"):
        experiment.run("50_evaluate", output="50_nobody", runs="original,nobody")


def test_fid_and_lpips(experiment):
    """The notebook's cells in a process with torch-fidelity and lpips."""
    base = experiment.base
    (base / "mild.csv").write_text("prompt\na cup\na banana\na tiger\n")
    tiny.make_images(base / "real", [str(i) for i in range(4)], size=24)
    given = experiment.places | dict(
        place="measured",
        captions=str(base / "mild.csv"),
        least=2,
        fid_reference=str(base / "real"),
        inception=str(base / "inception.pth"),
        lpips="vgg",
    )
    saved = tiny.run_with_measures(SCRIPT, json.dumps(given), NOTEBOOKS / "50_evaluate.ipynb")
    numbers, card = saved["numbers"], saved["protocol"]
    assert numbers["original"]["LPIPS"] == 0 < numbers["meta"]["LPIPS"]
    assert numbers["original"]["fid"] > 0
    assert numbers["meta"]["fid"] > 0
    assert card["fid_backend"].startswith("torch-fidelity")
    assert card["fid_images"] == 3
    assert "biased" in card["fid_marked"]
    assert card["lpips"] == "vgg, 3 pictures, captions, against original"


def test_a_run_is_published_in_three_forms(experiment):
    to = experiment.base / "published"
    given = dict(run=str(experiment.runs / "meta"), to=str(to), rank=4, half=True)
    assert experiment.run("60_publish", **given, prompt="a tiger", sampling_steps=2)
    for name in ("pipeline", "difference", "lora"):
        card = (to / name / "README.md").read_text()
        assert "license: cc-by-sa-4.0" in card
        assert "esd-f" in card
    tensors = load_file(to / "difference" / "difference.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}


def test_no_executed_notebook_shows_a_warning(experiment):
    assert_no_warnings(experiment)
