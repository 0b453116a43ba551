"""The networks of the pocket models: pipelines in the formats of SD and SDXL, and their judge."""

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

from mu.notebooks.sizes import LENGTH, WIDTH, build_scheduler


def build_vae():
    """Return an autoencoder from (3, 64, 64) to (4, 16, 16)."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.18215,
    )


def build_text_encoder(tokenizer, width=WIDTH, kind=CLIPTextModel):
    """Return a CLIP text encoder of two layers for the tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return kind(config)


def build_unet(**config):
    """Return a UNet on latents (4, 16, 16); config: changes to its configuration."""
    default = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    unet = UNet2DConditionModel(**default | config)
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_sd(vae, tokenizer):
    """Return a pipeline in SD's format with a new text encoder and UNet."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def copy_weights(unet, old):
    """Copy the weights `old` of a smaller UNet; zeros elsewhere make it ignore what is new."""
    for name, p in unet.named_parameters():
        if name not in old:
            if name.startswith("add_embedding.linear_2"):
                p.zero_()
        elif p.numel() == old[name].numel():  # a 1×1 convolution is a linear map
            p.copy_(old[name].reshape(p.shape))
        else:
            p.zero_()[:, :WIDTH] = old[name]


def build_sdxl(pipe, width_2=WIDTH // 2):
    """Return a pipeline in SDXL's format that starts from a trained pocket pipeline of SD's format.

    New, as in SDXL: a second text encoder; the context concatenates both encoders' hidden states
    before the last layer; the second's pooled embedding and the time ids enter the time embedding;
    attention has linear projections; the empty prompt is zeros. Kept: autoencoder, tokenizer,
    first text encoder, and the whole UNet (`copy_weights`).
    """
    encoder = build_text_encoder(pipe.tokenizer)
    encoder.load_state_dict(pipe.text_encoder.state_dict())
    unet = build_unet(
        cross_attention_dim=WIDTH + width_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + width_2,
    )
    copy_weights(unet, pipe.unet.state_dict())
    return StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=encoder,
        text_encoder_2=build_text_encoder(pipe.tokenizer, width_2, CLIPTextModelWithProjection),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
        add_watermarker=False,
    )


def build_judge(concepts, styles):
    """Return a ResNet whose logits are the concepts, then the styles, named in `id2label`."""
    labels = [f"concept:{c}" for c in concepts] + [f"style:{s}" for s in styles]
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 192],
        depths=[1, 1, 2, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)
