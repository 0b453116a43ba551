"""Concept sets: images and prompts of one concept or of many, encoded once and kept as safetensors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mu.files import read_json, save_tensors
from mu.models import encode_prompts, select, text_encoders
from mu.sampling import draw_images, images_per_batch


@dataclass(frozen=True)
class ConceptSet:
    mean: torch.Tensor  # (images, channels, height, width), posterior mean × scaling_factor
    std: (
        torch.Tensor
    )  # the same shape, posterior deviation × scaling_factor: sampling stays that of the VAE
    conditioning: dict  # one row a prompt
    prompt: torch.Tensor  # (images,), the row of each image's prompt
    prompts: list  # texts

    def __len__(self):
        return len(self.mean)


def read_metadata(folder):
    """The lines of a folder's `metadata.jsonl`, in the `imagefolder` convention: dicts with `file_name`, `text` and perhaps more.

    Raises FileNotFoundError or ValueError that name what is missing and the mend."""
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise FileNotFoundError(
            f'{folder} has no metadata.jsonl: one line an image, {{"file_name": ..., "text": caption}}'
        )
    try:
        lines = [json.loads(line) for line in table.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(
            f"{table} is not JSON lines ({error}): write one object an image"
        ) from error
    if not lines:
        raise ValueError(f"{table} is empty: name at least one image")
    for line in lines:
        if not line.get("text") or not line.get("file_name"):
            raise ValueError(f"{table}: {line} needs `file_name` and a caption in `text`")
        if not (folder / line["file_name"]).is_file():
            raise FileNotFoundError(f"{table} names {line['file_name']}, which is not in {folder}")
    return lines


def read_folder(folder):
    """Paths and captions of an image folder. Raises as `read_metadata` does."""
    folder, lines = Path(folder), read_metadata(folder)
    return [folder / line["file_name"] for line in lines], [line["text"] for line in lines]


def concept_names(folder, *names):
    """What the defender's sets of these names show, each once, sorted: the column `concept` of their metadata where there is one, or else the captions.

    Raises as `read_metadata` does."""
    return sorted(
        {
            line.get("concept") or line["text"]
            for name in names
            for line in read_metadata(Path(folder) / "defender" / name)
        }
    )


def read_image(path, size):
    """float (3, size, size) in −1…1. Raises ValueError that names a file which is no image."""
    try:
        image = Image.open(path).convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # PIL's words for a broken file are these three
        raise ValueError(
            f"{path} is not a readable image ({error}): remove or replace it"
        ) from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(pipe, images, captions):
    """The `ConceptSet` of images (n, 3, height, width) in −1…1, a caption each."""
    prompts, scale = sorted(set(captions)), pipe.vae.config.scaling_factor
    posteriors = [
        pipe.vae.encode(x.to(pipe.vae.device, pipe.vae.dtype)).latent_dist for x in images.split(8)
    ]
    mean, std = (
        torch.cat([getattr(p, name) for p in posteriors]).to(pipe.unet.device) * scale
        for name in ("mean", "std")
    )
    return ConceptSet(
        mean,
        std,
        encode_prompts(pipe, prompts),
        torch.tensor([prompts.index(c) for c in captions], device=pipe.unet.device),
        prompts,
    )


@torch.no_grad()
def drawn_set(pipe, prompts, count, seed=0, guidance=5.0, steps=25, cache=None):
    """The `ConceptSet` of `count` images that the pipeline itself draws now, of each prompt in turn (DreamBooth's prior preservation). With `cache` (a folder) the same pipeline draws them once."""
    captions = [prompts[i % len(prompts)] for i in range(count)]

    def make():
        conditioning = select(encode_prompts(pipe, prompts), torch.arange(count) % len(prompts))
        return encode_images(
            pipe,
            draw_images(
                pipe,
                conditioning,
                encode_prompts(pipe, [""]),
                range(seed * count, (seed + 1) * count),
                guidance,
                steps,
                images_per_batch(pipe),
            )
            * 2
            - 1,
            captions,
        )

    said = json.dumps(
        [
            captions,
            seed,
            guidance,
            steps,
            pipe.unet.config.sample_size,
            pipe.vae.config.scaling_factor,
        ]
    ).encode()
    return cached(
        make,
        sorted(set(captions)),
        pipe.unet.device,
        cache,
        "drawn",
        said,
        pipe.unet,
        pipe.vae,
        *text_encoders(pipe),
    )


def with_prompts(concept_set, count):
    """Only the images of the `count` most frequent prompts of a set, ties in their order; 0: all. 1 is the paper's HRM-s, several are its HRM-m."""
    frequent = concept_set.prompt.bincount(minlength=len(concept_set.prompts)).argsort(
        descending=True, stable=True
    )[: count or None]
    keep = torch.isin(concept_set.prompt, frequent)
    return ConceptSet(
        concept_set.mean[keep],
        concept_set.std[keep],
        concept_set.conditioning,
        concept_set.prompt[keep],
        concept_set.prompts,
    )


def take_images(concept_set, count):
    """`count` of a set's images, evenly from its whole length; 0, or as many as there are: all. Raises ValueError for more than there are."""
    if count > len(concept_set):
        raise ValueError(
            f"the set has {len(concept_set)} images, asked for are {count}: name fewer, or 0 for all"
        )
    some = torch.linspace(0, len(concept_set) - 1, count).round().long() if count else slice(None)
    return ConceptSet(
        concept_set.mean[some],
        concept_set.std[some],
        concept_set.conditioning,
        concept_set.prompt[some],
        concept_set.prompts,
    )


@torch.no_grad()
def encode_folder(pipe, folder, cache=None):
    """The `ConceptSet` of an image folder. With `cache` (a folder) it is encoded once and read from there afterwards.

    The cached file's name is a digest of captions, image bytes and of weights of the VAE and the text encoders, so that it cannot be stale."""
    paths, captions = read_folder(folder)
    said = json.dumps(
        [captions, pipe.unet.config.sample_size, pipe.vae.config.scaling_factor]
    ).encode() + b"".join(path.read_bytes() for path in paths)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def make():
        return encode_images(
            pipe, torch.stack([read_image(path, side) for path in paths]), captions
        )

    return cached(
        make,
        sorted(set(captions)),
        pipe.unet.device,
        cache,
        Path(folder).name,
        said,
        pipe.vae,
        *text_encoders(pipe),
    )


def cached(make, prompts, device, cache, name, said, *parts):
    """The `ConceptSet` that `make` makes, from the file <cache>/<name>-<digest>.safetensors where it has been made before; without `cache`, made.

    said: bytes, all that it is made from, of which the digest is, and of some weights of each of `parts`: the file cannot be stale."""
    digest = hashlib.sha256(said)
    for p in (p for part in parts for p in part.parameters()):
        digest.update(
            p.flatten()[:16].float().cpu().numpy().tobytes()
        )  # enough: training changes every tensor
    file = Path(cache) / f"{name}-{digest.hexdigest()[:16]}.safetensors" if cache else None
    if file and file.exists():
        tensors = load_file(file)
    else:
        made = make()
        tensors = {"mean": made.mean, "std": made.std, "prompt": made.prompt} | made.conditioning
        if file:
            save_tensors(tensors, file)
    tensors = {name: value.to(device) for name, value in tensors.items()}
    conditioning = {
        name: value for name, value in tensors.items() if name not in ("mean", "std", "prompt")
    }
    return ConceptSet(tensors["mean"], tensors["std"], conditioning, tensors["prompt"], prompts)


def vocabulary(tokenizer, without=()):
    """The tokenizer's words of three letters and more, sorted, none of them a word of the texts `without`. Among them are endings of longer words ("der" of spider)."""
    left_out = {word for text in without for word in text.lower().split()}
    words = sorted(
        token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")
    )  # it ends a word, and may be all of it
    return [word for word in words if word.isalpha() and len(word) > 2 and word not in left_out]


def random_prompts(tokenizer, count, without=(), seed=0):
    """`count` texts of one or two random words of the tokenizer's vocabulary, none of them a word of the texts `without`.

    What such prompts draw stands for all that a retained set of images does not show."""
    words, generator = vocabulary(tokenizer, without), torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    return [" ".join(words[draw(len(words))] for _ in range(1 + draw(2))) for _ in range(count)]


def load_sets(pipe, folder, cache=None):
    """The defender's sets of a concept's folder, under the names that `mu.train.unlearn` gives them."""
    return {
        name.replace("-", "_"): encode_folder(pipe, Path(folder) / "defender" / name, cache)
        for name in ("forget", "retain-related", "retain-unrelated")
    }


def read_groups(folder):
    """Prompts of the probe and what is expected in them, by group. Raises FileNotFoundError that lists the concepts beside an unknown one."""
    file = Path(folder) / "probe.json"
    if not file.is_file():
        known = ", ".join(sorted(str(f.parent) for f in Path(folder).parent.glob("*/probe.json")))
        raise FileNotFoundError(
            f"{folder} is not a concept's folder, it has no probe.json; there are: {known or 'none beside it'}"
        )
    return json.loads(file.read_text())


def is_harmful(folder):
    """Whether a concept's folder says, in its `concept.json`, that the concept is harmful; without one it is not."""
    return bool(read_json(Path(folder) / "concept.json", {}).get("harmful", False))
