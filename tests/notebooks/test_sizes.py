"""Full-size networks without weights: the published sizes, and a pipeline that runs."""

import pytest
import torch

from mu.models import encode_prompts
from mu.notebooks.sizes import SIZES, random_pipeline
from mu.sampling import draw_images

SD_COUNTS = dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480)
SDXL_COUNTS = SD_COUNTS | dict(unet=2_567_463_684, text_encoder_2=694_659_840)
NARROW_UNET = dict(
    sample_size=8,
    block_out_channels=(32, 32),
    layers_per_block=1,
    attention_head_dim=2,
    transformer_layers_per_block=1,
    mid_block_type=None,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
NARROW_VAE = dict(
    sample_size=16,
    block_out_channels=(32, 32),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
NARROW_TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=16,
)


@pytest.mark.parametrize(
    "name, counts, side, scaling_factor",
    [("sd-v1-4", SD_COUNTS, 512, 0.18215), ("sdxl", SDXL_COUNTS, 1024, 0.13025)],
)
def test_full_sizes_are_the_published_ones(name, counts, side, scaling_factor):
    pipe = random_pipeline(name, device="meta")
    parts = {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    parameters = {n: list(part.parameters()) for n, part in parts.items()}
    assert {n: sum(p.numel() for p in ps) for n, ps in parameters.items()} == counts
    for p in sum(parameters.values(), []):
        assert p.device.type == "meta"
        assert not p.requires_grad
    assert pipe.vae_scale_factor * pipe.unet.config.sample_size == side
    assert pipe.vae.config.scaling_factor == scaling_factor
    assert pipe.vae.config.force_upcast
    prompt = "a photo of a cat, by nobody in particular"
    ids = pipe.tokenizer(prompt, padding="max_length").input_ids
    assert len(ids) == 77
    assert max(ids) < pipe.text_encoder.config.vocab_size == 49408


def narrow(name, width):
    """Return the configs of a full-size model, narrowed."""
    unet = NARROW_UNET | dict(cross_attention_dim=width)
    if name == "sdxl":
        unet |= dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16)
    changes = {"unet": unet, "vae": NARROW_VAE}
    return {part: config | changes.get(part, NARROW_TEXT) for part, config in SIZES[name].items()}


@pytest.mark.parametrize("name, width", [("sd-v1-4", 16), ("sdxl", 32)])
def test_a_random_pipeline_runs(name, width, monkeypatch):
    monkeypatch.setitem(SIZES, name, narrow(name, width))
    before = torch.random.get_rng_state()
    pipe = random_pipeline(name, device="cpu", seed=3)
    again = random_pipeline(name, device="cpu", seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = zip(pipe.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    conditioning = encode_prompts(pipe, ["a cat", "a dog on a tree"])
    assert conditioning["encoder_hidden_states"].shape == (2, 77, width)
    images = draw_images(pipe, conditioning, encode_prompts(pipe, [""]), seeds=[0, 0], steps=3)
    assert images.isfinite().all()
    assert images.std() > 0.01
    assert (images[0] - images[1]).abs().max() > 1e-4  # the prompt matters
    assert random_pipeline(name, device="cpu", dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="sd-v1-4"):
        random_pipeline("sd-v9", device="cpu")
