"""Concept sets: images with prompts, encoded once and cached as safetensors."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mu.files import read_json, save_tensors
from mu.images import open_image
from mu.models import encode_prompts, select, text_encoders
from mu.sampling import draw_images, images_per_batch


@dataclass(frozen=True)
class ConceptSet:
    """Images as posteriors of the VAE, which training samples from, and their prompts."""

    mean: torch.Tensor  # (images, channels, height, width), × scaling_factor
    std: torch.Tensor  # the same
    conditioning: dict  # one row per prompt
    prompt: torch.Tensor  # (images,), row of each image's prompt
    prompts: list  # texts

    def __len__(self):
        return len(self.mean)

    def subset(self, index):
        """Return the set of some images."""
        return replace(self, mean=self.mean[index], std=self.std[index], prompt=self.prompt[index])


TABLES = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")  # beside an image, with its stem
UNREAD = (".jsonl", ".csv", ".json", ".parquet", ".arrow", ".tsv")  # may hold captions


def read_metadata(folder):
    """Return the lines of metadata.jsonl or metadata.csv, dicts with file_name and text.

    As the `imagefolder` of datasets. Raises FileNotFoundError or ValueError that names what is
    missing.
    """
    folder = Path(folder)
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) != 1:
        found = "both metadata.jsonl and metadata.csv" if tables else "no metadata.jsonl"
        keys = '{"file_name": …, "text": caption}'
        error = ValueError if tables else FileNotFoundError
        raise error(f"{folder} has {found}: write one, with {keys} per image")
    table = tables[0]
    lines = read_lines(table)
    if not lines:
        raise ValueError(f"{table} is empty: name at least one image")
    for line in lines:
        if not line.get("text") or not line.get("file_name"):
            raise ValueError(f"{table}: {line} needs `file_name` and a caption in `text`")
        if not (folder / line["file_name"]).is_file():
            raise FileNotFoundError(f"{table} names {line['file_name']}, which is not in {folder}")
    return lines


def read_lines(table):
    """Return the rows of a JSON Lines or CSV file in UTF-8 as dicts.

    A line ends with a newline only: captions may have U+2028. Raises ValueError for another format.
    """
    try:
        text = table.read_bytes().decode("utf-8-sig")
        if table.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        form = "CSV" if table.suffix == ".csv" else "JSON lines"
        raise ValueError(f"{table} is not {form} in UTF-8: {error}") from error


def read_captions(source, files):
    """Return image file → caption, of all metadata files and text files beside the images.

    Raises ValueError for an image with two captions, for files that may hold captions and are not
    read, and as `read_metadata` does.
    """
    source, captions = Path(source), {}
    pairs = [(file.with_suffix(end), file) for file in files for end in SIDECARS]
    found = [(file, text.read_text("utf-8-sig").strip()) for text, file in pairs if text.is_file()]
    for folder in sorted({table.parent for name in TABLES for table in source.rglob(name)}):
        found += [(folder / line["file_name"], line["text"]) for line in read_metadata(folder)]
    for file, caption in found:
        if captions.setdefault(file, caption) != caption:
            raise ValueError(f"{file} has two captions: keep the metadata file or the text file")
    unread = [f for f in sorted(source.rglob("*")) if f.suffix in UNREAD and f.name not in TABLES]
    if unread:
        raise ValueError(
            f"{source} has {unread[0].name}, which is not read: write captions to metadata.jsonl, "
            "or move the file away"
        )
    return captions


def read_folder(folder):
    """Return paths and captions of an image folder. Raises as `read_metadata` does."""
    lines = read_metadata(folder)
    return [Path(folder) / line["file_name"] for line in lines], [line["text"] for line in lines]


def concept_names(folder, *names):
    """Return what the defender's sets show, sorted: `concept` in their metadata, or `text`."""
    defender = Path(folder) / "defender"
    lines = [line for name in names for line in read_metadata(defender / name)]
    return sorted({line.get("concept") or line["text"] for line in lines})


def read_image(path, size):
    """Return the centre of an image (`mu.images.open_image`), (3, size, size) in [−1, 1]."""
    pixels = torch.from_numpy(np.array(open_image(path, size)))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(pipe, images, captions):
    """Return the `ConceptSet` of images (n, 3, height, width) in [−1, 1] with one caption each."""
    prompts, device, scale = sorted(set(captions)), pipe.unet.device, pipe.vae.config.scaling_factor
    batches = [x.to(pipe.vae.device, pipe.vae.dtype) for x in images.split(8)]
    posteriors = [pipe.vae.encode(x).latent_dist for x in batches]
    mean = torch.cat([p.mean for p in posteriors]).to(device) * scale
    std = torch.cat([p.std for p in posteriors]).to(device) * scale
    index = torch.tensor([prompts.index(caption) for caption in captions], device=device)
    return ConceptSet(mean, std, encode_prompts(pipe, prompts), index, prompts)


def cached(make, captions, device, cache, name, key, *parts):
    """Return the `ConceptSet` of `make`, cached as <cache>/<name>-<digest>.safetensors.

    The digest covers key (bytes: all that the set is made from) and weights of all models in
    `parts`, so the file cannot be stale. cache: a folder, or None.
    """
    digest = hashlib.sha256(key)
    for p in (p for part in parts for p in part.parameters()):
        sample = p.flatten()[:16]  # training changes every tensor
        digest.update(sample.float().cpu().numpy().tobytes())
    file = Path(cache) / f"{name}-{digest.hexdigest()[:16]}.safetensors" if cache else None
    if file and file.exists():
        tensors = load_file(file)
    else:
        made = make()
        tensors = {"mean": made.mean, "std": made.std, "prompt": made.prompt} | made.conditioning
        if file:
            save_tensors(tensors, file)
    conditioning = {name: value.to(device) for name, value in tensors.items()}
    images = {name: conditioning.pop(name) for name in ("mean", "std", "prompt")}
    return ConceptSet(**images, conditioning=conditioning, prompts=sorted(set(captions)))


@torch.no_grad()
def encode_folder(pipe, folder, cache=None):
    """Return the `ConceptSet` of an image folder, cached in the folder `cache`."""
    paths, captions = read_folder(folder)
    size, scale = pipe.unet.config.sample_size, pipe.vae.config.scaling_factor
    key = json.dumps([captions, size, scale]).encode()
    key += b"".join(path.read_bytes() for path in paths)

    def make():
        images = torch.stack([read_image(path, size * pipe.vae_scale_factor) for path in paths])
        return encode_images(pipe, images, captions)

    parts = (pipe.vae, *text_encoders(pipe))
    return cached(make, captions, pipe.unet.device, cache, Path(folder).name, key, *parts)


@torch.no_grad()
def drawn_set(pipe, prompts, count, seed=0, guidance=5.0, steps=25, cache=None):
    """Return a `ConceptSet` that the pipeline draws itself, the prompts in turn, as DreamBooth."""
    captions = [prompts[i % len(prompts)] for i in range(count)]
    size, scale = pipe.unet.config.sample_size, pipe.vae.config.scaling_factor
    key = json.dumps([captions, seed, guidance, steps, size, scale]).encode()

    def make():
        rows = select(encode_prompts(pipe, prompts), torch.arange(count) % len(prompts))
        seeds = range(seed * count, (seed + 1) * count)
        sampling = (seeds, guidance, steps, images_per_batch(pipe))
        images = draw_images(pipe, rows, encode_prompts(pipe, [""]), *sampling)
        return encode_images(pipe, images * 2 - 1, captions)

    parts = (pipe.unet, pipe.vae, *text_encoders(pipe))
    return cached(make, captions, pipe.unet.device, cache, "drawn", key, *parts)


def with_prompts(concept_set, count):
    """Return the images of the `count` most frequent prompts (1: HRM-s, more: HRM-m); 0: all."""
    counts = concept_set.prompt.bincount(minlength=len(concept_set.prompts))
    frequent = counts.argsort(descending=True, stable=True)[: count or None]
    return concept_set.subset(torch.isin(concept_set.prompt, frequent))


def take_images(concept_set, count):
    """Return `count` images, evenly spaced over the set; 0: all."""
    most = len(concept_set)
    if count > most:
        raise ValueError(f"the set has {most} images, not {count}: take fewer, or 0 for all")
    even = torch.linspace(0, most - 1, count).round().long()
    return concept_set.subset(even if count else slice(None))


def vocabulary(tokenizer, without=()):
    """Return the tokenizer's words and word endings of 3 letters or more, except `without`'s.

    CLIP's end with </w>; WordPiece (BERT) has ## at the start of all but whole words.
    Raises ValueError for a tokenizer with neither.
    """
    excluded, tokens = {w for text in without for w in text.lower().split()}, tokenizer.get_vocab()
    words = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
    if not words and any(token.startswith("##") for token in tokens):
        words = {token for token in tokens if not token.startswith("##")}
    known = [word for word in sorted(words) if word.isalpha() and len(word) > 2]
    known = [word for word in known if word not in excluded]
    if not known:
        raise ValueError(
            f"{type(tokenizer).__name__} has no words that end with </w> or pieces that begin with "
            "##: choose a model with CLIP's tokenizer, or set retain_prompts = 0"
        )
    return known


def random_prompts(tokenizer, count, without=(), seed=0):
    """Return `count` texts of 1 or 2 random words of `vocabulary`, for what no retain set shows."""
    words, generator = vocabulary(tokenizer, without), torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    return [" ".join(words[draw(len(words))] for _ in range(1 + draw(2))) for _ in range(count)]


def load_sets(pipe, folder, cache=None):
    """Return the defender's sets of a concept folder: forget, retain_related, retain_unrelated."""
    return {
        name.replace("-", "_"): encode_folder(pipe, Path(folder) / "defender" / name, cache)
        for name in ("forget", "retain-related", "retain-unrelated")
    }


def read_groups(folder):
    """Return group → {prompt: expected label}. Raises FileNotFoundError for an unknown folder."""
    file = Path(folder) / "probe.json"
    if not file.is_file():
        known = ", ".join(sorted(str(f.parent) for f in Path(folder).parent.glob("*/probe.json")))
        raise FileNotFoundError(
            f"{folder} is not a concept folder (no probe.json): choose {known or 'another'}"
        )
    return read_json(file)


def is_harmful(folder):
    """Return whether `concept.json` of a concept folder declares the concept harmful."""
    return bool(read_json(Path(folder) / "concept.json", {}).get("harmful", False))
