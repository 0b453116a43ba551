"""The one seam between models: load a pipeline, encode prompts, predict noise, draw images, choose what is trained.

SD and SDXL differ here and nowhere else. A pipeline of diffusers is the bag of components (unet, vae, text encoders,
tokenizers, scheduler); a conditioning is a flat dict of tensors, one row a prompt, and goes to safetensors as it is."""

import contextlib
import copy
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig

from mu import ROOT

FAMILIES = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
MODELS = {
    "pocket": str(ROOT / "data" / "pocket-sd"),
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "pocket-sdxl": str(ROOT / "data" / "pocket-sdxl"),
}


@contextlib.contextmanager
def located(model):
    """The folder or hub id of a model, for the block that loads it.

    Raises FileNotFoundError with the known names for an unknown model and for one that is not here and cannot be fetched (with the
    cache's place), PermissionError for a gated one."""
    path = MODELS.get(model, model)
    folder = Path(path)
    unknown = f"unknown model {model!r}: neither one of {', '.join(MODELS)}, nor a folder with a pipeline of diffusers, nor a hub id (owner/name)"
    if not folder.is_dir() and (folder.is_absolute() or path.count("/") != 1):
        raise FileNotFoundError(unknown)
    try:
        yield path
    except OSError as error:
        if any(isinstance(e, GatedRepoError) for e in (error, error.__cause__, error.__context__)):
            raise PermissionError(
                f"{model!r} is gated: accept its licence on its page, then `hf auth login` (or set HF_TOKEN) and run again"
            ) from error
        raise FileNotFoundError(
            f"{unknown} that can be reached from here. Without a network a hub model must be in the cache, {constants.HF_HUB_CACHE} "
            f"(HF_HUB_CACHE), or be named by its folder ({error})"
        ) from error


def load_pipeline(
    model="pocket",
    dtype=torch.float32,
    device=None,
    precision="no",
    gradient_checkpointing=False,
    family="",
):
    """A pipeline of one of the two families, from a short name (`MODELS`), a diffusers folder or a hub id; safetensors only.

    The scheduler becomes DDIM with the model's own betas; nothing requires a gradient. device: by default the one that accelerate gives
    this process. dtype: of UNet and text encoders, also by the words "full" and "half"; the VAE stays in float32 (SDXL's overflows in half precision).
    precision: accelerate's "no", "fp16" (GPU only) or "bf16": the UNet's passes run under autocast, its weights stay in `dtype`.
    gradient_checkpointing: the UNet keeps less for its backward pass and computes it again. Small models on the CPU compute attention
    by plain products: faster at their sizes, and differentiable twice (as `order="second"` needs). family: "sd" or "sdxl" where the caller's
    other parameters are meant for one of them.
    Raises as `located` does, and ValueError for another family, or for fp16 without a GPU."""
    device = torch.device(device or PartialState().device)
    if isinstance(dtype, str):
        if dtype not in ("full", "half"):
            raise ValueError(
                f"unknown precision of weights {dtype!r}: allowed are full (float32), half (bfloat16, or float16 on a GPU without it)"
            )
        dtype = half(device) if dtype == "half" else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU, this is a CPU: allowed here are no, bf16")
    with located(model) as path:
        config = StableDiffusionPipeline.load_config(path)
        kind = FAMILIES.get(config["_class_name"])
        if kind is None:
            raise ValueError(
                f"{model!r} is a {config['_class_name']}; allowed: {', '.join(FAMILIES)}"
            )
        found = "sdxl" if kind is StableDiffusionXLPipeline else "sd"
        if family not in ("", found):
            raise ValueError(
                f"these parameters are for a model of the family {family!r}, and {model!r} is of {found!r}: name another model, or another profile"
            )
        extra = (
            {} if found == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
        )
        pipe = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **extra)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return prepare(pipe, device, precision, gradient_checkpointing)


def prepare(pipe, device=None, precision="no", gradient_checkpointing=False):
    """What `load_pipeline` does with a pipeline, wherever it comes from: freeze, place, wrap in autocast. Returns it."""
    pipe.set_progress_bar_config(disable=True)
    torch.nn.Module.to(
        pipe.vae, torch.float32
    )  # not diffusers' own `to`, which warns of any change of precision
    pipe.to(device or PartialState().device)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    if pipe.unet.device.type == "cpu" and pipe.unet.config.sample_size <= 32:
        pipe.unet.set_attn_processor(AttnProcessor())
    if gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if precision != "no":
        accelerator = Accelerator(mixed_precision=precision, cpu=pipe.unet.device.type == "cpu")
        accelerator.prepare_model(
            pipe.unet, device_placement=False, evaluation_mode=True
        )  # wraps its forward
    return pipe


def offload(pipe):
    """Move what training does not need, VAE and text encoders, to the CPU's memory. `draw_images` fetches it again."""
    for part in (pipe.vae, *text_encoders(pipe)):
        part.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def half(device):
    """The half precision of a device: bfloat16, or float16 on a GPU without it."""
    return (
        torch.float16
        if torch.device(device).type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.bfloat16
    )


def frozen_copy(unet, dtype="same"):
    """The reference ε_0 of the objectives: a copy that stays as it is. dtype: "same", "half" (bfloat16, or float16 on a GPU without it: half the
    memory), or "none": no copy but None, for LoRA, which is switched off where the reference is asked (`reference`): it is then the weights below the adapters.

    Raises ValueError for another word."""
    if dtype not in ("same", "half", "none"):
        raise ValueError(
            f"unknown precision of the frozen UNet {dtype!r}: allowed are same, half, none (none with subset 'lora' only)"
        )
    if dtype == "none":
        return None
    to = half(unet.device) if dtype == "half" else None
    weights = {
        id(p): torch.nn.Parameter(p.detach().to(to or p.dtype, copy=True), requires_grad=False)
        for p in unet.parameters()
    }
    return copy.deepcopy(
        unet, weights
    )  # with these in place of copies: there is never a second full one


@contextlib.contextmanager
def reference(unet, unet_frozen):
    """The frozen UNet; where there is None, the UNet itself with its LoRA switched off."""
    if unet_frozen is not None:
        yield unet_frozen
        return
    if not hasattr(unet, "peft_config"):
        raise ValueError(
            "without a frozen UNet there is no reference: unet_frozen=None goes with subset='lora' only"
        )
    unet.disable_adapters()
    try:
        yield unet
    finally:
        unet.enable_adapters()


def text_encoders(pipe):
    """The one or two text encoders of a pipeline."""
    return [
        part
        for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
        if part is not None
    ]


def check_lengths(tokenizer, prompts):
    """Raises ValueError for a prompt with more tokens than the text encoder reads: it would be cut silently."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            raise ValueError(
                f"prompt of {length} tokens, at most {tokenizer.model_max_length} are read: {prompt!r}"
            )


def encode_prompts(pipe, prompts, cut=False):
    """Conditioning of a list of prompts: `encoder_hidden_states` (n, length, width); for SDXL also `text_embeds` and `time_ids`.

    Raises as `check_lengths` does, unless `cut` says that a longer prompt may be cut."""
    if not cut:
        check_lengths(pipe.tokenizer, prompts)
    args = dict(
        device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if not isinstance(pipe, StableDiffusionXLPipeline):
        return {
            "encoder_hidden_states": pipe.encode_prompt(list(prompts), **args)[0].to(
                pipe.unet.device
            )
        }
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), **args)
    if (
        pipe.config.force_zeros_for_empty_prompt
    ):  # the ∅ of such a model is zeros, as in its own pipeline, not the encoding of ""
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        embeds[empty], pooled[empty] = 0, 0
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    time_ids = torch.tensor(
        [[side, side, 0, 0, side, side]] * len(prompts), dtype=embeds.dtype, device=embeds.device
    )
    return {
        name: value.to(pipe.unet.device)
        for name, value in (
            ("encoder_hidden_states", embeds),
            ("text_embeds", pooled),
            ("time_ids", time_ids),
        )
    }


def predict_noise(unet, latents, timesteps, conditioning):
    """ε_θ(z_t, t, c): (n, channels, height, width), for latents × scaling_factor and integer timesteps (n,), in the UNet's own precision."""
    added = {name: value for name, value in conditioning.items() if name != "encoder_hidden_states"}
    dtype = getattr(
        unet, "dtype", latents.dtype
    )  # a plain function of the same arguments serves as a UNet, too
    with torch.profiler.record_function("unet pass"):
        return unet(
            latents.to(dtype),
            timesteps,
            conditioning["encoder_hidden_states"].to(dtype),
            added_cond_kwargs=added or None,
        ).sample


def select(conditioning, index):
    """The conditioning of the prompts `index`."""
    return {name: value[index] for name, value in conditioning.items()}


def stack(*conditionings):
    """Several conditionings one below the other, for one pass."""
    return {name: torch.cat([c[name] for c in conditionings]) for name in conditionings[0]}


def without_lora(unet, fuse=False):
    """The UNet as a plain network again, its LoRA, if it has one, taken away or (fuse) added to the weights. In place; returns it."""
    if hasattr(unet, "peft_config"):
        if fuse:
            unet.fuse_lora()
        unet.unload_lora()
    return unet


LORA = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
)  # the linear maps of attention and its feed-forward


def trainable(unet, subset="u", rank=16):
    """Name → parameter of what is trained (ESD's names): x = cross attention, u = all but cross attention, time embedding and output,
    f = full, lora = adapters of `rank` at all attention blocks (peft), in float32. The rest is frozen, so that no gradient of it is computed or clipped.

    Raises ValueError for another subset, or for half precision weights that would be trained themselves: small steps would be rounded away."""
    inside = {
        "x": lambda name: "attn2" in name,
        "u": lambda name: (
            not (
                "attn2" in name
                or name.startswith(("conv_out", "time_embedding", "add_embedding", "conv_norm_out"))
            )
        ),
        "f": lambda name: True,
        "lora": lambda name: "lora_" in name,
    }
    if subset not in inside:
        raise ValueError(f"unknown subset {subset!r}: allowed are {', '.join(inside)}")
    unet.requires_grad_(False)
    if subset == "lora" and not hasattr(unet, "peft_config"):
        unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA)
            )
        )
    chosen = {name: p for name, p in unet.named_parameters() if inside[subset](name)}
    for p in chosen.values():
        if subset == "lora":
            p.data = p.data.float()
        elif p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"subset {subset!r} would train weights in {p.dtype}: load the model in float32, or train subset 'lora'"
            )
        p.requires_grad_(True)
    return chosen
