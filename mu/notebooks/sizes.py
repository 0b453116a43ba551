"""SD-v1-4 and SDXL base 1.0 as networks without their weights, for preflight and benchmarks."""

import json

import torch
from accelerate import PartialState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mu.models import prepare

VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
CLIP_L = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    projection_dim=768,
)
CLIP_BIG_G = CLIP_L | dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)

LENGTH, WIDTH = 20, 128  # of pocket models: tokens per prompt, width of an embedding

# the published config.json of each part, where it differs from the library's defaults
SIZES = {
    "sd-v1-4": {
        "unet": dict(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ),
        "vae": VAE | dict(sample_size=512, scaling_factor=0.18215),
        "text_encoder": CLIP_L,
    },
    "sdxl": {
        "unet": dict(
            sample_size=128,
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": VAE | dict(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_BIG_G,
    },
}


def full_size_parts(name, dtype, tokenizer):
    """Return the components of a full-size pipeline, on the default device."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {token: getattr(tokenizer, token) for token in special}
    configs = SIZES[name]

    def text_encoder(part, kind):
        return kind(CLIPTextConfig(**configs[part], **ids)).to(dtype)

    parts = dict(
        unet=torch.nn.Module.to(UNet2DConditionModel(**configs["unet"]), dtype),
        vae=AutoencoderKL(**configs["vae"]),
        text_encoder=text_encoder("text_encoder", CLIPTextModel),
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
    )
    if "text_encoder_2" in configs:
        parts["text_encoder_2"] = text_encoder("text_encoder_2", CLIPTextModelWithProjection)
        parts["tokenizer_2"] = tokenizer
    return parts


def random_pipeline(
    name, dtype=torch.float32, device=None, seed=0, precision="no", gradient_checkpointing=False
):
    """Return a full-size pipeline ("sd-v1-4" or "sdxl") with the library's random initialisation.

    Its images are noise; its memory and time are the real ones. It is as `load_pipeline` returns
    it: DDIM, frozen, VAE in float32. device "meta": sizes only, nothing is allocated. The tokenizer
    is not CLIP's, whose vocabulary would have to be downloaded: it splits most words into letters,
    and reads 77 tokens. Raises ValueError for another name.
    """
    if name not in SIZES:
        raise ValueError(
            f"no sizes of {name!r}: choose {', '.join(SIZES)}, or load other models by "
            "load_pipeline"
        )
    device = torch.device(device or PartialState().device)
    tokenizer = build_tokenizer(["a drawing of a thing"])
    tokenizer.model_max_length = 77
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        parts = full_size_parts(name, dtype, tokenizer)
    if "text_encoder_2" in parts:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        no_checker = dict(safety_checker=None, requires_safety_checker=False)
        pipe = StableDiffusionPipeline(**parts, **no_checker, feature_extractor=None)
    return prepare(pipe, device, precision, gradient_checkpointing)


def build_tokenizer(captions):
    """Return a CLIPTokenizer whose merges make every word of `captions` one token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(unk_token=special[1], end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")  # as CLIP splits them
    bpe.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    # Every letter, inside a word and at its end: no prompt is out of vocabulary. They are special
    # tokens because the trainer would give other letters ids in random order.
    letters = [chr(c) + end for end in ("", "</w>") for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        special_tokens=special + letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    trained = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(m) for m in trained["merges"]],
        unk_token=special[1],
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        model_max_length=LENGTH,
    )


def build_scheduler():
    """Return DDIM with the betas of Stable Diffusion."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
