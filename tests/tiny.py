"""Tiny random components with fixed seeds: models, pipelines, judges, image sets."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
)

from mu.concepts.sets import ConceptSet
from mu.notebooks.sizes import LENGTH, build_tokenizer

CAPTIONS = [
    "a cat",
    "a photo of a cat",
    "a tiger",
    "a drawing of a tiger, noto style",
    "a banana on a blue background",
    "a cup",
]


def make_unet(seed=0, **config):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type=None,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        | config
    )
    unet.set_attn_processor(AttnProcessor())
    return unet.eval()


def frozen(unet):
    return copy.deepcopy(unet).requires_grad_(False)


def make_scheduler():
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_set(images, prompts, seed, name="p"):
    g = torch.Generator().manual_seed(seed)
    return ConceptSet(
        torch.randn(images, 4, 8, 8, generator=g),
        torch.full((images, 4, 8, 8), 0.1),
        {"encoder_hidden_states": torch.randn(prompts, LENGTH, 16, generator=g)},
        torch.randint(prompts, (images,), generator=g),
        [f"{name}{i}" for i in range(prompts)],
    )


def make_sets():
    """Return the forget, related and unrelated sets and the empty prompt's embeddings."""
    empty = torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(9))
    return make_set(6, 2, 1), make_set(6, 3, 2), make_set(6, 3, 3), {"encoder_hidden_states": empty}


def make_vae():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
        scaling_factor=0.3,
    )


def make_text_encoder(tokenizer, kind=CLIPTextModel):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=16,
            initializer_range=1.0,
        )
    )


def make_pipeline(folder, captions=CAPTIONS):
    """Save a tiny StableDiffusionPipeline whose tokenizer has the words of the captions."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(captions)
    StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_xl_pipeline(folder):
    """Save a tiny StableDiffusionXLPipeline, with pooled embeddings and time ids."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS)
    unet = make_unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        text_encoder_2=make_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        add_watermarker=False,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    ).save_pretrained(folder)
    return folder


def make_flux_pipeline(folder):
    """Save a tiny FluxPipeline, of neither supported family."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3,
        shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_judge(concepts=("cat", "tiger", "banana"), styles=("noto", "fluent")):
    torch.manual_seed(0)
    labels = [f"concept:{c}" for c in concepts] + [f"style:{s}" for s in styles]
    return (
        ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8],
                depths=[1],
                layer_type="basic",
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
            )
        )
        .eval()
        .requires_grad_(False)
    )


def make_clip(folder):
    """Save a tiny random CLIP with its tokenizer and image processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=1.0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        initializer_range=1.0,
    )
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def make_images(folder, captions, size=16, seed=0):
    """Save an image folder (PNG and metadata.jsonl) with one random image per caption."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    for line in lines:
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
            folder / line["file_name"]
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def weights(unet):
    """Return a copy of the weights as one vector."""
    return torch.cat([p.detach().flatten() for p in unet.parameters()]).clone()


ROOT = Path(__file__).parent.parent
MEASURES = ROOT / ".venv" / "measures"
START = """
import sys
import torch

try:
    import torchvision
except RuntimeError:
    # The compiled part of torchvision is of another build of torch. Its two declared operators are
    # not called here.
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    lib = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        lib.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.set_num_threads(1)
torch.manual_seed(0)
"""


def run_with_measures(script, *arguments):
    """Return the last line of a script (JSON), run with the packages of `.venv/measures`."""
    assert (MEASURES / "torch_fidelity").is_dir(), (
        "torch-fidelity and lpips are not in .venv/measures: run `make test`, which installs them"
    )
    paths = os.pathsep.join([str(MEASURES), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-c", START + script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])
