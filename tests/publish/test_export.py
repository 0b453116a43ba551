"""Export: plain diffusers reads what is written and predicts the same noise."""

import copy
import os
from importlib.metadata import version

import pytest
import tiny
import torch
from peft import LoraConfig
from published import (
    CARD,
    assert_equal,
    assert_far,
    assert_near,
    assert_refused,
    load,
    move,
    plain,
    predictions,
    structure,
    with_adapter,
)
from safetensors import safe_open
from safetensors.torch import load_file

import mu.publish.export
from mu.publish.export import (
    extract_lora,
    fused,
    save_difference,
    save_lora,
    save_model,
    save_pipeline,
)
from mu.publish.weights import load_weights
from mu.reports.model_card import model_card
from mu.trainable import trainable

ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def is_cross_attention(name):
    return "attn2" in name


# --- pipelines -------------------------------------------------------------------------------


def test_plain_diffusers_loads_a_saved_pipeline(base, tmp_path):
    pipe, result = load(base), tmp_path / "result"
    move(pipe.unet)
    save_pipeline(pipe, result, CARD)
    assert_near(predictions(plain(result)), predictions(pipe))
    assert_far(predictions(pipe), predictions(load(base)))
    assert (result / "README.md").read_text() == CARD
    assert [file.name for file in tmp_path.iterdir()] == ["result"]
    assert not [file for file in result.rglob("*") if file.suffix in (".bin", ".pt")]
    other = load(base)
    expected = ("unet", len(pipe.unet.state_dict()))
    assert load_weights(other.unet, result)[:2] == expected
    assert_equal(other.unet, pipe.unet)


def test_a_saved_pipeline_has_its_adapter_fused(base, tmp_path):
    pipe = load(base)
    unet = with_adapter(pipe.unet)
    expected, shape = predictions(pipe), structure(unet)
    save_pipeline(pipe, tmp_path / "result", CARD)
    assert pipe.unet is unet
    assert structure(unet) == shape
    saved = load_file(tmp_path / "result" / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == load(base).unet.state_dict().keys()
    assert_near(predictions(plain(tmp_path / "result")), expected)


def test_saved_models_hold_no_local_path(pipe, sd_folder, tmp_path):
    # as diffusers registers it for a part that was loaded alone
    pipe.vae.register_to_config(_name_or_path=str(sd_folder / "vae"))
    save_model(pipe, tmp_path / "model")
    save_pipeline(pipe, tmp_path / "published", "a card")
    saved = load(tmp_path / "model")
    assert saved.vae.config.sample_size == pipe.vae.config.sample_size
    for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md")]:
        assert str(sd_folder) not in file.read_text(), file


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_the_code_in_the_card_runs(sd_folder, tmp_path, monkeypatch, kind):
    pipe = load(sd_folder)
    with_adapter(pipe.unet)
    expected = predictions(pipe)
    card = model_card(kind, str(sd_folder), "mit", "esd", "cat", {})
    save = save_pipeline if kind == "pipeline" else save_lora
    save(pipe, tmp_path / "this folder", card)
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "this folder" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    space = {}
    exec(code, space)
    assert_near(predictions(space["pipe"]), expected)


# --- differences -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-7), (torch.float16, 1e-4)])
def test_a_difference_restores_the_weights(base, tmp_path, dtype, tolerance):
    pipe, original = load(base), load(base)
    move(pipe.unet, is_cross_attention)
    result = tmp_path / "result"
    save_difference(pipe.unet, original.unet, result, CARD, base_model="owner/base", dtype=dtype)
    file = result / "difference.safetensors"
    facts = {
        "mu_format": "mu-difference-1",
        "base_model": "owner/base",
        "class": "UNet2DConditionModel",
        "mu": version("mu"),
    }
    with safe_open(file, "pt") as f:
        assert facts.items() <= f.metadata().items()
        assert sorted(f.keys()) == sorted(filter(is_cross_attention, pipe.unet.state_dict()))
        assert f.get_tensor(ATTN2).dtype == dtype
    for path in (result, file):
        other = load(base)
        expected = ("difference", len(load_file(file)))
        assert load_weights(other.unet, path)[:2] == expected
        assert (tiny.weights(other.unet) - tiny.weights(pipe.unet)).abs().max() < tolerance
    refused = "is a difference to owner/base, and this UNet has other weights or has the difference"
    assert_refused(other.unet, file, refused)
    half = load(base).unet.half()  # the same base in another precision
    load_weights(half, file)
    assert half.dtype == torch.float16
    assert (tiny.weights(half).float() - tiny.weights(pipe.unet)).abs().max() < 2e-3


def test_a_difference_needs_a_comparable_base(unet, tmp_path):
    def refused(unet, unet_base, match):
        with pytest.raises(ValueError, match=match):
            save_difference(unet, unet_base, tmp_path / "result", CARD, base_model="base")

    other = copy.deepcopy(unet)
    refused(unet, other, "equal to its base")
    refused(unet, other.bfloat16(), r"float32, its base in torch.bfloat16: load both in the same")
    wide = tiny.make_unet(cross_attention_dim=24)
    match = r"the UNet has another architecture: \S+ is \(32, 24\), expected \(32, 16\)"
    refused(wide, unet, match)
    assert not list(tmp_path.iterdir())


# --- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 3}}],
)
def test_plain_diffusers_loads_an_adapter_with_its_scale(base, tmp_path, config):
    """Alpha differs from the rank."""
    pipe, original, result = load(base), load(base), tmp_path / "result"
    with_adapter(pipe.unet, **config)
    save_lora(pipe, result, CARD)
    assert_far(predictions(pipe), predictions(original))
    published = plain(base)
    published.load_lora_weights(result)
    assert_near(predictions(published), predictions(pipe))
    published.unload_lora_weights()
    assert_near(predictions(published), predictions(original))
    file = result / "pytorch_lora_weights.safetensors"
    for path in (result, file):
        other = load(base)
        shape = structure(other.unet)
        layers = len(load_file(file)) // 2
        assert load_weights(other.unet, path)[:2] == ("lora", layers)
        assert structure(other.unet) == shape
        assert_near(predictions(other), predictions(pipe))


def test_a_trained_adapter_is_saved(sd_folder, tmp_path):
    pipe = load(sd_folder)
    trained = trainable(pipe.unet, "lora", rank=2)
    move(pipe.unet, lambda name: name in trained, 0.2)
    save_lora(pipe.unet, tmp_path / "result")
    assert [f.name for f in (tmp_path / "result").iterdir()] == ["pytorch_lora_weights.safetensors"]
    other = copy.deepcopy(pipe.unet)
    other.unload_lora()
    load_weights(other, tmp_path / "result")
    assert_near(predictions(pipe, other), predictions(pipe))


def test_save_lora_needs_exactly_one_adapter(unet, tmp_path):
    match = "has 0 LoRA adapters, allowed is one: for trained weights, use `extract_lora`"
    with pytest.raises(ValueError, match=match):
        save_lora(unet, tmp_path / "result", CARD)
    with_adapter(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "second")
    with pytest.raises(ValueError, match="has 2 LoRA adapters"):
        save_lora(unet, tmp_path / "result", CARD)
    assert_refused(unet, tmp_path, "the UNet has LoRA adapters: load into a plain UNet")
    assert not list(tmp_path.iterdir())


def test_extract_lora_keeps_the_reported_share(base, tmp_path):
    """The full rank keeps all of the layers' change; a small rank keeps less and reports it."""
    pipe, original, result = load(base), load(base), tmp_path / "result"
    move(pipe.unet, lambda name: name.endswith("weight") and "norm" not in name)
    tensors, kept, left_out = extract_lora(pipe.unet, original.unet, rank=512)
    assert kept == pytest.approx(1, abs=1e-5)
    assert left_out == []
    save_lora(tensors, result, CARD)
    published = plain(base)
    published.load_lora_weights(result)
    torch.testing.assert_close(predictions(published), predictions(pipe), rtol=1e-4, atol=1e-4)

    for rank in (4, 1):
        tensors, less, _ = extract_lora(pipe.unet, original.unet, rank=rank)
        assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {rank}
        save_lora(tensors, result, CARD)
        other = load(base).unet
        assert load_weights(other, result).tensors == len(tensors) // 2
        before, after, read = (tiny.weights(u) for u in (original.unet, pipe.unet, other))
        lost = (after - read).square().sum() / (after - before).square().sum()
        assert 1 - lost.item() == pytest.approx(less, abs=1e-4)
        assert less < kept
        kept = less


def test_extract_lora_names_the_tensors_it_leaves_out(unet):
    changed = move(copy.deepcopy(unet), lambda name: name in ("conv_norm_out.bias", ATTN2))
    assert extract_lora(changed, unet, rank=1)[2] == ["conv_norm_out.bias"]


def test_extract_lora_recovers_a_change_of_low_rank(unet):
    changed = fused(with_adapter(copy.deepcopy(unet), r=3))
    assert not hasattr(changed, "peft_config")
    assert [n for n, _ in changed.named_parameters()] == [n for n, _ in unet.named_parameters()]
    tensors, kept, left_out = extract_lora(changed, unet, rank=3)
    assert kept == pytest.approx(1, abs=1e-6)
    assert not left_out


# --- complete or absent ----------------------------------------------------------------------


def exporter(kind, pipe, original, result):
    """Return (function that exports, owner and name of a function that it calls to write)."""
    if kind == "pipeline":

        def save():
            save_pipeline(pipe, result, CARD)

        return save, type(pipe.vae), "save_pretrained"
    if kind == "lora":

        def save():
            tensors, _, _ = extract_lora(pipe.unet, original, 1)
            save_lora(tensors, result, CARD)

        return save, mu.publish.export.StableDiffusionLoraLoaderMixin, "save_lora_weights"

    def save():
        save_difference(pipe.unet, original, result, CARD, base_model="base")

    return save, mu.publish.export, "save_file"


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["pipeline", "lora", "difference"])
@pytest.mark.parametrize("where", ["in its files", "between the renames"])
def test_an_interrupted_export_keeps_the_earlier_result(
    pipe, tmp_path, monkeypatch, kind, error, where
):
    original = copy.deepcopy(pipe.unet)
    move(pipe.unet, is_cross_attention)
    result, calls = tmp_path / "result", []
    save, owner, name = exporter(kind, pipe, original, result)
    rename = os.replace
    if where == "between the renames":
        owner, name = os, "replace"

    def stop(*arguments, **_):
        if owner is os and not str(arguments[0]).endswith(".tmp"):
            return rename(*arguments)
        calls.append(1)
        raise error("stop")

    for earlier in ([], [result]):
        before = contents(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(error, match="stop"):
            patch.setattr(owner, name, stop)
            save()
        assert calls.pop()
        assert contents(tmp_path) == before
        assert list(tmp_path.iterdir()) == earlier
        save()
        assert (result / "README.md").read_text() == CARD
        assert list(tmp_path.iterdir()) == [result]
        move(pipe.unet, is_cross_attention)


def test_an_export_replaces_only_results_of_its_kind(unet, tmp_path):
    changed = move(copy.deepcopy(unet))

    def save(folder):
        return save_difference(changed, unet, folder, CARD, base_model="base")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "params.json").write_text("{}")
    match = "run has params.json, which would be lost: choose a new or empty folder"
    with pytest.raises(FileExistsError, match=match):
        save(tmp_path / "run")
    assert [file.name for file in tmp_path.rglob("*")] == ["run", "params.json"]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        for _ in range(2):
            save(folder)
        assert sorted(f.name for f in folder.iterdir()) == ["README.md", "difference.safetensors"]
        assert len(list(folder.parent.iterdir())) == (1 if folder.name == "deep" else 2)
