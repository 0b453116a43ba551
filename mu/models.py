"""The seam between models: load a pipeline, encode prompts, predict.

SD and SDXL differ here and nowhere else. A pipeline is diffusers' bag of components (unet, vae,
text encoders, tokenizers, scheduler). A conditioning is a flat dict of tensors, one row per prompt.
"""

import textwrap

import torch
from accelerate import Accelerator, PartialState
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor

from mu.devices import half, resolve_precision
from mu.hub import located
from mu.supported import check_pipeline

KINDS = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
CLIP_LENGTH = 77  # tokens
FAMILIES = {kind.__name__: kind for kind in KINDS.values()}


def load_pipeline(
    model="pocket", dtype="full", device=None, precision="auto", family="", **options
):
    """Load a frozen pipeline by name (`MODELS`), diffusers folder or hub id; safetensors only.

    The scheduler becomes DDIM with the model's own betas and prediction type. dtype: of UNet and
    text encoders, "full" (float32), "half", or a torch dtype; the VAE stays in float32 (SDXL's
    overflows in half). device: accelerate's by default. precision: of the UNet's passes, see
    `mu.devices.resolve_precision`. family: "sd" or "sdxl" to refuse the other. options: of
    `prepare`. Raises as `located` and `check_pipeline` do, ValueError for another family, dtype or
    precision.
    """
    device = torch.device(device or PartialState().device)
    if dtype not in ("full", "half") and not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown weights_dtype {dtype!r}: choose full or half")
    dtype = {"full": torch.float32, "half": half(device)}.get(dtype, dtype)
    precision = resolve_precision(precision, device)
    with located(model) as path:
        found = read_family(path, model)
        if family not in ("", found):
            raise ValueError(
                f"{model!r} is of family {found!r}, the parameters are for {family!r}: choose "
                "another model or another profile"
            )
        pipe = load_parts(path, KINDS[found], dtype)
    check_pipeline(pipe, model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    side = pipe.unet.config.sample_size
    pipe.unet.register_to_config(sample_size=side if isinstance(side, int) else side[0])
    limit_lengths(pipe)
    return prepare(pipe, device, precision, **options)


def read_family(path, model):
    """Return "sd" or "sdxl". Raises ValueError for a pipeline of another class."""
    name = StableDiffusionPipeline.load_config(path)["_class_name"]
    if not isinstance(name, str):
        raise ValueError(
            f"{model!r} is a community pipeline with code of its own, {name}, which is not run: "
            f"load it with diffusers and save its parts as a {' or a '.join(FAMILIES)}"
        )
    if name not in FAMILIES:
        raise ValueError(f"{model!r} is a {name}: choose a {' or a '.join(FAMILIES)}")
    return next(family for family, kind in KINDS.items() if kind is FAMILIES[name])


def load_parts(path, kind, dtype):
    """Load a pipeline without the parts that nothing here uses; float16 files if no others."""
    unused = {"feature_extractor": None, "image_encoder": None}
    if kind is StableDiffusionPipeline:
        unused |= {"safety_checker": None, "requires_safety_checker": False}
    options = {"dtype": dtype, "use_safetensors": True} | unused
    try:
        return kind.from_pretrained(path, **options)
    except OSError as error:
        try:
            return kind.from_pretrained(path, variant="fp16", **options)
        except (OSError, ValueError):
            raise error from None


def limit_lengths(pipe):
    """Let no tokenizer return more tokens than its text encoder has positions for."""
    for tokenizer, encoder in zip(tokenizers(pipe), text_encoders(pipe), strict=True):
        positions = getattr(encoder.config, "max_position_embeddings", CLIP_LENGTH)
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def prepare(pipe, device=None, precision="no", gradient_checkpointing=False):
    """Freeze a pipeline, place it, run its UNet's passes under autocast; returns it.

    gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
    Small UNets on a CPU compute attention by plain products: faster at their sizes.
    """
    pipe.set_progress_bar_config(disable=True)
    torch.nn.Module.to(pipe.vae, torch.float32)  # diffusers' own `to` warns of the change
    pipe.to(device or PartialState().device)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    on_cpu = pipe.unet.device.type == "cpu"
    if on_cpu and pipe.unet.config.sample_size <= 32:
        pipe.unet.set_attn_processor(AttnProcessor())
    if gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.precision = resolve_precision(precision, pipe.unet.device)
    if pipe.precision != "no":
        accelerator = Accelerator(mixed_precision=pipe.precision, cpu=on_cpu)
        accelerator.prepare_model(pipe.unet, device_placement=False, evaluation_mode=True)
    return pipe


def text_encoders(pipe):
    """Return the one or two text encoders of a pipeline."""
    parts = (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
    return [part for part in parts if part is not None]


def tokenizers(pipe):
    """Return the one or two tokenizers of a pipeline."""
    parts = (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))
    return [part for part in parts if part is not None]


def long_prompts(tokenizer, prompts):
    """Return prompt → number of its tokens, for those with more than the text encoder reads."""
    lengths = {prompt: len(tokenizer(prompt).input_ids) for prompt in prompts}
    return {p: length for p, length in lengths.items() if length > tokenizer.model_max_length}


def check_lengths(tokenizer, prompts):
    """Raise ValueError for a prompt that the text encoder would cut silently."""
    for prompt, length in long_prompts(tokenizer, prompts).items():
        most, text = tokenizer.model_max_length, textwrap.shorten(prompt, 200)
        raise ValueError(f"prompt of {length} tokens, at most {most} are read: shorten {text!r}")


def encode_prompts(pipe, prompts, cut=False):
    """Return the conditioning of prompts: `encoder_hidden_states` (n, length, width), and for SDXL
    `text_embeds` and `time_ids`.

    The empty prompt of SDXL is zeros, as in its own pipeline. Raises as `check_lengths` does,
    unless longer prompts may be `cut`.
    """
    if not cut:
        check_lengths(pipe.tokenizer, prompts)
    one = dict(num_images_per_prompt=1, do_classifier_free_guidance=False)
    encoded = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **one)
    conditioning = {"encoder_hidden_states": encoded[0]}
    if isinstance(pipe, StableDiffusionXLPipeline):
        embeds, pooled = encoded[0], encoded[2]
        if pipe.config.force_zeros_for_empty_prompt:
            empty = [i for i, prompt in enumerate(prompts) if not prompt]
            embeds[empty], pooled[empty] = 0, 0
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        time_ids = embeds.new_tensor([[side, side, 0, 0, side, side]] * len(prompts))
        conditioning |= {"text_embeds": pooled, "time_ids": time_ids}
    return {name: value.to(pipe.unet.device) for name, value in conditioning.items()}


def predict(unet, latents, timesteps, conditioning):
    """Return the UNet's prediction (n, channels, height, width), in its own precision.

    It is ε_θ(z_t, t, c), or v_θ of a model with v-prediction: what `target` returns.
    latents: × scaling_factor; timesteps: integers (n,). unet: may be a function of its arguments.
    """
    added = {name: value for name, value in conditioning.items() if name != "encoder_hidden_states"}
    dtype = getattr(unet, "dtype", latents.dtype)
    hidden = conditioning["encoder_hidden_states"].to(dtype)
    with torch.profiler.record_function("unet pass"):
        return unet(latents.to(dtype), timesteps, hidden, added_cond_kwargs=added or None).sample


def target(noise_scheduler, latents, noise, timesteps):
    """Return what a perfect model predicts: ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) z_0.

    v-prediction is Salimans and Ho's (arXiv 2202.00512).
    """
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise


def select(conditioning, index):
    """Return the rows `index` of a conditioning."""
    return {name: value[index] for name, value in conditioning.items()}


def stack(*conditionings):
    """Return the rows of several conditionings as one, for one pass."""
    return {name: torch.cat([c[name] for c in conditionings]) for name in conditionings[0]}
