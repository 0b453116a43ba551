"""Images, conditionings and predictions are those of the diffusers pipelines."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub.errors import GatedRepoError

from mu.hub import MODELS
from mu.models import encode_prompts, load_pipeline, predict, select
from mu.sampling import draw_images

PROMPTS = ["a cat", "a photo of a tiger", "a banana on a blue background"]
SEEDS = [3, 1, 8]


@pytest.fixture(params=["sd", "sdxl"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def plain_pipeline(folder):
    """The folder in plain diffusers with DDIM, in float64 so that tolerances can be tight."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float64)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_plain(pipe, prompt, seed, guidance):
    generator = torch.Generator().manual_seed(seed)
    options = dict(guidance_scale=guidance, num_inference_steps=4, output_type="pt")
    return pipe(prompt=prompt, generator=generator, **options).images


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_are_those_of_the_pipeline(folder, guidance):
    plain = plain_pipeline(folder)
    pairs = zip(PROMPTS, SEEDS, strict=True)
    expected = torch.cat([draw_plain(plain, *pair, guidance) for pair in pairs]).float()
    pipe = load_pipeline(str(folder), dtype=torch.float64, precision="no")
    options = dict(
        conditioning=encode_prompts(pipe, PROMPTS),
        unconditional=encode_prompts(pipe, [""]),
        seeds=SEEDS,
        guidance=guidance,
        steps=4,
    )
    for batch_size in (1, 2, 64):
        found = draw_images(pipe, **options, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.shape == (3, 3, 16, 16)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    # each option matters: other prompts, seeds, guidance or steps give other images
    for other in (
        dict(conditioning=select(options["conditioning"], [1, 2, 0])),
        dict(seeds=[3, 1, 9]),
        dict(guidance=2.0),
        dict(steps=5),
    ):
        changed = draw_images(pipe, **options | other)
        assert (changed - expected).abs().max() > 1e-4, other


def test_an_image_does_not_depend_on_its_batch(folder):
    pipe = load_pipeline(str(folder), precision="no")
    conditioning, unconditional = encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])
    together = draw_images(pipe, conditioning, unconditional, SEEDS, steps=4)
    for i, seed in enumerate(SEEDS):
        alone = draw_images(pipe, select(conditioning, [i]), unconditional, [seed], steps=4)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


def tokenize(pipe):
    options = dict(padding="max_length", max_length=20, return_tensors="pt")
    return pipe.tokenizer(PROMPTS, **options).input_ids


def test_conditioning_of_sd(pipe):
    found = encode_prompts(pipe, PROMPTS)
    assert found.keys() == {"encoder_hidden_states"}
    embeddings = found["encoder_hidden_states"]
    assert embeddings.shape == (3, 20, 16)
    expected = pipe.text_encoder(tokenize(pipe)).last_hidden_state
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
    assert not embeddings.requires_grad


def test_conditioning_of_sdxl(sdxl_folder):
    pipe = load_pipeline(str(sdxl_folder), precision="no")
    found = encode_prompts(pipe, PROMPTS)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "encoder_hidden_states": (3, 20, 32),
        "text_embeds": (3, 16),
        "time_ids": (3, 6),
    }
    assert found["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    tokens = tokenize(pipe)
    one = pipe.text_encoder(tokens, output_hidden_states=True)
    two = pipe.text_encoder_2(tokens, output_hidden_states=True)
    expected = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    torch.testing.assert_close(found["encoder_hidden_states"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["text_embeds"], two.text_embeds, rtol=0, atol=1e-5)


def test_the_empty_prompt_of_sdxl_is_zeros_as_in_its_pipeline(sdxl_folder):
    pipe = load_pipeline(str(sdxl_folder), precision="no")
    found = encode_prompts(pipe, ["a cat", "", "a tiger"])
    apart = encode_prompts(pipe, ["a cat", "a tiger"])
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not found[name][1].any()
        assert torch.equal(found[name][[0, 2]], apart[name])
    # the refiner and some derived models have this setting
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode_prompts(pipe, [""])["text_embeds"].any()


def test_predictions_of_sdxl_are_those_in_its_pipeline(sdxl_folder):
    """The pipeline itself passes the added conditions."""
    plain, calls = plain_pipeline(sdxl_folder), []

    def record(module, args, kwargs, output):
        calls.append((args, kwargs, output[0]))

    plain.unet.register_forward_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    options = dict(guidance_scale=1.0, num_inference_steps=2, output_type="latent")
    plain(prompt=PROMPTS[0], generator=generator, **options)
    (latents, t), kwargs, expected = calls[0]
    pipe = load_pipeline(str(sdxl_folder), dtype=torch.float64, precision="no")
    found = predict(pipe.unet, latents, t.expand(1), encode_prompts(pipe, PROMPTS[:1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert kwargs["added_cond_kwargs"].keys() == {"text_embeds", "time_ids"}


def test_a_prompt_that_would_be_truncated_is_refused(folder):
    pipe = load_pipeline(str(folder), precision="no")
    longest = " ".join(["cat"] * 18)
    encode_prompts(pipe, [longest])
    with pytest.raises(ValueError, match="21 tokens, at most 20 are read: shorten 'cat cat"):
        encode_prompts(pipe, ["a cat", longest + " cat"])


def test_a_loaded_pipeline_is_frozen_and_draws_by_ddim(folder):
    pipe = load_pipeline(str(folder), precision="no")
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3
    assert not any(m.training for m in modules)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert not pipe.scheduler.config.clip_sample
    assert pipe.scheduler.config.beta_end == 0.012
    assert pipe.scheduler.config.steps_offset == 1
    assert all(isinstance(p, AttnProcessor) for p in pipe.unet.attn_processors.values())
    half = load_pipeline(str(folder), dtype=torch.bfloat16, precision="no")
    assert half.unet.dtype == torch.bfloat16


def test_passes_in_bf16_are_close_and_use_the_present_weights(folder):
    """Autocast caches converted weights: neither a later pass nor a copy may reuse them."""
    full = load_pipeline(str(folder), precision="no")
    half = load_pipeline(str(folder), precision="bf16").unet
    conditioning, full = encode_prompts(full, PROMPTS[:2]), full.unet
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 500])

    def output(unet):
        return predict(unet.requires_grad_(True), x, t, conditioning).detach()

    copied = copy.deepcopy(half)
    assert half.conv_in.weight.dtype == output(half).dtype == torch.float32
    before = output(full)
    assert not torch.equal(output(half), before)
    torch.testing.assert_close(output(half), before, rtol=0.1, atol=0.03)
    with torch.no_grad():
        for unet in (full, half):
            unet.conv_out.weight *= -3
    torch.testing.assert_close(output(half), output(full), rtol=0.1, atol=0.1)
    assert (output(half) - before).abs().max() > 0.1
    assert torch.allclose(output(copied), before, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("name", ["pockett", "no/such", "no/such/folder", "/no/such/folder"])
def test_an_unknown_model_is_refused_with_the_known_names(name):
    with pytest.raises(FileNotFoundError, match=f"{name}.*pocket, sd-v1-4, sdxl"):
        load_pipeline(name)
    assert set(MODELS) == {"pocket", "sd-v1-4", "sdxl", "pocket-sdxl"}


def test_another_family_is_refused(tmp_path):
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = "FluxPipeline: choose a StableDiffusionPipeline or a StableDiffusionXLPipeline"
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path))


def test_pickled_weights_are_not_read(sd_folder, tmp_path):
    """A folder without safetensors is refused."""
    shutil.copytree(sd_folder, tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = StableDiffusionPipeline.from_pretrained(sd_folder).unet.state_dict()
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match="only pickled weights .*convert them"):
        load_pipeline(str(tmp_path / "model"))


def test_the_error_for_a_gated_model_names_the_login(monkeypatch):
    def gated(path):  # diffusers raises from the hub's error in this way
        raise OSError("it cannot be loaded") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(StableDiffusionPipeline, "load_config", gated)
    message = "'owner/gated' is gated: accept its licence on its page, then run `hf auth login`"
    with pytest.raises(PermissionError, match=message):
        load_pipeline("owner/gated")


def test_the_error_without_a_network_names_the_cache():
    message = (
        "(?s)'owner/away'.*Without a network, name its folder or put it into the cache, "
        r".*\(HF_HUB_CACHE\)"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_pipeline("owner/away")
