"""Attacks by training: fine-tuning in all its variants, DreamBooth and textual inversion.

All take the optimizer step that the defence simulates (`mu.train.finetune`). `merge_back` restores
original weights before any of them. Attacks by prompts: `mu.attacks.search`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mu.attacks import tokens
from mu.concepts.probe import Probe, shown
from mu.concepts.sets import ConceptSet, drawn_set, encode_folder, with_prompts
from mu.models import encode_prompts, select
from mu.ranges import NOT_NEGATIVE, check_ranges, count, positive
from mu.sampling import Sampling, images_per_batch
from mu.state import State
from mu.trainable import trainable

KINDS = ("fine-tuning", "dreambooth", "textual-inversion", "concept-inversion")
DRAWN_SEED, CLASS_SEED = 1000, 2000  # of attackers' images: evaluation uses other seeds


RANGES = {
    "lr": positive(6e-5),
    "rank": count(1, 16),
    "mixed_weight": NOT_NEGATIVE,
    "warmup_steps": count(0, 0),
    "class_images": count(1, 64),
}


@dataclass(frozen=True)
class AttackConfig:
    """An attack by training (`choose`), as a notebook's parameters describe it."""

    kind: str = "fine-tuning"  # one of KINDS
    lr: float = 6e-5
    optimizer: str = "adam"  # adam, adamw or sgd; inversions use adam
    subset: str = "f"  # weights to train: x, u, f (all) or lora
    rank: int = 16  # of subset lora
    mixed_set: str = ""  # set below the concept folder, mixed into every step
    mixed_weight: float = 1.0  # of its loss, or of DreamBooth's prior preservation
    warmup_set: str = ""  # set below the concept folder that the first steps train on alone
    warmup_steps: int = 0
    class_images: int = 64  # images of related concepts that DreamBooth draws and preserves
    word: str = ""  # inversions learn its embedding
    init_word: str = ""  # its embedding is the initial value
    concept_token: str = ""  # the concept's word in captions and prompts; empty: the expected label

    def check(self):
        """Raise ValueError for settings out of range, or that do not belong together."""
        check_ranges(vars(self), RANGES)
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
    """What to train, on which images, and how to evaluate it."""

    state: State
    concept_set: Callable[[int], ConceptSet]  # steps done → training images
    probe: Callable[[], Probe]  # evaluation prompts, encoded with what has been learned so far
    images: int  # distinct training images
    mixed_set: ConceptSet | None = None  # images that each step also trains on
    mixed_weight: float = 1.0
    passes: int = 0  # forward passes of the UNet before the first step


def fine_tuning(pipe, concept_set, probe, config, seed=0, mixed_set=None, warmup_set=None):
    """Return the `Attack` that trains L(θ; concept_set) + mixed_weight · L(θ; mixed_set).

    mixed_set: benign images, which preserve related concepts. warmup_set: benign images that the
    first `warmup_steps` train on alone, to wear off a defence. Raises as `State` does.
    """
    options = config.subset, config.lr, config.optimizer
    state = State(pipe.unet, *options, seed=seed, rank=config.rank)
    mixed_set = mixed_set if config.mixed_weight else None
    warmup_set = warmup_set if config.warmup_steps else None

    def training_set(step):
        warming_up = warmup_set is not None and step < config.warmup_steps
        return warmup_set if warming_up else concept_set

    used = [part for part in (concept_set, mixed_set, warmup_set) if part is not None]
    images = sum(map(len, used))
    return Attack(state, training_set, lambda: probe, images, mixed_set, config.mixed_weight)


def dreambooth(pipe, concept_set, probe, config, seed=0, sampling=Sampling()):
    """Return DreamBooth (Ruiz et al. 2023) as an `Attack`: `fine_tuning` with prior preservation.

    The attacked model first draws the class images, of related concepts. The concept keeps its
    name: after unlearning, a rare identifier has no advantage. Raises ValueError if the probe has
    no related prompts.
    """
    prompts = sorted({item["prompt"] for item in probe.items if item["group"] == "related"})
    if not prompts:
        raise ValueError("the probe has no related prompts: dreambooth needs them as its class")
    drawn = drawn_set(pipe, prompts, config.class_images, CLASS_SEED + seed, *sampling)
    attack = fine_tuning(pipe, concept_set, probe, config, seed, mixed_set=drawn)
    batches = math.ceil(config.class_images / images_per_batch(pipe))
    return replace(attack, passes=sampling.steps * batches)


def inversion(pipe, concept_set, probe, config, rewrite, seed=0):
    """Return the `Attack` that trains one embedding per text encoder (Adam) and no weight.

    Textual inversion (Gal et al. 2023); on an unlearned model, concept inversion (Pham et al.
    2024). The embedding replaces that of `config.word`. rewrite: text → text with that word, for
    captions and forget prompts. Raises ValueError for a word that is not one token, for a caption
    without it, and if another evaluation prompt contains it.
    """
    known = tokens.words(pipe)
    for name in (config.word, config.init_word):
        if name not in known:
            raise ValueError(
                f"{name!r} is not one token of the text encoder: choose a word such as "
                f"{', '.join(known[:5])} (mu.attacks.tokens.words)"
            )
    word = config.word
    captions = [rewrite(text) for text in concept_set.prompts]
    forget = {i["prompt"]: rewrite(i["prompt"]) for i in probe.items if i["group"] == "forget"}
    prompts = [forget.get(item["prompt"], item["prompt"]) for item in probe.items]
    for text in [*captions, *forget.values()]:
        tokens.require_word(text, word)
    for text in [item["prompt"] for item in probe.items if item["prompt"] not in forget]:
        if tokens.contains_word(text, word):
            raise ValueError(f"the prompt {text!r} contains the word {word!r}: choose another word")
    tables = tokens.embeddings(pipe, [config.init_word])
    vectors = [table[0].clone().requires_grad_(True) for table in tables]
    named = {f"vector/{e}": vector for e, vector in enumerate(vectors)}
    frozen = pipe.unet.requires_grad_(False)
    state = State(frozen, lr=config.lr, optimizer="adam", seed=seed, named=named)

    def encode(texts):
        with tokens.replaced_embeddings(pipe, [word], [vector[None] for vector in vectors]):
            return encode_prompts(pipe, texts, cut=True)  # of a list, see `load_probe`

    @torch.no_grad()
    def learned_probe():
        distinct = sorted(set(prompts))
        index = torch.tensor([distinct.index(text) for text in prompts])
        return replace(probe, conditioning=select(encode(distinct), index))

    def training_set(_):
        return replace(concept_set, conditioning=encode(captions), prompts=captions)

    return Attack(state, training_set, learned_probe, len(concept_set))


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
    """Return the `ConceptSet` <folder>/attacker/<attack>, with its `prompts` most frequent prompts.

    prompts: 0 for all. drawn_images: instead, use that many images that the pipeline draws of
    these prompts. Call it before loading unlearned weights: attacks that train no weights need
    images in the original's own style.
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
    Textual inversion replaces the concept's name by `config.word`, concept inversion puts it in
    front of each text. Raises ValueError as `AttackConfig.check` and the attacks do,
    FileNotFoundError for a missing set.
    """
    config.check()
    if config.kind == "dreambooth":
        return partial(dreambooth, pipe, concept_set, probe, config, sampling=sampling)
    if config.kind != "fine-tuning":
        rewrite = make_rewrite(probe, config)
        return partial(inversion, pipe, concept_set, probe, config, rewrite)

    names = {"mixed_set": config.mixed_set, "warmup_set": config.warmup_set}
    paths = {name: Path(folder) / path for name, path in names.items() if path}
    sets = {name: encode_folder(pipe, path, cache) for name, path in paths.items()}
    return partial(fine_tuning, pipe, concept_set, probe, config, **sets)


def make_rewrite(probe, config):
    """Return the function text → text with the word. Raises ValueError for several concepts."""
    forget = [item for item in probe.items if item["group"] == "forget"]
    names = sorted({shown(item["expected"]) for item in forget})
    if len(names) != 1:
        raise ValueError(
            f"an inversion learns one word, the forget prompts expect {', '.join(names)}: choose "
            "another kind of attack"
        )
    if config.kind == "concept-inversion":
        return lambda text: f"{config.word} {text}"
    return lambda text: tokens.replace_word(text, config.concept_token or names[0], config.word)
