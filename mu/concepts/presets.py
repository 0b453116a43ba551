"""The words of a concept: relatives proposed by the text encoder, the prompts of five sets, presets."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from tqdm import tqdm

from mu import ROOT
from mu.concepts.sets import vocabulary
from mu.models import text_encoders

PRESETS = str(ROOT / "data" / "concepts.yaml")
SIDES = {
    "forget": "defender/forget",
    "related": "defender/retain-related",
    "unrelated": "defender/retain-unrelated",
    "attack": "attacker/forget",
    "clean": "attacker/clean",
}
OURS, THEIRS = (
    ("a {}", "a photo of a {}", "a drawing of a {}"),
    ("{}", "a picture of a {}"),
)  # captions of the two sides where none are given
SPELT = 10_000  # a tokenizer of fewer tokens than this knows whole words only: others it spells, letter by letter, and they mean nothing to its model


@dataclass(frozen=True)
class Concept:
    name: str
    kind: str  # object or style
    harmful: bool  # its pictures are shown blurred only
    generator: str  # the model that draws the images: short name, diffusers folder or hub id
    steps: int | None  # of the generator, and its guidance scale; None: the caller's
    guidance: float | None
    prompts: dict  # set (as in SIDES) → what it shows → prompts


@torch.no_grad()
def neighbours(pipe, concept, candidates=None, count=12, template="a {}"):
    """Table (concept, cosine) of the `count` candidates whose encoding is nearest to the concept's: the cosine of the text encoder's pooled outputs, for SDXL the
    mean over both encoders. They are proposals: near is not yet related, and whoever asks has to confirm them.

    candidates: texts; by default the tokenizer's `vocabulary`. Raises ValueError for a concept that the model has no word for."""
    check_words(pipe.tokenizer, [concept])
    own = {
        word + ending
        for word in {concept.lower(), *concept.lower().split()}
        for ending in ("", "s", "es")
    }
    words = [
        word
        for word in dict.fromkeys(vocabulary(pipe.tokenizer) if candidates is None else candidates)
        if word.lower() not in own
    ]
    texts, cosine = [template.format(word) for word in (concept, *words)], 0
    for tokenizer, encoder in zip(
        (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)), text_encoders(pipe), strict=False
    ):
        pooled = []
        for i in tqdm(
            range(0, len(texts), 256), "encode", file=sys.stdout, disable=len(texts) < 2048
        ):
            ids = tokenizer(
                texts[i : i + 256], padding=True, truncation=True, return_tensors="pt"
            ).input_ids.to(encoder.device)
            output = encoder(ids)  # causal: what pads a text cannot change what is read before it
            pooled.append(output.text_embeds if "text_embeds" in output else output.pooler_output)
        pooled = F.normalize(torch.cat(pooled).float(), dim=-1).cpu()
        cosine = cosine + pooled[1:] @ pooled[0] / len(text_encoders(pipe))
    return (
        pd.DataFrame({"concept": words, "cosine": cosine.tolist()})
        .nlargest(count, "cosine")
        .reset_index(drop=True)
    )


def check_words(tokenizer, texts):
    """Raises ValueError for words that a small tokenizer (`SPELT`) does not know. A large one knows parts of every word."""
    known = tokenizer.get_vocab()
    unknown = sorted(
        {
            word
            for text in texts
            for word in re.findall(r"[^\W\d_]+", text.lower())
            if word + "</w>" not in known
        }
    )
    if len(tokenizer) < SPELT and unknown:
        raise ValueError(
            f"this model does not know the words {', '.join(unknown)}: use words of its {len(vocabulary(tokenizer))}, such as "
            f"{', '.join(vocabulary(tokenizer)[30:300:30])}, or another model"
        )


def make_concept(
    name,
    related,
    unrelated=None,
    clean=None,
    forget=None,
    attack=None,
    kind="object",
    harmful=False,
    generator="pocket",
    steps=None,
    guidance=None,
):
    """A `Concept` from the names of things, or from a dict of names and their prompts; where there are none (None), templates are filled. Of a style they show the
    `unrelated` things, every second one on the other side.

    Raises ValueError for an unknown kind, for nothing related, for one thing in two roles, for a style without things, and for a prompt on both sides."""
    if kind not in ("object", "style"):
        raise ValueError(f"unknown kind of concept {kind!r}: allowed are object, style")
    if not slug(name) or not related:
        raise ValueError(
            f"a concept needs a name and at least one related concept, got {name!r} and {related!r}: `neighbours` proposes some"
        )
    common, spared = (
        yaml.safe_load(Path(PRESETS).read_text()),
        {name.lower(), *map(str.lower, related)},
    )
    unrelated, clean = (
        unrelated or [x for x in common["everyday"] if x not in spared],
        clean or [x for x in common["benign"] if x not in spared],
    )
    for others in (unrelated, clean):
        taken = [thing.lower() for thing in (name, *related, *others)]
        if twice := sorted({thing for thing in taken if taken.count(thing) > 1}):
            raise ValueError(
                f"{', '.join(twice)} named twice: a thing is the concept itself, or related to it, or neither"
            )
    things = list(unrelated)
    if kind == "style" and len(things) < 2:
        raise ValueError(
            f"a style is shown on things, others on each side: name at least two unrelated ones, got {things}"
        )

    def captions(role, thing):
        ours = role in ("forget", "related", "unrelated")
        if kind == "style" and role in ("forget", "related", "attack"):
            return (
                [f"a {x}, {thing} style" for x in things[::2]]
                if ours
                else [f"{x}, {thing} style" for x in things[1::2]]
            )
        return [template.format(thing) for template in (OURS if ours else THEIRS)]

    given = {
        "forget": {name: forget},
        "related": related,
        "unrelated": unrelated,
        "attack": {name: attack},
        "clean": clean,
    }
    given = {role: x if isinstance(x, dict) else dict.fromkeys(x) for role, x in given.items()}
    prompts = {
        role: {thing: list(texts or captions(role, thing)) for thing, texts in x.items()}
        for role, x in given.items()
    }

    def side(*roles):
        return {
            text.lower().strip()
            for role in roles
            for texts in prompts[role].values()
            for text in texts
        }

    if both := sorted(side("forget", "related", "unrelated") & side("attack", "clean")):
        raise ValueError(
            f"both sides have the prompts {', '.join(map(repr, both))}: reword one of each, a defender who knows the attacker's words proves nothing"
        )
    return Concept(name, kind, harmful, generator, steps, guidance, prompts)


def read_preset(name, file=PRESETS, generator="pocket"):
    """The `Concept` of a name in a file of presets (as data/concepts.yaml says). generator: the model that draws where the preset names none.

    Raises ValueError that lists the known ones, and as `make_concept` does."""
    known = yaml.safe_load(Path(file).read_text())["presets"]
    if name not in known:
        raise ValueError(f"unknown preset {name!r}: {file} has {', '.join(known)}")
    return make_concept(**{"generator": generator} | known[name])


def concept_from(
    model,
    preset="",
    concept="",
    related="",
    unrelated="",
    kind="object",
    harmful=False,
    generator="",
    presets=PRESETS,
):
    """The `Concept` that a notebook's parameters ask for: a preset, or one's own with names parted by commas, drawn by `generator`, or by what the preset names, or by
    `model`. Raises ValueError where both or neither is named, or a preset's words are named beside it; as `read_preset` and `make_concept` do."""
    if bool(preset) == bool(concept) or preset and (related or unrelated):
        raise ValueError(
            f"name a preset, which has its words, or a concept with what is related and unrelated to it; got {preset=}, {concept=}, {related=}, {unrelated=}"
        )

    def names(text):
        return [name.strip() for name in text.split(",") if name.strip()]

    found = (
        read_preset(preset, presets, model)
        if preset
        else make_concept(
            concept.strip(), names(related), names(unrelated) or None, kind=kind, generator=model
        )
    )
    found = replace(found, harmful=found.harmful or harmful)
    return replace(found, generator=generator, steps=None, guidance=None) if generator else found


def slug(text):
    """A text as a part of a file name: letters, digits, hyphens."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")
