"""Change UNets as a training would, and compare what they predict."""

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from mu.models import encode_prompts, load_pipeline, predict
from mu.publish.weights import load_weights
from mu.trainable import LINEAR

CARD = "---\nlicense: mit\n---\n"


def load(folder):
    return load_pipeline(str(folder), device="cpu", precision="no")


def plain(folder):
    """Load a pipeline without `mu`."""
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)


@torch.no_grad()
def predictions(pipe, unet=None):
    """Predict the noise of three latents and prompts, with the pipeline's own text encoders."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    conditioning = encode_prompts(pipe, ["a cat", "a tiger", ""])
    return predict(unet or pipe.unet, latents, torch.tensor([10, 400, 900]), conditioning)


def assert_near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def assert_far(a, b):
    assert (a - b).abs().max() > 1e-3


def assert_equal(unet, other):
    assert torch.equal(tiny.weights(unet), tiny.weights(other))


@torch.no_grad()
def move(unet, inside=lambda name: True, size=0.02, seed=3):
    """Change the weights whose name is `inside` at random; returns the UNet."""
    g = torch.Generator().manual_seed(seed)
    for name, p in unet.named_parameters():
        if inside(name):
            p += size * torch.randn(p.shape, generator=g)
    return unet


def with_adapter(unet, **config):
    """Add a LoRA adapter with random weights; returns the UNet."""
    targets = [*LINEAR, "conv1", "time_emb_proj"]
    unet.add_adapter(LoraConfig(**dict(r=4, lora_alpha=2, target_modules=targets) | config))
    return move(unet, lambda name: "lora_" in name, 0.2)


def structure(unet):
    """Return what loading must not change: modules; shapes, precisions, what is trained."""
    modules = [(name, type(module)) for name, module in unet.named_modules()]
    parameters = [(n, p.shape, p.dtype, p.requires_grad) for n, p in unet.named_parameters()]
    return modules, parameters


def assert_refused(unet, path, match, error=ValueError):
    """Loading raises and leaves the UNet unchanged."""
    before, shape = tiny.weights(unet), structure(unet)
    with pytest.raises(error, match=match):
        load_weights(unet, path)
    assert torch.equal(tiny.weights(unet), before)
    assert structure(unet) == shape
