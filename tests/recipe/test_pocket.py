"""The networks of the pocket models: they fit together, and SDXL's starts as SD's."""

import pytest
import tiny
import torch
from transformers import CLIPTokenizer

from data.recipe import pocket
from data.recipe.emoji import STYLES
from mu.measures.evaluate import load_judge
from mu.models import load_pipeline
from mu.notebooks.sizes import LENGTH, WIDTH, build_scheduler, build_tokenizer

WORDS = sorted({word for text in tiny.CAPTIONS for word in text.replace(",", " ,").split()})


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(tiny.CAPTIONS)


# --- tokenizer -------------------------------------------------------------------------------


def test_every_word_is_one_token(tokenizer):
    for text in tiny.CAPTIONS:
        words = text.replace(",", " ,").split()
        assert tokenizer.tokenize(text) == [word + "</w>" for word in words]
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) == len(words) + 2
    assert len({tokenizer.convert_tokens_to_ids(word + "</w>") for word in WORDS}) == len(WORDS)


def test_no_prompt_is_out_of_vocabulary(tokenizer):
    for text in ("zyx", "A CAT!", "q#7", "An elephant's 12 ears?!"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1], tokenizer.tokenize(text)
    assert tokenizer("A CAT").input_ids == tokenizer("a cat").input_ids


def test_the_tokenizer_is_the_same_each_time_it_is_built(tokenizer):
    for captions in (tiny.CAPTIONS, tiny.CAPTIONS, tiny.CAPTIONS[::-1]):
        assert build_tokenizer(captions).get_vocab() == tokenizer.get_vocab()


def test_a_saved_tokenizer_is_read_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    options = dict(padding="max_length", truncation=True, max_length=LENGTH)
    for text in [*tiny.CAPTIONS, "zyx qr", ""]:
        ids = again(text, **options).input_ids
        assert ids == tokenizer(text, **options).input_ids
        assert len(ids) == LENGTH
    assert again.model_max_length == LENGTH
    assert len(again) == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    text = "a drawing of a tiger"
    assert again.decode(again(text).input_ids, skip_special_tokens=True).strip() == text


def test_the_text_encoder_is_causal_and_pools_the_end_token(tokenizer):
    torch.manual_seed(0)
    encoder = pocket.build_text_encoder(tokenizer).eval()
    options = dict(padding="max_length", max_length=LENGTH, return_tensors="pt")
    tokens = tokenizer(["a cat", "a cat"], **options).input_ids
    tokens[1, 4:] = tokenizer("cup").input_ids[1]
    with torch.no_grad():
        encoded = encoder(tokens)
    hidden, pooled = encoded.last_hidden_state, encoded.pooler_output
    assert hidden.shape == (2, LENGTH, WIDTH)
    torch.testing.assert_close(hidden[0, :4], hidden[1, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled[0], hidden[0, 3], rtol=0, atol=1e-5)


# --- networks --------------------------------------------------------------------------------


def test_the_parts_fit_together_and_in_thirty_megabytes(tokenizer):
    vae, judge = pocket.build_vae(), pocket.build_judge([f"c{i}" for i in range(130)], STYLES)
    pipe = pocket.build_sd(vae, tokenizer)
    unet, encoder = pipe.unet, pipe.text_encoder
    assert unet.config.cross_attention_dim == encoder.config.hidden_size
    assert unet.config.in_channels == vae.config.latent_channels
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 4, unet.config.sample_size, unet.config.sample_size)
    size = sum(p.numel() for part in (vae, unet, encoder, judge) for p in part.parameters())
    assert 2 * size < 30e6  # half precision
    scheduler = build_scheduler()
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.beta_schedule == "scaled_linear"


def test_the_judge_names_concepts_then_styles(tmp_path):
    pocket.build_judge([f"c{i}" for i in range(12)], ["noto", "fluent"]).save_pretrained(tmp_path)
    labels = load_judge(tmp_path).config.id2label
    expected = [f"concept:c{i}" for i in range(12)] + ["style:noto", "style:fluent"]
    assert [labels[i] for i in range(14)] == expected


def test_the_sdxl_pipeline_starts_as_the_sd_pipeline():
    """Every weight of the UNet is copied, and it ignores the new inputs at first."""
    old, g = load_pipeline("pocket", precision="no"), torch.Generator().manual_seed(0)
    new = pocket.build_sdxl(old)
    z = torch.randn(2, 4, 16, 16, generator=g)
    t = torch.tensor([10, 700])
    context = torch.randn(2, 20, WIDTH, generator=g)
    wide = torch.cat([context, torch.randn(2, 20, WIDTH // 2, generator=g)], -1)
    added = {
        "text_embeds": torch.randn(2, WIDTH // 2, generator=g),
        "time_ids": torch.randn(2, 6, generator=g),
    }
    with torch.no_grad():
        grown = new.unet(z, t, wide, added_cond_kwargs=added).sample
        expected = old.unet(z, t, context).sample
    torch.testing.assert_close(grown, expected, rtol=0, atol=1e-4)
