"""Concept sets: reading, refusals, encoding, and the cache."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from transformers import BertTokenizer, CLIPTokenizer

from mu.concepts.sets import (
    drawn_set,
    encode_folder,
    random_prompts,
    read_folder,
    read_image,
    take_images,
)

CAPTIONS = ["a cat", "a photo of a cat", "a cat"] * 4  # more images than the VAE reads at a time


@pytest.fixture
def folder(tmp_path):
    return tiny.make_images(tmp_path / "forget", CAPTIONS)


def equal(a, b):
    return (
        torch.equal(a.mean, b.mean)
        and torch.equal(a.std, b.std)
        and torch.equal(a.prompt, b.prompt)
        and a.prompts == b.prompts
        and a.conditioning.keys() == b.conditioning.keys()
        and all(torch.equal(a.conditioning[k], b.conditioning[k]) for k in a.conditioning)
    )


def test_sets_hold_scaled_posteriors_and_encoded_prompts(pipe, folder):
    found = encode_folder(pipe, folder)
    assert len(found) == 12
    assert found.mean.shape == found.std.shape == (12, 4, 8, 8)
    pixels = torch.stack(
        [pipe.image_processor.preprocess(Image.open(folder / f"{i}.png"))[0] for i in range(12)]
    )
    posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(found.mean, posterior.mean * 0.3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.std, posterior.std * 0.3, rtol=1e-5, atol=1e-6)
    assert found.prompts == ["a cat", "a photo of a cat"]
    assert found.prompt.tolist() == [0, 1, 0] * 4
    expected = pipe.encode_prompt(found.prompts, "cpu", 1, False)[0]
    torch.testing.assert_close(
        found.conditioning["encoder_hidden_states"], expected, rtol=0, atol=1e-6
    )
    assert not any(t.requires_grad for t in (found.mean, found.std, *found.conditioning.values()))


def test_fewer_images_are_evenly_spaced(pipe, folder):
    whole = encode_folder(pipe, folder)
    some = take_images(whole, 3)
    assert len(some) == 3
    assert torch.equal(some.mean, whole.mean[[0, 6, 11]])
    assert torch.equal(some.prompt, whole.prompt[[0, 6, 11]])
    assert some.prompts == whole.prompts
    assert equal(take_images(whole, 0), whole)
    assert equal(take_images(whole, 12), whole)
    with pytest.raises(ValueError, match="has 12 images, not 13: take fewer, or 0 for all"):
        take_images(whole, 13)


def test_drawn_sets_are_cached_per_weights(pipe, tmp_path, monkeypatch):
    options = dict(
        prompts=["a tiger", "a cat"],
        count=3,
        seed=5,
        guidance=2.0,
        steps=2,
        cache=tmp_path / "cache",
    )
    first = drawn_set(pipe, **options)
    assert equal(first, drawn_set(pipe, **options | {"cache": None}))
    assert first.prompts == ["a cat", "a tiger"]
    assert first.prompt.tolist() == [1, 0, 1]
    with monkeypatch.context() as patch:
        patch.setattr("mu.concepts.sets.draw_images", lambda *_: pytest.fail("drawn again"))
        assert equal(first, drawn_set(pipe, **options))
    next(pipe.unet.parameters()).data += 0.5
    second = drawn_set(pipe, **options)
    assert not equal(first, second)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not equal(second, drawn_set(pipe, **options | {"seed": 6}))


def test_sdxl_sets_keep_all_conditioning(sdxl_folder, folder, tmp_path):
    from mu.models import load_pipeline

    pipe = load_pipeline(str(sdxl_folder))
    first = encode_folder(pipe, folder, tmp_path / "cache")
    again = encode_folder(pipe, folder, tmp_path / "cache")
    assert first.conditioning.keys() == {
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
    }
    assert equal(first, again)


def test_folders_are_encoded_once(pipe, folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = encode_folder(pipe, folder, cache)
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    assert equal(first, encode_folder(pipe, folder))
    monkeypatch.setattr(pipe.vae, "encode", lambda *_: pytest.fail("the VAE was called again"))
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda *_, **__: pytest.fail("the text encoder was called again")
    )
    assert equal(first, encode_folder(pipe, folder, cache))
    assert [file] == list(cache.iterdir())


@pytest.mark.parametrize("change", ["image", "caption", "vae", "text encoder"])
def test_changed_inputs_are_encoded_again(pipe, folder, tmp_path, change):
    cache = tmp_path / "cache"
    first = encode_folder(pipe, folder, cache)
    if change == "image":
        Image.new("RGB", (16, 16), "red").save(folder / "3.png")
    elif change == "caption":
        table = folder / "metadata.jsonl"
        table.write_text(table.read_text().replace("a photo of a cat", "a tiger"))
    else:  # a model trained further at the same place
        with torch.no_grad():
            for p in (pipe.vae if change == "vae" else pipe.text_encoder).parameters():
                p.mul_(1.01)
    second = encode_folder(pipe, folder, cache)
    assert len(list(cache.iterdir())) == 2
    assert not equal(first, second)
    assert equal(second, encode_folder(pipe, folder))


def test_images_of_another_size_or_mode_are_converted(tmp_path):
    Image.new("L", (40, 30), 255).save(tmp_path / "big.png")
    Image.new("RGB", (16, 16), (0, 255, 0)).save(tmp_path / "fits.png")
    big, fits = read_image(tmp_path / "big.png", 16), read_image(tmp_path / "fits.png", 16)
    assert big.shape == fits.shape == (3, 16, 16)
    assert big.min() == 1
    assert [fits[i].unique().tolist() for i in range(3)] == [[-1], [1], [-1]]


def spoil(folder, how):
    table, image = folder / "metadata.jsonl", folder / "3.png"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    if how == "no metadata":
        table.unlink()
    elif how == "empty metadata":
        table.write_text("\n")
    elif how == "no JSON":
        table.write_text(table.read_text() + "0.png, a cat\n")
    elif how == "no image":
        image.unlink()
    elif how == "no text":
        del lines[3]["text"]
    elif how == "empty text":
        lines[3]["text"] = ""
    elif how == "no file_name":
        del lines[3]["file_name"]
    elif how == "empty image":
        image.write_bytes(b"")
    elif how == "cut image":
        image.write_bytes(image.read_bytes()[:-200])
    elif how == "other image":
        image.write_text("no image at all")
    elif how == "broken header":
        data = bytearray(image.read_bytes())
        data[8:12] = b"\xff\xff\xff\xff"
        image.write_bytes(data)
    if how in ("no text", "empty text", "no file_name"):
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "how, kind, message",
    [
        ("no metadata", FileNotFoundError, "forget has no metadata.jsonl.*file_name.*text"),
        ("empty metadata", ValueError, "metadata.jsonl is empty: name at least one image"),
        ("no JSON", ValueError, "metadata.jsonl is not JSON lines"),
        ("no image", FileNotFoundError, "metadata.jsonl names 3.png, which is not in .*forget"),
        ("no text", ValueError, "3.png.*needs `file_name` and a caption in `text`"),
        ("empty text", ValueError, "3.png.*caption in `text`"),
        ("no file_name", ValueError, "needs `file_name`"),
        ("empty image", ValueError, "3.png is not a readable image.*remove or replace it"),
        ("cut image", ValueError, "3.png is not a readable image"),
        ("other image", ValueError, "3.png is not a readable image"),
        ("broken header", ValueError, "3.png is not a readable image"),
    ],
)
def test_bad_folders_are_refused_and_the_cache_stays_intact(
    pipe, folder, tmp_path, how, kind, message
):
    cache = tmp_path / "cache"
    encode_folder(pipe, folder, cache)
    before = {f: f.read_bytes() for f in cache.iterdir()}
    spoil(folder, how)
    with pytest.raises(kind, match=message):
        encode_folder(pipe, folder, cache)
    assert {f: f.read_bytes() for f in cache.iterdir()} == before


@pytest.mark.parametrize(
    "error", [SyntaxError("broken PNG file"), ValueError("bad mode"), OSError("truncated")]
)
def test_all_pil_errors_name_the_file(tmp_path, monkeypatch, error):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match="a.png is not a readable image"):
        read_image(tmp_path / "a.png", 4)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere has no metadata.jsonl"):
        read_folder(tmp_path / "nowhere")


def test_words_of_other_tokenizers(tmp_path):
    """BERT's, as of Taiyi; a tokenizer without whole words is refused."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "##ger", "of"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    words = {
        word
        for text in random_prompts(BertTokenizer(str(tmp_path / "vocab.txt")), 30)
        for word in text.split()
    }
    assert words == {"cat", "dog"}
    unknown = SimpleNamespace(get_vocab=lambda: {"▁cat": 0})
    with pytest.raises(ValueError, match="has no words that end with </w>"):
        random_prompts(unknown, 2)


def test_random_prompts_use_the_vocabulary_without_the_concepts():
    tokenizer = CLIPTokenizer.from_pretrained("data/pocket-sd/tokenizer")
    found = random_prompts(tokenizer, 2000, without=["a cat", "Santa Claus"])
    words = {word for text in found for word in text.split()}
    assert {len(text.split()) for text in found} == {1, 2}
    assert len(found) == 2000
    assert (
        {"onion", "zebra", "tiger"}
        < words
        <= {token.removesuffix("</w>") for token in tokenizer.get_vocab()}
        - {"cat", "santa", "claus"}
    )
    assert (
        len({len(tokenizer(word).input_ids) for word in words}) == 1
    )  # start, one token, end: whole words for the tokenizer
    assert (
        found
        == random_prompts(tokenizer, 2000, without=["a cat", "Santa Claus"])
        != random_prompts(tokenizer, 2000, seed=1)
    )
