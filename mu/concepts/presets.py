"""Concepts in words: related concepts from the text encoder, prompts of five sets, presets."""

import re
import sys
from collections import Counter
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
SIDES = {  # role → folder
    "forget": "defender/forget",
    "related": "defender/retain-related",
    "unrelated": "defender/retain-unrelated",
    "attack": "attacker/forget",
    "clean": "attacker/clean",
}
DEFENDER_TEMPLATES = ("a {}", "a photo of a {}", "a drawing of a {}")
ATTACKER_TEMPLATES = ("{}", "a picture of a {}")
WHOLE_WORDS = 10_000  # smaller vocabularies spell unknown words, which mean nothing to the model


@dataclass(frozen=True)
class Concept:
    """A concept, its prompts, and the model that generates its images."""

    name: str
    kind: str  # object or style
    harmful: bool  # blur its images
    generator: str  # short name, diffusers folder or hub id
    steps: int | None  # of the generator; None: the caller's
    guidance: float | None  # the same
    prompts: dict  # role (key of SIDES) → thing → prompts

    def texts(self, *roles):
        """Return the prompts of some roles, by default of all."""
        things = [self.prompts[role] for role in roles or self.prompts]
        return [text for texts in things for some in texts.values() for text in some]


def pooled_outputs(tokenizer, encoder, texts):
    """Return a text encoder's pooled outputs, normalised, (n, width)."""
    pooled = []
    few = len(texts) < 2048
    for i in tqdm(range(0, len(texts), 256), "encode", file=sys.stdout, disable=few):
        tokens = tokenizer(texts[i : i + 256], padding=True, truncation=True, return_tensors="pt")
        output = encoder(tokens.input_ids.to(encoder.device))  # causal: padding changes nothing
        pooled.append(output.text_embeds if "text_embeds" in output else output.pooler_output)
    return F.normalize(torch.cat(pooled).float(), dim=-1).cpu()


@torch.no_grad()
def neighbours(pipe, concept, candidates=None, count=12, template="a {}"):
    """Return a table (concept, cosine) of the `count` candidates nearest to a concept.

    The cosine is that of the text encoder's pooled outputs, for SDXL the mean over both encoders.
    candidates: texts, by default the tokenizer's `vocabulary`. Raises as `check_words` does.
    """
    check_words(pipe.tokenizer, [concept])
    own = {concept.lower(), *concept.lower().split()}
    own |= {word + ending for word in own for ending in ("s", "es")}
    candidates = vocabulary(pipe.tokenizer) if candidates is None else candidates
    words = [word for word in dict.fromkeys(candidates) if word.lower() not in own]
    texts = [template.format(word) for word in (concept, *words)]
    tokenizers = [pipe.tokenizer, getattr(pipe, "tokenizer_2", None)]
    encoders = text_encoders(pipe)
    cosine = 0
    for tokenizer, encoder in zip(tokenizers, encoders, strict=False):  # SD has one of each
        pooled = pooled_outputs(tokenizer, encoder, texts)
        cosine = cosine + pooled[1:] @ pooled[0] / len(encoders)
    table = pd.DataFrame({"concept": words, "cosine": cosine.tolist()})
    return table.nlargest(count, "cosine").reset_index(drop=True)


def check_words(tokenizer, texts):
    """Raise ValueError for words that a small tokenizer (`WHOLE_WORDS`) does not know."""
    if len(tokenizer) >= WHOLE_WORDS:
        return
    known = tokenizer.get_vocab()
    words = {word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())}
    unknown = sorted(word for word in words if word + "</w>" not in known)
    if unknown:
        raise ValueError(
            f"the model does not know the words {', '.join(unknown)}: use its words, such as "
            f"{', '.join(vocabulary(tokenizer)[30:300:30])}, or another model"
        )


def templates(role, kind, things):
    """Return the caption templates of a role. A style is shown on things, each on one side."""
    if kind == "style" and role in ("forget", "related"):
        return [f"a {thing}, {{}} style" for thing in things[::2]]
    if kind == "style" and role == "attack":
        return [f"{thing}, {{}} style" for thing in things[1::2]]
    return ATTACKER_TEMPLATES if role in ("attack", "clean") else DEFENDER_TEMPLATES


def choose_things(name, prompts):
    """Return related, unrelated, clean things. ValueError if none is related or one named twice."""
    related = prompts.get("related")
    if not slug(name) or not related:
        got = f"{name!r} and {related!r}"
        raise ValueError(f"a concept needs a name and related concepts (`neighbours`), got {got}")
    common = yaml.safe_load(Path(PRESETS).read_text())
    used = [thing.lower() for thing in (name, *related)]
    things = {"related": related}
    for role, default in (("unrelated", "everyday"), ("clean", "benign")):
        things[role] = prompts.get(role) or [x for x in common[default] if x not in used]
        counts = Counter(used + [thing.lower() for thing in things[role]])
        if twice := sorted(thing for thing, count in counts.items() if count > 1):
            raise ValueError(f"{', '.join(twice)} named twice: each thing has one role")
    return things


def make_concept(
    name, prompts, kind="object", harmful=False, generator="pocket", steps=None, guidance=None
):
    """Return a `Concept`, with templates for all prompts that are not given.

    prompts: role → names of things, or {thing: prompts}; for "forget" and "attack" the concept's
    prompts. "related" is required, see `choose_things`. Raises as it does, and ValueError for an
    unknown kind, a style with fewer than two things, and a prompt on both sides.
    """
    if kind not in ("object", "style"):
        raise ValueError(f"unknown kind of concept {kind!r}: choose object or style")
    given = {role: {name: prompts.get(role)} for role in ("forget", "attack")}
    given |= choose_things(name, prompts)
    shown_on = list(given["unrelated"])
    if kind == "style" and len(shown_on) < 2:
        raise ValueError(f"a style needs at least two unrelated things, got {shown_on}")
    filled = {}
    for role in SIDES:
        things = given[role] if isinstance(given[role], dict) else dict.fromkeys(given[role])
        defaults = templates(role, kind, shown_on)
        filled[role] = {
            thing: list(texts or [template.format(thing) for template in defaults])
            for thing, texts in things.items()
        }
    concept = Concept(name, kind, harmful, generator, steps, guidance, filled)
    defender = {text.lower().strip() for text in concept.texts("forget", "related", "unrelated")}
    attacker = {text.lower().strip() for text in concept.texts("attack", "clean")}
    if defender & attacker:
        both = ", ".join(map(repr, sorted(defender & attacker)))
        raise ValueError(f"both sides have the prompts {both}: reword one of each")
    return concept


def read_preset(name, file=PRESETS, generator="pocket"):
    """Return the `Concept` of a preset; `generator` draws its images if it names none.

    Raises ValueError for an unknown preset, and as `make_concept` does.
    """
    known = yaml.safe_load(Path(file).read_text())["presets"]
    if name not in known:
        raise ValueError(f"unknown preset {name!r}: {file} has {', '.join(known)}")
    preset = {"generator": generator} | known[name]
    prompts = {role: preset.pop(role) for role in SIDES if role in preset}
    return make_concept(prompts=prompts, **preset)


def concept_from(
    model, preset="", concept="", related="", unrelated="", kind="object", presets=PRESETS
):
    """Return the `Concept` of a notebook's parameters: a preset, or names separated by commas.

    `model` generates the images unless the preset names a generator. Raises ValueError if both
    or neither are given, and as `read_preset` and `make_concept` do.
    """
    if bool(preset) == bool(concept) or (preset and (related or unrelated)):
        raise ValueError(
            "name either a preset, or a concept with its related and unrelated things; got "
            f"{preset=}, {concept=}, {related=}, {unrelated=}"
        )
    if preset:
        return read_preset(preset, presets, model)
    names = {"related": related.split(","), "unrelated": unrelated.split(",")}
    prompts = {role: [x.strip() for x in some if x.strip()] for role, some in names.items()}
    return make_concept(concept.strip(), prompts, kind, generator=model)


def override(concept, harmful=False, generator=""):
    """Return a concept declared harmful, or with another generator and its default sampler."""
    if generator:
        concept = replace(concept, generator=generator, steps=None, guidance=None)
    return replace(concept, harmful=concept.harmful or harmful)


def slug(text):
    """Return a text as part of a file name: letters, digits, hyphens."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")
