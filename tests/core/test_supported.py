"""Models: v-prediction is right, and what the losses do not support is refused by name."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from plain import unet_inputs

from mu.concepts.sets import ConceptSet
from mu.losses import Term, draw_minibatch, image_losses, squared_errors
from mu.losses import denoising as denoising_term
from mu.models import encode_prompts, load_pipeline
from mu.sampling import Sampling, draw_images, predict_guided, prompt_gains, sample_latents


def edit(file, **changes):
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edited(source, folder, part, **changes):
    """Copy a pipeline with other values in the config of a part; returns the folder."""
    shutil.copytree(source, folder)
    name = "scheduler_config" if part == "scheduler" else "config"
    edit(folder / part / f"{name}.json", **changes)
    return folder


def replaced(source, folder, name, part, library="diffusers"):
    """Copy a pipeline with another part; returns the folder."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / name)
    part.save_pretrained(folder / name)
    edit(folder / "model_index.json", **{name: [library, type(part).__name__]})
    return folder


@pytest.fixture
def velocity(sd_folder, tmp_path):
    """The tiny pipeline as a model with v-prediction."""
    folder = edited(sd_folder, tmp_path / "v", "scheduler", prediction_type="v_prediction")
    return load_pipeline(str(folder), precision="no")


def exact(latents, noise_scheduler):
    """Return a UNet that predicts v of one picture without error."""

    def unet(z, timesteps, hidden, added_cond_kwargs=None):
        a = noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (z - a.sqrt() * latents) / (1 - a).sqrt()
        sample = a.sqrt() * noise - (1 - a).sqrt() * latents
        return type("Output", (), {"sample": sample})

    return unet


def one_picture():
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden = {"encoder_hidden_states": torch.zeros(1, tiny.LENGTH, 16)}
    first = torch.zeros(1, dtype=torch.long)
    return ConceptSet(latents, torch.zeros_like(latents), hidden, first, ["a cat"])


def test_a_perfect_v_model_has_no_loss_and_draws_its_picture(velocity):
    scheduler, shown = velocity.scheduler, one_picture()
    unet = exact(shown.mean, scheduler)
    batch = draw_minibatch(shown, scheduler, 64, torch.Generator().manual_seed(1))
    assert squared_errors(unet, [denoising_term(batch)])[0] < 1e-6
    assert image_losses(unet, {"forget": batch})["forget"].max() < 1e-6
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    rows = {name: value.expand(2, -1, -1) for name, value in shown.conditioning.items()}
    drawn = sample_latents(unet, scheduler, rows, shown.conditioning, start, Sampling(5.0, 10))
    noise = (1 - scheduler.final_alpha_cumprod).sqrt()  # that DDIM's last step leaves
    assert (drawn - shown.mean).std() < 1.2 * noise


def test_the_loss_of_a_v_model_is_that_of_its_velocity(velocity):
    """The reference is written with the equation of v and diffusers' UNet alone."""
    unet, scheduler = velocity.unet.requires_grad_(True), velocity.scheduler
    batch = draw_minibatch(tiny.make_set(4, 2, 1), scheduler, 4, torch.Generator().manual_seed(3))
    a = scheduler.alphas_cumprod[batch.inputs.timesteps].view(-1, 1, 1, 1)
    # z_0 and ε from z_t and v: the inverse of the rotation that defines v
    latents = a.sqrt() * batch.inputs.latents - (1 - a).sqrt() * batch.target
    noise = (1 - a).sqrt() * batch.inputs.latents + a.sqrt() * batch.target
    noisy = scheduler.add_noise(latents, noise, batch.inputs.timesteps)
    torch.testing.assert_close(noisy, batch.inputs.latents, rtol=1e-5, atol=1e-5)
    expected = (
        unet(*unet_inputs(batch)).sample - (a.sqrt() * noise - (1 - a).sqrt() * latents)
    ) ** 2
    (found,) = squared_errors(unet, [denoising_term(batch)])
    torch.testing.assert_close(found, expected.mean())


def test_a_v_model_samples_and_is_judged_in_its_own_prediction(velocity):
    """Pictures are those of diffusers' pipeline; the right prompt's gain is 1."""
    scheduler, shown = velocity.scheduler, one_picture()
    conditioning, empty = encode_prompts(velocity, ["a cat"]), encode_prompts(velocity, [""])
    with torch.no_grad():
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        found = sample_latents(velocity.unet, scheduler, conditioning, empty, z, Sampling(3.0, 4))
        decoded = velocity.vae.decode(found / velocity.vae.config.scaling_factor).sample
    images = draw_images(velocity, conditioning, empty, [3], 3.0, 4)
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    perfect = exact(shown.mean, scheduler)

    def unet(z, timesteps, hidden, added_cond_kwargs=None):  # right with the prompt only
        out = perfect(z, timesteps, hidden)
        out.sample = torch.cat([torch.zeros_like(z[:1]), out.sample[1:]])
        return out

    noises = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    gains = prompt_gains(unet, scheduler, conditioning, empty, shown.mean, noises)
    torch.testing.assert_close(gains, torch.ones(1), rtol=0, atol=1e-4)
    both = {name: torch.cat([empty[name], value]) for name, value in conditioning.items()}
    guided = predict_guided(unet, z, torch.tensor(500), both, 2.0)
    torch.testing.assert_close(guided, 2 * perfect(z, torch.tensor([500]), None).sample)


CONFIGS = {
    "scheduler": {
        "flow_prediction": (dict(prediction_type="flow_prediction"), "prediction_type.*flow_pred"),
        "sample": (dict(prediction_type="sample"), "prediction_type.*epsilon or v_prediction"),
        "sigmas": (dict(use_flow_sigmas=True), "use_flow_sigmas.*True, allowed is False"),
    },
    "unet": {
        "classes": (dict(class_embed_type="timestep"), "class_embed_type is timestep"),
        "lcm": (dict(time_cond_proj_dim=8), "time_cond_proj_dim is 8.*distilled from"),
        "oblong": (dict(sample_size=[8, 16]), "sample_size is .8, 16., allowed is square"),
        "no size": (dict(sample_size=None), "sample_size is None.*unet/config.json"),
    },
    "vae": {
        "shifted": (dict(shift_factor=0.1), "vae shift_factor is 0.1, allowed is None"),
        "whitened": (dict(latents_mean=[0.1] * 4), "vae latents_mean is .0.1"),
    },
}
CASES = [(part, name) for part, cases in CONFIGS.items() for name in cases]


@pytest.mark.parametrize("part, name", CASES)
def test_a_config_that_the_losses_do_not_support_is_refused(part, name, sd_folder, tmp_path):
    changes, message = CONFIGS[part][name]
    folder = edited(sd_folder, tmp_path / "model", part, **changes)
    if name in ("classes", "lcm"):
        tiny.make_unet(**changes).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=f"is not supported: .*{message}"):
        load_pipeline(str(folder))


SCHEDULERS = {
    "None": EDMEulerScheduler(),
    "None, ": FlowMatchEulerDiscreteScheduler(),
    "sigmoid": DDPMScheduler(beta_schedule="sigmoid"),
}


@pytest.mark.parametrize("schedule, scheduler", SCHEDULERS.items())
def test_a_scheduler_whose_betas_ddim_does_not_know_is_refused(
    schedule, scheduler, sdxl_folder, tmp_path
):
    """DDIM would take its own default betas, silently."""
    folder = replaced(sdxl_folder, tmp_path / "model", "scheduler", scheduler)
    name = type(scheduler).__name__
    with pytest.raises(ValueError, match=f"beta_schedule of scheduler {name} is {schedule}"):
        load_pipeline(str(folder))


def test_a_trained_schedule_is_supported(sd_folder, tmp_path):
    betas = torch.linspace(1e-3, 0.02, 100).tolist()
    scheduler = DDIMScheduler(num_train_timesteps=100, trained_betas=betas)
    folder = replaced(sd_folder, tmp_path / "model", "scheduler", scheduler)
    found = load_pipeline(str(folder)).scheduler
    torch.testing.assert_close(found.betas, torch.tensor(betas))


def small_vae():
    channels = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    return AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **channels)


def wide_vae():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=16,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


PARTS = {
    "inpainting": ("unet", lambda: tiny.make_unet(in_channels=9), "unet in_channels is 9"),
    "variances": ("unet", lambda: tiny.make_unet(out_channels=8), "unet out_channels is 8"),
    "another width": (
        "unet",
        lambda: tiny.make_unet(cross_attention_dim=24),
        "unet cross_attention_dim is 24, allowed is 16",
    ),
    "tiny vae": ("vae", small_vae, "vae is AutoencoderTiny, allowed is AutoencoderKL"),
    "wide vae": ("vae", wide_vae, "vae latent_channels is 16, allowed is 4"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_the_losses_do_not_support_is_refused(name, sd_folder, tmp_path):
    part, make, message = PARTS[name]
    folder = replaced(sd_folder, tmp_path / "model", part, make())
    with pytest.raises(ValueError, match=f"is not supported: {message}"):
        load_pipeline(str(folder))


def test_a_refiner_is_refused(sdxl_folder, tmp_path):
    shutil.copytree(sdxl_folder, tmp_path / "model")
    none = [None, None]
    edit(tmp_path / "model" / "model_index.json", text_encoder=none, tokenizer=none)
    with pytest.raises(ValueError, match="text_encoder is missing, .*a refiner has one"):
        load_pipeline(str(tmp_path / "model"))


def test_a_unet_for_other_time_ids_is_refused(sdxl_folder, tmp_path):
    """As a refiner's, which has an aesthetic score in place of a size."""
    other = tiny.make_unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 16,
    )
    folder = replaced(sdxl_folder, tmp_path / "model", "unet", other)
    with pytest.raises(ValueError, match="embeddings_input_dim is 56, allowed is 64"):
        load_pipeline(str(folder))


def test_the_unet_of_the_other_family_is_refused(sd_folder, sdxl_folder, tmp_path):
    unet = load_pipeline(str(sdxl_folder)).unet
    folder = replaced(sd_folder, tmp_path / "model", "unet", unet)
    with pytest.raises(ValueError, match="addition_embed_type is text_time, allowed is None"):
        load_pipeline(str(folder))


def test_a_community_pipeline_is_refused(sd_folder, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "model")
    edit(tmp_path / "model" / "model_index.json", _class_name=["own", "StableDiffusionPipeline"])
    with pytest.raises(ValueError, match="community pipeline with code of its own.*not run"):
        load_pipeline(str(tmp_path / "model"))


def test_an_equal_pair_of_sizes_is_one_size(sd_folder, tmp_path):
    """Some conversion scripts write [64, 64]."""
    folder = edited(sd_folder, tmp_path / "pair", "unet", sample_size=[8, 8])
    pipe, expected = load_pipeline(str(folder)), load_pipeline(str(sd_folder))
    assert pipe.unet.config.sample_size == 8
    options = ([3], 5.0, 2)
    found, wanted = (
        draw_images(p, encode_prompts(p, ["a cat"]), encode_prompts(p, [""]), *options)
        for p in (pipe, expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_tokenizer_without_a_length_has_that_of_the_text_encoder(family, request, tmp_path):
    source = request.getfixturevalue(f"{family}_folder")
    shutil.copytree(source, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        config.pop("model_max_length")
        file.write_text(json.dumps(config))
    pipe, expected = load_pipeline(str(tmp_path / "model")), load_pipeline(str(source))
    assert pipe.tokenizer.model_max_length == tiny.LENGTH
    found, wanted = (encode_prompts(p, ["a cat"]) for p in (pipe, expected))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    with pytest.raises(ValueError, match=f"at most {tiny.LENGTH} are read"):
        encode_prompts(pipe, ["cat " * 50])


def test_float16_files_are_read_where_there_are_no_others(sd_folder, tmp_path):
    plain = StableDiffusionPipeline.from_pretrained(sd_folder)
    copy.deepcopy(plain).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    found = load_pipeline(str(tmp_path / "half"), precision="no")
    assert found.unet.dtype == torch.float32
    torch.testing.assert_close(tiny.weights(found.unet), tiny.weights(plain.unet).half().float())


def test_parts_that_nothing_uses_may_be_missing(sd_folder, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    names = ["transformers", "CLIPImageProcessor"]
    edit(index, feature_extractor=names, image_encoder=["transformers", "CLIPVisionModel"])
    assert load_pipeline(str(tmp_path / "model")).feature_extractor is None


def test_an_incomplete_folder_is_no_unknown_model(sd_folder, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "model")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is incomplete: .*diffusion_pytorch_model"):
        load_pipeline(str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="has no model_index.json: name the folder of the"):
        load_pipeline(str(tmp_path / "model" / "unet"))
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="is a file, allowed is a folder.*from_single_file"):
        load_pipeline(str(file))


def test_terms_have_targets():
    """A term's target is what the minibatch of its model's prediction type asks for."""
    scheduler, shown = tiny.make_scheduler(), one_picture()
    batches = []
    for kind in ("epsilon", "v_prediction"):
        scheduler.register_to_config(prediction_type=kind)
        batches.append(draw_minibatch(shown, scheduler, 8, torch.Generator().manual_seed(1)))
    (epsilon, v), terms = batches, [denoising_term(batch) for batch in batches]
    assert all(isinstance(term, Term) for term in terms)
    torch.testing.assert_close(epsilon.inputs.latents, v.inputs.latents, rtol=0, atol=0)
    a = scheduler.alphas_cumprod[v.inputs.timesteps].view(-1, 1, 1, 1)
    expected = a.sqrt() * terms[0].target - (1 - a).sqrt() * shown.mean
    torch.testing.assert_close(terms[1].target, expected)
