"""Each metric against an independent computation, on small random networks; bad input is refused with words.

torch-fidelity and LPIPS stand apart from the other packages (see the Makefile), and run in a process of their own."""

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
    enough,
    fid,
    frechet,
    judge_change,
    judge_distance,
    judge_features,
    lpips_network,
    picture_files,
    ready_for_fid,
)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- CLIP


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


def test_a_clip_score_is_a_hundred_times_the_cosine(clip_folder):
    """By hand: pixels resized by PIL, cropped and normalised with CLIP's own constants, each picture and prompt alone."""
    clip, images, prompts = (
        clip_network(str(clip_folder)),
        noise(5, 3, 48, 64),
        ["a cat", "a tiger", "a photo of a cat", "a cup", "a banana on a blue background"],
    )
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    model, expected = CLIPModel.from_pretrained(clip_folder).eval(), []
    for image, prompt in zip(images, prompts, strict=False):
        small = (
            Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
            .resize((42, 32), Image.BICUBIC)
            .crop((5, 0, 37, 32))
        )
        pixels = (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            found = [
                getattr(x, "pooler_output", x)[0]
                for x in (
                    model.get_image_features(pixels[None]),
                    model.get_text_features(**clip.tokenizer(prompt, return_tensors="pt")),
                )
            ]
        expected.append(100 * float(found[0] @ found[1] / found[0].norm() / found[1].norm()))
    scores = clip_score(clip, images, prompts, batch_size=2)
    np.testing.assert_allclose(scores, expected, atol=0.02)
    assert (
        np.std(expected) > 1
        and "(" in clip.facts["clip"]
        and clip.facts["clip_scale"] == "100 · cosine"
    )


def test_zero_shot_chooses_the_nearest_of_the_words(clip_folder):
    clip, images, labels = (
        clip_network(str(clip_folder)),
        noise(6, 3, 32, 32),
        ["cat", "tiger", "cup"],
    )
    scores = torch.stack(
        [clip_score(clip, images, [f"a photo of a {label}"] * 6) for label in labels], 1
    )
    assert zero_shot(clip, images, labels, batch_size=4) == [labels[i] for i in scores.argmax(1)]
    assert zero_shot(clip, images, labels, "a drawing of a {}") == [
        labels[i]
        for i in torch.stack(
            [clip_score(clip, images, [f"a drawing of a {x}"] * 6) for x in labels], 1
        ).argmax(1)
    ]
    with pytest.raises(ValueError, match="two labels or more"):
        zero_shot(clip, images, ["cat", "cat"])


def test_clip_refuses_what_it_cannot_score(clip_folder):
    clip = clip_network(str(clip_folder))
    broken = noise(2, 3, 32, 32)
    broken[0, 0, 0, 0] = float("nan")
    for images, prompts, words in (
        (noise(2, 3, 32, 32), ["a cat"], "2 pictures and 1 prompts"),
        (broken, ["a", "b"], "NaN or infinite"),
        (noise(2, 3, 32, 32) * 255, ["a", "b"], "lie in 0…1"),
    ):
        with pytest.raises(ValueError, match=words):
            clip_score(clip, images, prompts)
    with pytest.raises(
        FileNotFoundError,
        match="(?s)'somebody/clip' is neither a folder.*hf download somebody/clip",
    ):
        clip_network("somebody/clip")


# --- distances of the judge


def test_the_frechet_distance_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)),
        rng.standard_normal((200, 6)) + 0.5,
    )
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real
    )
    assert (
        frechet(a, b) == pytest.approx(expected, rel=1e-6) == frechet(b, a)
        and frechet(a, a) == pytest.approx(0, abs=1e-6)
        and frechet(a, a + 2) == pytest.approx(24, rel=1e-6)
    )


def test_the_frechet_distance_of_known_distributions():
    """Two normal distributions with the deviations 1 and 3 in four dimensions: Σ (1 − 3)² = 16, with many samples."""
    rng = np.random.default_rng(0)
    assert frechet(
        rng.standard_normal((100_000, 4)), 3 * rng.standard_normal((100_000, 4))
    ) == pytest.approx(16, rel=0.02)


def test_the_judges_features_are_what_its_classifier_reads(judge):
    images = noise(5, 3, 64, 64)
    features = judge_features(judge, images, batch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(
            judge.classifier[-1](features), judge(images * 2 - 1).logits, rtol=1e-4, atol=1e-4
        )
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(
        judge_features(judge, larger), features, rtol=1e-4, atol=1e-4
    )  # pictures of other sizes are brought to its own


def test_few_pictures_are_marked_and_fewer_refused(judge):
    a, b = noise(70, 8), noise(80, 8, seed=1)
    (value, facts) = judge_distance(a, b)
    assert (
        value["jfd"] == frechet(a, b)
        and facts["jfd_marked"] == ""
        and facts["jfd_images"] == "70 and 80, 8 features"
    )
    assert "biased" in judge_distance(noise(70, 100), noise(70, 100, seed=1))[1]["jfd_marked"]
    with pytest.raises(ValueError, match="JFD of 63 images says nothing: at least 64 .*better 9"):
        judge_distance(a[:63], b)
    assert (
        "2049" in enough("FID", (2048, 5000), 2048, 64)
        and enough("FID", (2049, 5000), 2048, 64) == ""
    )


def test_few_images_bias_a_frechet_distance_upwards():
    """What the mark says: two halves of one distribution, which are at distance 0, look the farther apart the fewer they are."""
    rng = np.random.default_rng(0)
    near, far = (
        np.mean([frechet(*rng.standard_normal((2, n, 32))) for _ in range(5)]) for n in (2000, 64)
    )
    assert far > 5 * near > 0


def test_the_change_of_a_picture_is_one_minus_a_cosine():
    a, b = noise(4, 8), noise(4, 8, seed=1)
    expected = [1 - float(x @ y / x.norm() / y.norm()) for x, y in zip(a, b, strict=False)]
    np.testing.assert_allclose(judge_change(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(judge_change(a, 3 * a), np.zeros(4), atol=1e-6)
    with pytest.raises(ValueError, match="pairs of one prompt and seed, got 4 and 3"):
        judge_change(a, b[:3])


# --- folders, and packages that are not there


def test_folders_without_pictures_and_broken_ones_are_named(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no pictures"):
            picture_files(folder)
    tiny.make_images(tmp_path, ["a", "b"])
    assert [f.name for f in picture_files(tmp_path)] == ["0.png", "1.png"]
    (tmp_path / "2.jpg").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="2.jpg is not a readable picture"):
        picture_files(tmp_path)


def test_few_pictures_are_refused_before_a_missing_package_is_named(tmp_path, monkeypatch):
    for name, count in (("a", 3), ("b", 70)):
        tiny.make_images(tmp_path / name, [str(i) for i in range(count)], size=4)
    with pytest.raises(ValueError, match="FID of 3 images says nothing: at least 64"):
        fid(tmp_path / "a", tmp_path / "b", 16)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        fid(tmp_path / "b", tmp_path / "b", 16)
    with pytest.raises(ImportError, match="pip install lpips"):
        lpips_network()


def test_what_fid_needs_is_asked_for_before_anything_is_drawn(tmp_path, monkeypatch):
    """Numbers of pictures stand for folders that are not there yet."""
    tiny.make_images(tmp_path / "real", [str(i) for i in range(5)], size=4)
    for images, reference, least, words in (
        (3, 100, 64, "FID of 3 images"),
        (100, tmp_path / "real", 64, "FID of 5 images says nothing: at least 64"),
    ):
        with pytest.raises(ValueError, match=words):
            ready_for_fid(images, reference, least)
    with pytest.raises(FileNotFoundError, match="nowhere holds no pictures"):
        ready_for_fid(100, tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        ready_for_fid(100, 100)
    monkeypatch.setitem(sys.modules, "torch_fidelity", tiny)
    counts, marked, found = ready_for_fid(100, tmp_path / "real", 2)
    assert counts == [100, 5] and "biased" in marked and found is tiny


# --- torch-fidelity and LPIPS


def test_fid_is_the_formula_on_inceptions_features(tmp_path):
    """A random Inception, saved; torch-fidelity's answer against the formula on features of the same network, each picture alone. The trace of the root of the product of
    two covariances AᵀA and BᵀB is the sum of the singular values of A Bᵀ, which is small here. The reference has pictures of several sizes."""
    rng = np.random.default_rng(0)
    for name, count in (("drawn", 6), ("real", 8)):
        (tmp_path / name).mkdir()
        for i in range(count):
            shape = (32, 32, 3) if name == "drawn" else (32 + 8 * (i % 2), 40, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
                tmp_path / name / f"{i}.png"
            )
    found = tiny.run_with_measures(
        """
import json, numpy as np
from pathlib import Path
from PIL import Image
from unittest.mock import patch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
base = Path(sys.argv[1])
with patch("torch.load", lambda *_, **__: {}), patch("torch.nn.Module.load_state_dict"):  # its weights stay those that it begins with
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
torch.save(network.state_dict(), base / "inception.pth")
from mu.metrics import fid
value, facts = fid(base / "drawn", base / "real", 32, weights=str(base / "inception.pth"), batch_size=3, least=2)

import torchvision.transforms.functional as T
def features(folder):
    out = []
    for file in sorted((base / folder).glob("*.png")):
        image = T.center_crop(T.resize(Image.open(file).convert("RGB"), 32), 32)
        out.append(network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0][0])
    return torch.stack(out).double().numpy()
with torch.no_grad(): a, b = features("drawn"), features("real")
A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
mine = ((a.mean(0) - b.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum() - 2 * np.linalg.svd(A @ B.T, compute_uv=False).sum()
print(json.dumps({"fid": value["fid"], "mine": float(mine), "facts": facts}))
""",
        tmp_path,
    )
    assert found["fid"] == pytest.approx(found["mine"], rel=1e-3) and found["mine"] > 0
    assert (
        found["facts"]["fid_images"] == 6
        and found["facts"]["fid_reference"].startswith("8 images (")
        and "biased" in found["facts"]["fid_marked"]
    )
    assert found["facts"]["fid_backend"].startswith("torch-fidelity 0.4")


def test_lpips_is_zero_for_equal_pictures_and_its_formula_for_others():
    """Its own linear weights on a random trunk (the trained one is downloaded on first use), against the paper's equation, written out."""
    found = tiny.run_with_measures("""
import json
from mu.metrics import lpips_network, lpips_distance
network = lpips_network("alex", pnet_rand=True)
a, b = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
expected = 0
scale = lambda x: ((2 * x - 1) - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
unit = lambda x: x / x.norm(dim=1, keepdim=True)
for x, y, lin in zip(network.net(scale(a)), network.net(scale(b)), network.lins):
    expected = expected + (lin.model[-1].weight * (unit(x) - unit(y)) ** 2).sum(1).mean((1, 2))
print(json.dumps({"same": lpips_distance(network, a, a).tolist(), "found": lpips_distance(network, a, b, batch_size=2).tolist(), "expected": expected.tolist()}))
""")
    assert found["same"] == [0, 0, 0] and min(found["found"]) > 0
    np.testing.assert_allclose(found["found"], found["expected"], rtol=1e-4)
