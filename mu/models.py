"""The one seam between models: load a pipeline, encode prompts, predict noise, draw images.

SD and SDXL differ here and nowhere else. A pipeline of diffusers is the bag of components (unet, vae, text encoders,
tokenizers, scheduler); a conditioning is a flat dict of tensors, one row a prompt, and goes to safetensors as it is."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor

FAMILIES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
MODELS = {
    "pocket": str(Path(__file__).parent.parent / "data" / "pocket-sd"),
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def load_pipeline(model="pocket", dtype=torch.float32, device="cpu", precision="no"):
    """A pipeline of one of the two families, from a short name (`MODELS`), a diffusers folder or a hub id; safetensors only.

    The scheduler becomes DDIM with the model's own betas; nothing requires a gradient. On the CPU attention is computed by
    plain products: faster at these sizes, and differentiable twice (`order="second"`). `precision` is accelerate's "no", "fp16" or
    "bf16": the UNet's passes run under autocast, its weights stay in `dtype`.
    Raises FileNotFoundError with the known names for an unknown model, ValueError for another family."""
    path = MODELS.get(model, model)
    folder = Path(path)
    unknown = f"unknown model {model!r}: neither one of {', '.join(MODELS)}, nor a folder with a pipeline of diffusers, nor a hub id (owner/name)"
    if not folder.is_dir() and (folder.is_absolute() or path.count("/") != 1):
        raise FileNotFoundError(unknown)
    try:
        config = StableDiffusionPipeline.load_config(path)
    except OSError as error:
        raise FileNotFoundError(f"{unknown} that can be reached from here ({error})") from error
    family = FAMILIES.get(config["_class_name"])
    if family is None:
        raise ValueError(f"{model!r} is a {config['_class_name']}; allowed: {', '.join(FAMILIES)}")
    extra = {} if family is StableDiffusionXLPipeline else {"safety_checker": None, "requires_safety_checker": False}
    pipe = family.from_pretrained(path, dtype=dtype, use_safetensors=True, **extra).to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    if str(device) == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())
    if precision != "no":
        accelerator = Accelerator(mixed_precision=precision, cpu=str(device) == "cpu")
        accelerator.prepare_model(pipe.unet, device_placement=False, evaluation_mode=True)  # wraps its forward
    return pipe


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """Conditioning of a list of prompts: `encoder_hidden_states` (n, length, width); for SDXL also `text_embeds` and `time_ids`.

    Raises ValueError for a prompt with more tokens than the text encoder reads: it would be cut silently."""
    for prompt in prompts:
        length = len(pipe.tokenizer(prompt).input_ids)
        if length > pipe.tokenizer.model_max_length:
            raise ValueError(f"prompt of {length} tokens, at most {pipe.tokenizer.model_max_length} are read: {prompt!r}")
    args = dict(device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    if not isinstance(pipe, StableDiffusionXLPipeline):
        return {"encoder_hidden_states": pipe.encode_prompt(list(prompts), **args)[0]}
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), **args)
    if pipe.config.force_zeros_for_empty_prompt:  # the ∅ of such a model is zeros, as in its own pipeline, not the encoding of ""
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        embeds[empty], pooled[empty] = 0, 0
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), dtype=embeds.dtype, device=embeds.device)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}


def predict_noise(unet, latents, timesteps, conditioning):
    """ε_θ(z_t, t, c): (n, channels, height, width), for latents × scaling_factor and integer timesteps (n,)."""
    added = {name: value for name, value in conditioning.items() if name != "encoder_hidden_states"}
    with torch.profiler.record_function("unet pass"):
        return unet(latents, timesteps, conditioning["encoder_hidden_states"], added_cond_kwargs=added or None).sample


def rows(conditioning, index):
    """The conditioning of the prompts `index`."""
    return {name: value[index] for name, value in conditioning.items()}


def stack(*conditionings):
    """Several conditionings one below the other, for one pass."""
    return {name: torch.cat([c[name] for c in conditionings]) for name in conditionings[0]}


@torch.no_grad()
def draw_images(pipe, conditioning, unconditional, seeds, guidance=5.0, steps=25, batch_size=64):
    """Images (n, 3, height, width) in 0…1, one for each row of `conditioning`, by the pipeline's own sampler.

    `guidance` is the pipeline's: ε(∅) + guidance · [ε(c) − ε(∅)]; 1 is no guidance. Each image starts from its own seed, so that
    it does not depend on the batch. `unconditional` has one row."""
    names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    images = []
    for index in torch.arange(len(seeds)).split(batch_size):
        embeds = {names[k]: v[index] for k, v in conditioning.items() if k in names}
        embeds |= {"negative_" + names[k]: v.expand(len(index), *v.shape[1:]) for k, v in unconditional.items() if k in names}
        generators = [torch.Generator().manual_seed(int(seeds[i])) for i in index]
        images.append(pipe(**embeds, generator=generators, guidance_scale=guidance, num_inference_steps=steps, output_type="pt").images)
    return torch.cat(images).float().cpu()


def trainable(unet, subset="u"):
    """Name → parameter of the subset that a method trains (ESD's names): x = cross attention, u = all but cross attention, time
    embedding and output, f = full. The rest is frozen, so that no gradient of it is computed or clipped."""
    inside = {
        "x": lambda name: "attn2" in name,
        "u": lambda name: not ("attn2" in name or name.startswith(("conv_out", "time_embedding", "conv_norm_out"))),
        "f": lambda name: True,
    }
    if subset not in inside:
        raise ValueError(f"unknown subset {subset!r}: allowed are {', '.join(inside)}")
    chosen = {name: p for name, p in unet.named_parameters() if inside[subset](name)}
    unet.requires_grad_(False)
    for p in chosen.values():
        p.requires_grad_(True)
    return chosen
