"""CLIP: scores of images against their prompts, and zero-shot classification."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from mu.files import digest
from mu.measures.metrics import check_images


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its tokenizer and preprocessing."""

    model: CLIPModel
    tokenizer: object
    processor: object
    facts: dict  # for the card

    def texts(self, texts):
        """Return unit vectors (n, width) of texts, truncated to CLIP's context length."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return self._unit(self.model.get_text_features(**tokens.to(self.model.device)))

    def images(self, images):
        """Return unit vectors (n, width) of images.

        Resizes (bicubic), crops and normalises with PIL, as published scores do.
        """
        arrays = list(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
        pixels = self.processor(arrays, return_tensors="pt").pixel_values
        return self._unit(self.model.get_image_features(pixels.to(self.model.device)))

    @staticmethod
    def _unit(features):
        features = getattr(features, "pooler_output", features)
        return F.normalize(features.float(), dim=-1).cpu()


def clip_network(name="openai/clip-vit-large-patch14", device=None):
    """Load CLIP by hub id or folder, from safetensors.

    Raises FileNotFoundError if it is neither on this machine nor on the hub.
    """
    try:
        model = CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
        processor = CLIPImageProcessorPil.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"CLIP {name!r} is neither a folder nor available from the hub ({error}): name a "
            f"folder, or run `hf download {name}` online and copy {constants.HF_HUB_CACHE}"
        ) from error
    model = model.eval().requires_grad_(False).to(device or "cpu")
    source = f"{name} ({digest(name)})" if Path(name).is_dir() else name
    return Clip(model, tokenizer, processor, {"clip": source, "clip_scale": "100 · cosine"})


@torch.no_grad()
def clip_score(clip, images, prompts, batch_size=32):
    """Return 100 · cosine of each image and its prompt, (n,).

    Hessel et al. 2021, without their weight and clipping at 0. Raises ValueError as `check_images`
    does, and for unequal numbers.
    """
    if len(check_images(images)) != len(prompts):
        raise ValueError(
            f"CLIP scores need one prompt per image, got {len(images)} images and "
            f"{len(prompts)} prompts"
        )
    scores = []
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        scores.append(100 * (clip.images(images[batch]) * clip.texts(prompts[batch])).sum(1))
    return torch.cat(scores)


@torch.no_grad()
def zero_shot(clip, images, labels, template="a photo of a {}", batch_size=32):
    """Return the label whose text is nearest to each image.

    template: for styles, "a picture in the style of {}". Raises ValueError as `check_images` does,
    and for fewer than two labels.
    """
    if len(set(labels)) < 2:
        raise ValueError(f"zero-shot classification needs two labels or more, got {list(labels)}")
    texts = clip.texts([template.format(label) for label in labels])
    batches = check_images(images).split(batch_size)
    nearest = torch.cat([(clip.images(batch) @ texts.T).argmax(1) for batch in batches])
    return [labels[i] for i in nearest.tolist()]
