"""Attacks by training: malicious fine-tuning in all its kinds.

Full fine-tuning, of a subset, or of LoRA adapters; with other images mixed in, after a benign
warm-up, with DreamBooth's prior preservation; of the embedding of a word (textual inversion); and after the
original's weights are merged back. All take the step that the defence simulates,
`mu.train.finetune`. Attacks by prompts: `mu.attacks.search`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mu.attacks.tokens import embeddings, holds, stand_in, swapped, words
from mu.concepts.probe import Probe
from mu.concepts.sets import ConceptSet, drawn_set, encode_folder, with_prompts
from mu.models import encode_prompts, select, trainable
from mu.sampling import Sampling, images_per_batch
from mu.state import State

KINDS = ("fine-tuning", "dreambooth", "textual-inversion", "concept-inversion")
DRAWN_SEED, CLASS_SEED = 1000, 2000  # of images that attackers draw; no evaluation prompt has them


@dataclass(frozen=True)
class AttackConfig:
    """An attack by training, as a notebook's parameters describe it."""

    kind: str = "fine-tuning"
    lr: float = 6e-5
    optimizer: str = "adam"
    subset: str = "f"
    rank: int = 16  # of subset lora
    mixed_set: str = ""  # set below the concept folder, mixed into every step
    mixed_weight: float = 1.0  # of its loss, or of DreamBooth's prior preservation
    warmup_set: str = ""  # set that the first steps train on alone
    warmup_steps: int = 0
    class_images: int = 64  # images of related concepts that DreamBooth draws and keeps
    word: str = ""  # whose embedding an inversion learns
    init_word: str = ""  # whose embedding it starts from
    concept_token: str = ""  # the concept's word in captions and prompts; empty: the expected label

    def check(self):
        """Raise ValueError for parts that do not belong together."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of attack {self.kind!r}: choose {', '.join(KINDS)}")
        if bool(self.warmup_set) != bool(self.warmup_steps):
            raise ValueError(
                f"warmup_set={self.warmup_set!r} with warmup_steps={self.warmup_steps}: give both, "
                "or neither"
            )
        if self.kind != "fine-tuning" and (self.mixed_set or self.warmup_set):
            raise ValueError(
                f"kind {self.kind!r} has no mixed_set={self.mixed_set!r} and no "
                f"warmup_set={self.warmup_set!r}: leave them empty, or choose fine-tuning"
            )


@dataclass(frozen=True)
class Attack:
    """What an attacker trains, on which images, and how it draws with what it has learned."""

    state: State
    concept_set: ConceptSet | Callable[[int], ConceptSet]  # or a function of the steps done
    probe: Callable[[], Probe]
    images: int  # different images that the attack uses
    mixed_set: ConceptSet | None = None  # the same steps train on it, too
    mixed_weight: float = 1.0
    passes: int = 0  # forward passes of the UNet that its preparation took


def fine_tuning(pipe, concept_set, probe, config, seed=0, mixed_set=None, warmup_set=None):
    """Return the `Attack` that trains weights of the UNet on the concept's images.

    mixed_set: benign images, mixed in so that related concepts survive. warmup_set: the first
    `config.warmup_steps` steps train on it alone, to wear off a defence. Raises as `State` does.
    """
    kind = dict(seed=seed, rank=config.rank)
    state = State(pipe.unet, config.subset, config.lr, config.optimizer, **kind)
    steps = config.warmup_steps if warmup_set is not None else 0

    def phase(step):
        return warmup_set if step < steps else concept_set

    images = len(concept_set) + (len(warmup_set) if steps else 0)
    if mixed_set is not None and config.mixed_weight:
        images += len(mixed_set)
    phases = phase if steps else concept_set
    return Attack(state, phases, lambda: probe, images, mixed_set, config.mixed_weight)


def dreambooth(pipe, concept_set, probe, config, seed=0, sampling=Sampling()):
    """Return the `Attack` of DreamBooth (Ruiz et al. 2023): fine-tuning with prior preservation.

    The class images show related concepts; the attacked model draws them before it is trained. The
    concept keeps its name: for an unlearned word, a rare identifier is no better. Raises
    ValueError if the probe has no related prompts.
    """
    prompts = sorted({item["prompt"] for item in probe.items if item["group"] == "related"})
    if not prompts:
        raise ValueError("dreambooth needs related prompts of the probe as its class: it has none")
    drawn = drawn_set(pipe, prompts, config.class_images, CLASS_SEED + seed, *sampling)
    made = fine_tuning(pipe, concept_set, probe, config, seed, mixed_set=drawn)
    batches = math.ceil(config.class_images / images_per_batch(pipe))
    return replace(made, passes=sampling.steps * batches)


def inversion(pipe, concept_set, probe, config, rewrite, seed=0):
    """Return the `Attack` that trains one embedding per text encoder (Adam) and no weight.

    Textual inversion (Gal et al. 2023); on an unlearned model, concept inversion (Pham et al.
    2024). The embedding is read where `config.word` occurs. rewrite: text → text with that word,
    for captions and forget prompts. Raises ValueError for a word that is not one token, for a
    caption without it, and if another prompt of the probe holds it.
    """
    known = words(pipe)
    for name in (config.word, config.init_word):
        if name not in known:
            raise ValueError(
                f"{name!r} is not one token of the text encoder: choose a word such as "
                f"{', '.join(known[:5])} (mu.attacks.tokens.words)"
            )
    captions = [rewrite(text) for text in concept_set.prompts]
    forget = [item["group"] == "forget" for item in probe.items]
    prompts = [item["prompt"] for item in probe.items]
    drawn = [rewrite(p) if f else p for p, f in zip(prompts, forget, strict=True)]
    check_word(config.word, captions, drawn, forget)
    vectors = [t[0].clone().requires_grad_(True) for t in embeddings(pipe, [config.init_word])]
    named = {f"vector/{e}": vector for e, vector in enumerate(vectors)}
    frozen = pipe.unet.requires_grad_(False)
    state = State(frozen, lr=config.lr, optimizer="adam", seed=seed, named=named)

    def read(texts):
        with stand_in(pipe, [config.word], [vector[None] for vector in vectors]):
            return encode_prompts(pipe, texts)

    @torch.no_grad()
    def learned_probe():
        distinct = sorted(set(drawn))
        index = torch.tensor([distinct.index(text) for text in drawn])
        return replace(probe, conditioning=select(read(distinct), index))

    def learned_set(_):
        return replace(concept_set, conditioning=read(captions), prompts=captions)

    return Attack(state, learned_set, learned_probe, len(concept_set))


def check_word(word, captions, drawn, forget):
    """Raise ValueError unless exactly the captions and the forget prompts hold the word."""
    pairs = list(zip(drawn, forget, strict=True))
    for text in captions + [text for text, is_forget in pairs if is_forget]:
        if not holds(text, word):
            raise ValueError(
                f"{text!r} does not hold the word {word!r}, nothing could be learned: set "
                "concept_token to the concept's name in the captions"
            )
    for text in [text for text, is_forget in pairs if not is_forget]:
        if holds(text, word):
            raise ValueError(f"the prompt {text!r} holds the word {word!r}: choose another word")


@torch.no_grad()
def merge_back(unet, original, subset="x", amount=1.0):
    """Move weights of a subset back to the original's in place: θ + amount · (θ_0 − θ).

    original: θ_0, a state dict; for an attacker who has the model before unlearning. If only this
    subset was trained (ESD-x, UCE, RECE), 1 undoes the unlearning. Returns the UNet.
    """
    for name, p in trainable(unet, subset).items():
        p.lerp_(original[name].to(p), amount)
    return unet.requires_grad_(False)


def attackers_set(pipe, folder, attack="forget", *, prompts=0, drawn_images=0, sampling, cache):
    """Return the attacker's `ConceptSet`, of its `prompts` most frequent prompts only (0: all).

    attack: the set below <folder>/attacker. drawn_images: use so many images that the pipeline
    draws now, before it gets an unlearned model's weights: images in the original's own style. An
    attack that trains no weights needs them, since it finds only what the model can still draw.
    """
    encoded = encode_folder(pipe, Path(folder) / "attacker" / attack, cache)
    concept_set = with_prompts(encoded, prompts)
    if not drawn_images:
        return concept_set
    chosen = [concept_set.prompts[i] for i in concept_set.prompt.unique().tolist()]
    return drawn_set(pipe, chosen, drawn_images, DRAWN_SEED, *sampling, cache)


def choose(pipe, folder, probe, concept_set, config, sampling=Sampling(), cache=None):
    """Return a function of the attack seed that makes the `Attack` of a config.

    folder: the concept folder of `config.mixed_set` and `warmup_set`, such as "attacker/clean".
    Textual inversion learns `config.word` in place of the concept's name, concept inversion before
    each text. Raises ValueError as `AttackConfig.check` and the attacks do, FileNotFoundError for a
    missing set.
    """
    config.check()
    if config.kind == "dreambooth":
        return partial(dreambooth, pipe, concept_set, probe, config, sampling=sampling)
    if config.kind != "fine-tuning":
        rewrite = make_rewrite(probe, config)
        return partial(inversion, pipe, concept_set, probe, config, rewrite)

    def read(name):
        return encode_folder(pipe, Path(folder) / name, cache) if name else None

    sets = dict(mixed_set=read(config.mixed_set), warmup_set=read(config.warmup_set))
    return partial(fine_tuning, pipe, concept_set, probe, config, **sets)


def make_rewrite(probe, config):
    """Return text → text with the learned word; raises ValueError for a probe of several concepts."""
    forget = [item for item in probe.items if item["group"] == "forget"]
    names = sorted({item["expected"].split(":")[1] for item in forget})
    if len(names) != 1:
        raise ValueError(
            f"an inversion learns one word, the forget prompts expect {', '.join(names)}: choose "
            "another kind of attack"
        )

    def before(text):
        return f"{config.word} {text}"

    def in_place(text):
        return swapped(text, config.concept_token or names[0], config.word)

    return in_place if config.kind == "textual-inversion" else before
