"""Check that a pipeline is one for which the losses are right: its parts, sizes and scheduler."""

from typing import NamedTuple

from diffusers import StableDiffusionXLPipeline

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")  # schedules that DDIM computes
PREDICTIONS = ("epsilon", "v_prediction")
ANOTHER = "choose another model"


class Fact(NamedTuple):
    """A fact of a pipeline, the values that are supported, and what to do about another one."""

    name: str  # part and key, as its config file names them
    value: object
    allowed: tuple
    fix: str = ANOTHER


def check_pipeline(pipe, model):
    """Raise ValueError for the first fact of a pipeline that the losses do not support.

    model: its name, for the message. The scheduler is the model's own, before any change.
    """
    for facts in (_parts, _scheduler, _unet, _vae, _widths):
        for fact in facts(pipe):
            if fact.value not in fact.allowed:
                allowed = " or ".join(map(str, fact.allowed))
                raise ValueError(
                    f"{model!r} is not supported: {fact.name} is {fact.value}, allowed is "
                    f"{allowed}: {fact.fix}"
                )


def _parts(pipe):
    """Yield facts of the parts' classes."""

    def kind(part):
        return type(getattr(pipe, part)).__name__.removesuffix("Fast")

    yield Fact("unet", kind("unet"), ("UNet2DConditionModel",))
    yield Fact("vae", kind("vae"), ("AutoencoderKL",), "put the model's full VAE into its folder")
    suffixes = ("", "_2") if isinstance(pipe, StableDiffusionXLPipeline) else ("",)
    for part in [part + end for part in ("text_encoder", "tokenizer") for end in suffixes]:
        is_there = getattr(pipe, part) is not None
        fix = "choose the base model (a refiner has one of two text encoders)"
        yield Fact(part, "there" if is_there else "missing", ("there",), fix)


def _scheduler(pipe):
    """Yield facts of the noise schedule: DDIM and the losses need its ᾱ_t."""
    config = pipe.scheduler.config
    name = f"scheduler {type(pipe.scheduler).__name__}"
    fix = "choose a model that was trained with a discrete noise schedule"
    schedule = "trained" if config.get("trained_betas") else config.get("beta_schedule")
    yield Fact(f"beta_schedule of {name}", schedule, (*BETAS, "trained"), fix)
    yield Fact(f"use_flow_sigmas of {name}", bool(config.get("use_flow_sigmas")), (False,), fix)
    yield Fact(f"prediction_type of {name}", config.get("prediction_type"), PREDICTIONS, fix)


def _unet(pipe):
    """Yield facts of the UNet: its inputs are latents, timesteps and texts, nothing else."""
    config = pipe.unet.config
    text_to_image = "choose a text-to-image model (inpainting and upscaling models have more)"
    yield Fact("unet in_channels", config.in_channels, (4,), text_to_image)
    yield Fact("unet out_channels", config.out_channels, (4,))
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        yield Fact(f"unet {key}", config.get(key), (None,), text_to_image)
    distilled = "choose the model that it was distilled from"
    yield Fact("unet time_cond_proj_dim", config.get("time_cond_proj_dim"), (None,), distilled)
    added = "text_time" if isinstance(pipe, StableDiffusionXLPipeline) else None
    yield Fact("unet addition_embed_type", config.get("addition_embed_type"), (added,))
    side = config.sample_size
    sides = set(side if isinstance(side, (list, tuple)) else [side])
    shape = "square" if len(sides) == 1 and isinstance(sides.pop(), int) else side
    fix = "set it to one integer in unet/config.json: the side of an image in pixels over 8"
    yield Fact("unet sample_size", shape, ("square",), fix)


def _vae(pipe):
    """Yield facts of the VAE: latents are its codes × scaling_factor, and not shifted."""
    config = pipe.vae.config
    yield Fact("vae latent_channels", config.latent_channels, (4,))
    for key in ("latents_mean", "latents_std", "shift_factor"):
        yield Fact(f"vae {key}", config.get(key) or None, (None,))


def _widths(pipe):
    """Yield facts of the text encoders' widths, which the UNet has to expect."""
    encoders, config = [pipe.text_encoder], pipe.unet.config
    fix = "choose a whole model: text encoders and UNet belong together"
    if isinstance(pipe, StableDiffusionXLPipeline):
        encoders.append(pipe.text_encoder_2)
        pooled = pipe.text_encoder_2.config.projection_dim
        width = pooled + 6 * config.addition_time_embed_dim
        found = config.projection_class_embeddings_input_dim
        yield Fact("unet projection_class_embeddings_input_dim", found, (width,), fix)
    width = sum(getattr(encoder.config, "hidden_size", 0) for encoder in encoders)
    expected = config.cross_attention_dim
    widths = set(expected if isinstance(expected, (list, tuple)) else [expected])
    for found in sorted(widths):
        yield Fact("unet cross_attention_dim", found, (width,), fix)
