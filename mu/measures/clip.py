"""CLIP: how well pictures fit their prompts, and which of several words fits a picture best."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from mu.files import digest
from mu.measures.metrics import finite


@dataclass(frozen=True)
class Clip:
    model: CLIPModel
    tokenizer: object
    processor: object
    facts: dict  # for the card

    def texts(self, texts):
        """Unit vectors (n, width) of texts; a text that is longer than CLIP reads is cut, as everybody does."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return self.unit(self.model.get_text_features(**tokens.to(self.model.device)))

    def images(self, images):
        """Unit vectors (n, width) of images, through CLIP's own preprocessing (bicubic resize, crop, normalise; PIL's, as the published scores)."""
        arrays = list(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
        return self.unit(
            self.model.get_image_features(
                self.processor(arrays, return_tensors="pt").pixel_values.to(self.model.device)
            )
        )

    @staticmethod
    def unit(found):
        return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1).cpu()


def clip_network(name="openai/clip-vit-large-patch14", device=None):
    """CLIP by its hub id or folder; safetensors only. Raises FileNotFoundError with the mend where it is neither here nor within reach."""
    try:
        model = (
            CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
            .eval()
            .requires_grad_(False)
        )
        parts = AutoTokenizer.from_pretrained(name), CLIPImageProcessorPil.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"CLIP {name!r} is neither a folder nor can it be reached from here. Without a network it must be in the cache, {constants.HF_HUB_CACHE} "
            f"(`hf download {name}` where there is one), or be named by its folder ({error})"
        ) from error
    place = f" ({digest(name)})" if Path(name).is_dir() else ""
    return Clip(
        model.to(device or "cpu"), *parts, {"clip": name + place, "clip_scale": "100 · cosine"}
    )


@torch.no_grad()
def clip_score(clip, images, prompts, batch_size=32):
    """100 · cosine of each picture and its prompt (Hessel et al. 2021, without their weight and their floor at 0), (n,). Raises ValueError as `finite` does."""
    if len(finite(images)) != len(prompts):
        raise ValueError(
            f"a CLIP score needs one prompt a picture, got {len(images)} pictures and {len(prompts)} prompts"
        )
    index = torch.arange(len(images)).split(batch_size)
    return torch.cat(
        [100 * (clip.images(images[i]) * clip.texts([prompts[j] for j in i])).sum(1) for i in index]
    )


@torch.no_grad()
def zero_shot(clip, images, labels, template="a photo of a {}", batch_size=32):
    """The label whose text is nearest to each picture: names of objects, or of styles with the template "a picture in the style of {}". Raises as `finite` does."""
    if len(set(labels)) < 2:
        raise ValueError(
            f"zero-shot classification chooses between two labels or more, got {list(labels)}"
        )
    texts = clip.texts([template.format(label) for label in labels])
    return [
        labels[i]
        for part in finite(images).split(batch_size)
        for i in (clip.images(part) @ texts.T).argmax(1).tolist()
    ]
