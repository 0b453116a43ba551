"""The seam: what it draws and encodes is what the pipelines of diffusers draw and encode."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub.errors import GatedRepoError

from mu.hub import MODELS
from mu.models import encode_prompts, load_pipeline, predict_noise, select
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


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_are_those_of_the_pipeline(folder, guidance):
    plain = plain_pipeline(folder)
    expected = torch.cat(
        [
            plain(
                prompt=prompt,
                generator=torch.Generator().manual_seed(seed),
                guidance_scale=guidance,
                num_inference_steps=4,
                output_type="pt",
            ).images
            for prompt, seed in zip(PROMPTS, SEEDS, strict=False)
        ]
    ).float()
    pipe = load_pipeline(str(folder), dtype=torch.float64)
    conditioning, unconditional = encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])
    for batch_size in (1, 2, 64):
        found = draw_images(
            pipe, conditioning, unconditional, SEEDS, guidance, steps=4, batch_size=batch_size
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (
        found.shape == (3, 3, 16, 16)
        and found.dtype == torch.float32
        and found.min() >= 0
        and found.max() <= 1
    )
    # another prompt, seed, guidance or number of steps would have been seen
    for other in (
        dict(conditioning=select(conditioning, [1, 2, 0])),
        dict(seeds=[3, 1, 9]),
        dict(guidance=2.0),
        dict(steps=5),
    ):
        asked = (
            dict(
                conditioning=conditioning,
                unconditional=unconditional,
                seeds=SEEDS,
                guidance=guidance,
                steps=4,
            )
            | other
        )
        assert (draw_images(pipe, **asked) - expected).abs().max() > 1e-4, other


def test_an_image_does_not_depend_on_its_batch(folder):
    pipe = load_pipeline(str(folder))
    conditioning, unconditional = encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])
    together = draw_images(pipe, conditioning, unconditional, SEEDS, steps=4)
    for i in range(3):
        alone = draw_images(
            pipe, select(conditioning, [i]), unconditional, SEEDS[i : i + 1], steps=4
        )
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


def test_conditioning_of_sd(pipe):
    found = encode_prompts(pipe, PROMPTS)
    assert found.keys() == {"encoder_hidden_states"} and found["encoder_hidden_states"].shape == (
        3,
        20,
        16,
    )
    tokens = pipe.tokenizer(
        PROMPTS, padding="max_length", max_length=20, return_tensors="pt"
    ).input_ids
    torch.testing.assert_close(
        found["encoder_hidden_states"],
        pipe.text_encoder(tokens).last_hidden_state,
        rtol=0,
        atol=1e-5,
    )
    assert not found["encoder_hidden_states"].requires_grad


def test_conditioning_of_sdxl(sdxl_folder):
    pipe = load_pipeline(str(sdxl_folder))
    found = encode_prompts(pipe, PROMPTS)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "encoder_hidden_states": (3, 20, 32),
        "text_embeds": (3, 16),
        "time_ids": (3, 6),
    }
    assert found["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    tokens = pipe.tokenizer(
        PROMPTS, padding="max_length", max_length=20, return_tensors="pt"
    ).input_ids
    one, two = (
        encoder(tokens, output_hidden_states=True)
        for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    )
    torch.testing.assert_close(
        found["encoder_hidden_states"],
        torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(found["text_embeds"], two.text_embeds, rtol=0, atol=1e-5)


def test_the_empty_prompt_of_sdxl_is_zeros_as_in_its_pipeline(sdxl_folder):
    pipe = load_pipeline(str(sdxl_folder))
    found, apart = (
        encode_prompts(pipe, ["a cat", "", "a tiger"]),
        encode_prompts(pipe, ["a cat", "a tiger"]),
    )
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not found[name][1].any() and torch.equal(found[name][[0, 2]], apart[name])
    pipe.register_to_config(
        force_zeros_for_empty_prompt=False
    )  # as the refiner and some derived models have it
    assert encode_prompts(pipe, [""])["text_embeds"].any()


def test_noise_of_sdxl_is_what_the_pipeline_asks_of_its_unet(sdxl_folder):
    """The added conditions as the pipeline itself passes them."""
    plain, asked = plain_pipeline(sdxl_folder), []
    plain.unet.register_forward_hook(
        lambda module, args, kwargs, output: asked.append((args, kwargs, output[0])),
        with_kwargs=True,
    )
    plain(
        prompt=PROMPTS[0],
        guidance_scale=1.0,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    (latents, t), kwargs, expected = asked[0]
    pipe = load_pipeline(str(sdxl_folder), dtype=torch.float64)
    found = predict_noise(pipe.unet, latents, t.expand(1), encode_prompts(pipe, PROMPTS[:1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert kwargs["added_cond_kwargs"].keys() == {"text_embeds", "time_ids"}


def test_a_prompt_that_would_be_cut_is_refused(folder):
    pipe = load_pipeline(str(folder))
    longest = " ".join(["cat"] * 18)
    encode_prompts(pipe, [longest])
    with pytest.raises(ValueError, match="21 tokens, at most 20 are read: 'cat cat"):
        encode_prompts(pipe, ["a cat", longest + " cat"])


def test_a_loaded_pipeline_is_frozen_and_draws_by_ddim(folder):
    pipe = load_pipeline(str(folder))
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3 and not any(
        p.requires_grad or m.training for m in modules for p in m.parameters()
    )
    assert isinstance(pipe.scheduler, DDIMScheduler) and not pipe.scheduler.config.clip_sample
    assert pipe.scheduler.config.beta_end == 0.012 and pipe.scheduler.config.steps_offset == 1
    assert all(isinstance(p, AttnProcessor) for p in pipe.unet.attn_processors.values())
    assert load_pipeline(str(folder), dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_passes_in_bf16_are_close_and_see_every_change_of_the_weights(folder):
    """Autocast keeps converted weights; it must neither keep them from one pass to the next nor those of the network it was copied from."""
    full, half = (load_pipeline(str(folder), precision=p).unet for p in ("no", "bf16"))
    conditioning = encode_prompts(load_pipeline(str(folder)), PROMPTS[:2])
    x, t = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([10, 500]),
    )

    def look(unet):
        return predict_noise(unet.requires_grad_(True), x, t, conditioning).detach()

    copied = copy.deepcopy(half)
    assert half.conv_in.weight.dtype == look(half).dtype == torch.float32
    before = look(full)
    assert not torch.equal(look(half), before)
    torch.testing.assert_close(look(half), before, rtol=0.1, atol=0.03)
    with torch.no_grad():
        for unet in (full, half):
            unet.conv_out.weight *= -3
    torch.testing.assert_close(look(half), look(full), rtol=0.1, atol=0.1)
    assert (look(half) - before).abs().max() > 0.1 and torch.allclose(
        look(copied), before, rtol=0.1, atol=0.03
    )


@pytest.mark.parametrize("name", ["pockett", "no/such", "no/such/folder", "/no/such/folder"])
def test_an_unknown_model_is_refused_with_the_known_names(name):
    with pytest.raises(FileNotFoundError, match=f"{name}.*pocket, sd-v1-4, sdxl"):
        load_pipeline(name)
    assert set(MODELS) == {"pocket", "sd-v1-4", "sdxl", "pocket-sdxl"}


def test_another_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"})
    )
    with pytest.raises(
        ValueError,
        match="FluxPipeline: choose a StableDiffusionPipeline or a StableDiffusionXLPipeline",
    ):
        load_pipeline(str(tmp_path))


def test_pickled_weights_are_not_read(sd_folder, tmp_path):
    """Only safetensors: a folder that has but pickles is refused."""
    shutil.copytree(sd_folder, tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(
        StableDiffusionPipeline.from_pretrained(sd_folder).unet.state_dict(),
        file.with_suffix(".bin"),
    )
    file.unlink()
    with pytest.raises(OSError):
        load_pipeline(str(tmp_path / "model"))


def test_a_gated_model_and_a_hub_without_network_say_what_to_do(monkeypatch):
    def gated(path):
        raise OSError("it cannot be loaded") from GatedRepoError.__new__(
            GatedRepoError
        )  # as diffusers chains it

    monkeypatch.setattr(StableDiffusionPipeline, "load_config", gated)
    with pytest.raises(
        PermissionError,
        match="'owner/gated' is gated: accept its licence on its page, then run `hf auth login`",
    ):
        load_pipeline("owner/gated")
    monkeypatch.undo()
    with pytest.raises(
        FileNotFoundError,
        match=r"(?s)'owner/away'.*Without a network, name its folder or put it into the cache, .*\(HF_HUB_CACHE\)",
    ):
        load_pipeline("owner/away")
