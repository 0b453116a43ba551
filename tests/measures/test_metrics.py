"""Each metric against an independent computation on small random networks; refused inputs.

torch-fidelity and LPIPS are installed apart (see the Makefile) and run in their own process.
"""

import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scipy.linalg import sqrtm
from transformers import CLIPModel

from mu.measures.clip import clip_network, clip_score, zero_shot
from mu.measures.metrics import (
    check_fid_inputs,
    fid,
    frechet,
    image_files,
    judge_change,
    judge_distance,
    judge_features,
    lpips_network,
    small_sample_note,
)

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- CLIP


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


def test_a_clip_score_is_a_hundred_times_the_cosine(clip_folder):
    """By hand, one image at a time: resized by PIL, cropped, normalised with CLIP's constants."""
    clip, images = clip_network(str(clip_folder)), noise(5, 3, 48, 64)
    prompts = ["a cat", "a tiger", "a photo of a cat", "a cup", "a banana on a blue background"]
    model, expected = CLIPModel.from_pretrained(clip_folder).eval(), []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
        pixels = pixels.resize((42, 32), Image.BICUBIC).crop((5, 0, 37, 32))
        pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255
        tokens = clip.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            a = model.get_image_features(((pixels - CLIP_MEAN) / CLIP_STD)[None])
            b = model.get_text_features(**tokens)
        a, b = (getattr(x, "pooler_output", x)[0] for x in (a, b))
        expected.append(100 * float(a @ b / a.norm() / b.norm()))
    scores = clip_score(clip, images, prompts, batch_size=2)
    np.testing.assert_allclose(scores, expected, atol=0.02)
    assert np.std(expected) > 1
    assert "(" in clip.facts["clip"]
    assert clip.facts["clip_scale"] == "100 · cosine"


def test_zero_shot_chooses_the_nearest_label(clip_folder):
    clip, images = clip_network(str(clip_folder)), noise(6, 3, 32, 32)
    labels = ["cat", "tiger", "cup"]

    def nearest(template):
        scores = [clip_score(clip, images, [template.format(label)] * 6) for label in labels]
        return [labels[i] for i in torch.stack(scores, 1).argmax(1)]

    assert zero_shot(clip, images, labels, batch_size=4) == nearest("a photo of a {}")
    assert zero_shot(clip, images, labels, "a drawing of a {}") == nearest("a drawing of a {}")
    with pytest.raises(ValueError, match="two labels or more"):
        zero_shot(clip, images, ["cat", "cat"])


def test_clip_refuses_invalid_inputs(clip_folder):
    clip = clip_network(str(clip_folder))
    broken = noise(2, 3, 32, 32)
    broken[0, 0, 0, 0] = float("nan")
    for images, prompts, message in (
        (noise(2, 3, 32, 32), ["a cat"], "2 images and 1 prompts"),
        (broken, ["a", "b"], "NaN or infinite"),
        (noise(2, 3, 32, 32) * 255, ["a", "b"], r"within \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_score(clip, images, prompts)
    message = "(?s)'somebody/clip' is neither a folder.*hf download somebody/clip"
    with pytest.raises(FileNotFoundError, match=message):
        clip_network("somebody/clip")


# --- distances on the judge's features


def test_the_frechet_distance_is_its_formula():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((200, 6)) + 0.5
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    trace = np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + trace
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 2) == pytest.approx(24, rel=1e-6)


def test_the_frechet_distance_of_known_distributions():
    """Normal distributions with standard deviations 1 and 3 in four dimensions: Σ (1 − 3)² = 16."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((100_000, 4)), 3 * rng.standard_normal((100_000, 4))
    assert frechet(a, b) == pytest.approx(16, rel=0.02)


def test_the_judges_features_are_what_its_classifier_reads(judge):
    images = noise(5, 3, 64, 64)
    features = judge_features(judge, images, batch_size=2)
    with torch.no_grad():
        found, expected = judge.classifier[-1](features), judge(images * 2 - 1).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    resized = judge_features(judge, larger)
    torch.testing.assert_close(resized, features, rtol=1e-4, atol=1e-4)


def test_few_images_are_noted_and_fewer_refused():
    a, b = noise(70, 8), noise(80, 8, seed=1)
    value, facts = judge_distance(a, b)
    assert value["jfd"] == frechet(a, b)
    assert facts["jfd_marked"] == ""
    assert facts["jfd_images"] == "70 and 80, 8 features"
    _, facts = judge_distance(noise(70, 100), noise(70, 100, seed=1))
    assert "biased" in facts["jfd_marked"]
    message = "JFD of 63 images is not meaningful: use at least 64 .*better 9"
    with pytest.raises(ValueError, match=message):
        judge_distance(a[:63], b)
    assert "2049" in small_sample_note("FID", (2048, 5000), 2048, 64)
    assert small_sample_note("FID", (2049, 5000), 2048, 64) == ""


def test_few_images_bias_a_frechet_distance_upwards():
    """Two halves of one distribution, at distance 0, seem farther apart with fewer samples."""
    rng = np.random.default_rng(0)

    def distance(n):
        return np.mean([frechet(*rng.standard_normal((2, n, 32))) for _ in range(5)])

    many, few = distance(2000), distance(64)
    assert few > 5 * many > 0


def test_the_change_of_an_image_is_one_minus_a_cosine():
    a, b = noise(4, 8), noise(4, 8, seed=1)
    expected = [1 - float(x @ y / x.norm() / y.norm()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(judge_change(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(judge_change(a, 3 * a), np.zeros(4), atol=1e-6)
    with pytest.raises(ValueError, match="must be pairs, got 4 and 3"):
        judge_change(a, b[:3])


# --- folders, and missing packages


def test_folders_without_images_and_broken_images_are_named(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="has no images"):
            image_files(folder)
    tiny.make_images(tmp_path, ["a", "b"])
    assert [file.name for file in image_files(tmp_path)] == ["0.png", "1.png"]
    (tmp_path / "2.jpg").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="2.jpg is not a readable image"):
        image_files(tmp_path)


def test_too_few_images_are_refused_before_a_missing_package(tmp_path, monkeypatch):
    for name, count in (("a", 3), ("b", 70)):
        tiny.make_images(tmp_path / name, [str(i) for i in range(count)], size=4)
    with pytest.raises(ValueError, match="FID of 3 images is not meaningful: use at least 64"):
        fid(tmp_path / "a", tmp_path / "b", 16)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        fid(tmp_path / "b", tmp_path / "b", 16)
    with pytest.raises(ImportError, match="pip install lpips"):
        lpips_network()


def test_inputs_of_fid_are_checked_before_anything_is_drawn(tmp_path, monkeypatch):
    """Numbers of images stand for folders that do not exist yet."""
    real = tmp_path / "real"
    tiny.make_images(real, [str(i) for i in range(5)], size=4)
    with pytest.raises(ValueError, match="FID of 3 images"):
        check_fid_inputs(3, 100, 64)
    with pytest.raises(ValueError, match="FID of 5 images is not meaningful: use at least 64"):
        check_fid_inputs(100, real, 64)
    with pytest.raises(FileNotFoundError, match="nowhere has no images"):
        check_fid_inputs(100, tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        check_fid_inputs(100, 100)
    monkeypatch.setitem(sys.modules, "torch_fidelity", tiny)
    counts, note, module = check_fid_inputs(100, real, 2)
    assert counts == [100, 5]
    assert "biased" in note
    assert module is tiny


# --- torch-fidelity and LPIPS

FID_SCRIPT = """
import json, numpy as np
from pathlib import Path
from PIL import Image
from unittest.mock import patch
import torchvision.transforms.functional as T
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from mu.measures.metrics import fid

base = Path(sys.argv[1])
# keep the random initial weights
with patch("torch.load", lambda *_, **__: {}), patch("torch.nn.Module.load_state_dict"):
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
weights = base / "inception.pth"
torch.save(network.state_dict(), weights)
options = dict(weights=str(weights), batch_size=3, least=2)
value, facts = fid(base / "drawn", base / "real", 32, **options)

@torch.no_grad()
def features(folder):
    out = []
    for file in sorted((base / folder).glob("[0-9]*.png")):
        image = T.center_crop(T.resize(Image.open(file).convert("RGB"), 32), 32)
        out.append(network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0][0])
    return torch.stack(out).double().numpy()

a, b = features("drawn"), features("real")
A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
root = np.linalg.svd(A @ B.T, compute_uv=False).sum()
expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum() - 2 * root
print(json.dumps({"fid": value["fid"], "expected": float(expected), "facts": facts}))
"""


def test_fid_is_its_formula_on_inceptions_features(tmp_path):
    """torch-fidelity with a random Inception against the formula on features of single images.

    The trace of the root of AᵀA BᵀB is the sum of the singular values of A Bᵀ, which is small
    here. The reference has images of several sizes.
    """
    rng = np.random.default_rng(0)
    for name, count in (("drawn", 6), ("real", 8)):
        (tmp_path / name).mkdir()
        for i in range(count):
            shape = (32, 32, 3) if name == "drawn" else (32 + 8 * (i % 2), 40, 3)
            image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            image.save(tmp_path / name / f"{i}.png")
        image.rotate(90).save(tmp_path / name / "._0.png")  # as macOS leaves; not an image of it
    found = tiny.run_with_measures(FID_SCRIPT, tmp_path)
    assert found["fid"] == pytest.approx(found["expected"], rel=1e-3)
    assert found["expected"] > 0
    facts = found["facts"]
    assert facts["fid_images"] == 6
    assert facts["fid_reference"].startswith("8 images (")
    assert "biased" in facts["fid_marked"]
    assert facts["fid_backend"].startswith("torch-fidelity 0.4")


LPIPS_SCRIPT = """
import json
from mu.measures.metrics import lpips_network, lpips_distance

network = lpips_network("alex", pnet_rand=True)
a, b = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
mean = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
std = torch.tensor([0.458, 0.448, 0.450])[:, None, None]

def layers(x):
    return [y / y.norm(dim=1, keepdim=True) for y in network.net((2 * x - 1 - mean) / std)]

expected = 0
for x, y, lin in zip(layers(a), layers(b), network.lins, strict=True):
    expected = expected + (lin.model[-1].weight * (x - y) ** 2).sum(1).mean((1, 2))
same = lpips_distance(network, a, a).tolist()
found = lpips_distance(network, a, b, batch_size=2).tolist()
print(json.dumps({"same": same, "found": found, "expected": expected.tolist()}))
"""


def test_lpips_is_zero_for_equal_images_and_its_formula_for_others():
    """LPIPS' linear weights on a random trunk, against the equation of the paper."""
    found = tiny.run_with_measures(LPIPS_SCRIPT)
    assert found["same"] == [0, 0, 0]
    assert min(found["found"]) > 0
    np.testing.assert_allclose(found["found"], found["expected"], rtol=1e-4)
