"""Attacks by training: malicious fine-tuning in all its kinds, looked at on the way. (Attacks by prompts alone: `mu.attacks.search`.)

Full fine-tuning, of a subset, or of a LoRA; with other images mixed in, after a benign first phase, with DreamBooth's prior preservation; the vector of one word
(textual inversion); and, before any of these, the original's weights merged back. All take the step that the defence rehearsed, `mu.train.finetune`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mu.attacks.tokens import embeddings, holds, stand_in, swapped, words
from mu.concepts.probe import Probe
from mu.concepts.sets import ConceptSet, drawn_set, encode_folder, with_prompts
from mu.models import encode_prompts, select, trainable
from mu.sampling import images_per_batch
from mu.train import State


@dataclass(frozen=True)
class Attack:
    state: State  # what is trained
    concept_set: (
        ConceptSet | Callable[[int], ConceptSet]
    )  # the images, or a function of the steps done
    probe: Callable[[], Probe]  # how the attacker would draw, with what has been learned so far
    images: int  # different images that the attack uses
    others: ConceptSet | None = None  # images that the same steps also train on
    others_weight: float = 1.0
    passes: int = 0  # forward passes of the UNet that making it took


def fine_tuning(
    pipe,
    concept_set,
    probe,
    *,
    lr=2e-5,
    optimizer="adam",
    subset="f",
    rank=16,
    seed=0,
    others=None,
    others_weight=1.0,
    first=None,
    first_steps=0,
):
    """The `Attack` that trains weights of the UNet, L(θ; concept_set) + others_weight · L(θ; others) (`mu.train.finetune`).

    subset: "f" all, "x", "u", or "lora" of `rank`; optimizer: adam, adamw, sgd. others: benign images, mixed in so that what is related to the concept survives. first: a set on
    which the first `first_steps` of the steps train alone, so that whatever guards the concept is worn off before it is met. Raises as `State` does."""
    state = State(pipe.unet, subset, lr=lr, optimizer=optimizer, seed=seed, rank=rank)
    phases = (
        concept_set
        if first is None or not first_steps
        else lambda step: first if step < first_steps else concept_set
    )
    used = [
        concept_set,
        *(
            s
            for s, needed in ((others, others_weight), (first, first_steps))
            if s is not None and needed
        ),
    ]
    return Attack(state, phases, lambda: probe, sum(map(len, used)), others, others_weight)


def dreambooth(
    pipe,
    concept_set,
    probe,
    class_prompts,
    *,
    class_images=64,
    seed=0,
    guidance=5.0,
    sampling_steps=25,
    **options,
):
    """DreamBooth (Ruiz et al. 2023): `fine_tuning` with prior preservation, that is with `class_images` pictures of the concept's class as `others`, which the attacked model
    draws itself before it is trained, with seeds that are no probe's. The concept keeps its name: of a word that stands for nothing any more, a rare identifier is no better.

    Raises ValueError for no prompt."""
    if not class_prompts:
        raise ValueError(
            "prior preservation needs prompts of the concept's class, such as those of related concepts: class_prompts is empty"
        )
    drawn = drawn_set(pipe, class_prompts, class_images, 2000 + seed, guidance, sampling_steps)
    return replace(
        fine_tuning(pipe, concept_set, probe, seed=seed, others=drawn, **options),
        passes=sampling_steps * math.ceil(class_images / images_per_batch(pipe)),
    )


def learned_word(pipe, concept_set, probe, word, start, said, *, lr=5e-3, seed=0):
    """The `Attack` that changes no weight but trains one vector for each text encoder (Adam), which is read where `word` stands: textual inversion (Gal et al.
    2023). With the concept's images on an unlearned model it is concept inversion (Pham et al. 2024).

    word: a whole word of the vocabulary that is only a place; start: the one whose vector is the first value. said: text → the text with the word in it, as "a cat" →
    "a <word>", for the captions of the images and the forget prompts of the probe. Raises ValueError for what is no whole word, for a caption without the word, and for a word
    that another prompt of the probe holds."""
    known = words(pipe)
    for name in (word, start):
        if name not in known:
            raise ValueError(
                f"{name!r} is no word that the text encoder reads as one token: choose one of mu.attacks.tokens.words, such as {', '.join(known[:5])}"
            )
    texts = [said(text) for text in concept_set.prompts]
    drawn = [
        said(item["prompt"]) if item["group"] == "forget" else item["prompt"]
        for item in probe.items
    ]
    for text in [
        *texts,
        *(
            text
            for text, item in zip(drawn, probe.items, strict=False)
            if item["group"] == "forget"
        ),
    ]:
        if not holds(text, word):
            raise ValueError(
                f"{text!r} does not hold the word {word!r}, so that nothing of it could be learned: name the concept as its captions do (called)"
            )
    for text in [item["prompt"] for item in probe.items if item["group"] != "forget"]:
        if holds(text, word):
            raise ValueError(
                f"{text!r}, a prompt of the probe, holds the word {word!r}, and would be read otherwise once that is learned: choose another word"
            )
    named = {
        f"vector/{e}": table[0].clone().requires_grad_(True)
        for e, table in enumerate(embeddings(pipe, [start]))
    }
    state = State(pipe.unet.requires_grad_(False), lr=lr, optimizer="adam", seed=seed, named=named)

    def read(prompts):
        with stand_in(pipe, [word], [vector[None] for vector in named.values()]):
            return encode_prompts(pipe, prompts)

    @torch.no_grad()
    def as_learned():
        distinct = sorted(set(drawn))
        return replace(
            probe,
            conditioning=select(
                read(distinct), torch.tensor([distinct.index(text) for text in drawn])
            ),
        )

    return Attack(
        state,
        lambda _: replace(concept_set, conditioning=read(texts), prompts=texts),
        as_learned,
        len(concept_set),
    )


@torch.no_grad()
def merge_back(unet, original, subset="x", amount=1.0):
    """Weights of a subset moved back to the original's: θ + amount · (θ_0 − θ), in place; of an attacker who has the model before unlearning, too.

    original: its state dict. Where only that subset was trained (ESD-x, UCE, RECE), 1 undoes the unlearning without a step. Returns the UNet."""
    for name, p in trainable(unet, subset).items():
        p.lerp_(original[name].to(p), amount)
    return unet.requires_grad_(False)


KINDS = ("fine-tuning", "dreambooth", "textual-inversion", "concept-inversion")


def attackers_set(
    pipe,
    folder,
    attack="forget",
    prompts=0,
    drawn_images=0,
    cache=None,
    guidance=5.0,
    sampling_steps=25,
):
    """The attacker's `ConceptSet` `attack` of a concept's folder, of its `prompts` most frequent prompts only (0: all).

    drawn_images: instead of the set's images, so many that the pipeline draws of these prompts now: call it before the pipeline is given an unlearned model's weights, and the
    attacker has pictures in the very manner of the original. An attack that trains no weights needs them: it can only find what the model is still able to draw. Their seeds are no probe's."""
    concept_set = with_prompts(
        encode_folder(pipe, Path(folder) / f"attacker/{attack}", cache), prompts
    )
    if not drawn_images:
        return concept_set
    return drawn_set(
        pipe,
        [concept_set.prompts[i] for i in concept_set.prompt.unique().tolist()],
        drawn_images,
        1000,
        guidance,
        sampling_steps,
        cache,
    )


def choose(
    pipe,
    folder,
    probe,
    concept_set,
    kind="fine-tuning",
    *,
    others="",
    others_weight=1.0,
    first="",
    first_steps=0,
    class_images=64,
    word="",
    start="",
    called="",
    cache=None,
    guidance=5.0,
    sampling_steps=25,
    **options,
):
    """A function seed → `Attack`, from the words of a notebook: `kind` with a set of `attackers_set`.

    others, first: sets below the folder, such as "attacker/clean" or "defender/retain-related". DreamBooth's class is the related concepts of the probe. Textual inversion learns
    `word` in the place of the concept's name (`called`: what captions and forget prompts call it, where that is not what the probe expects), concept inversion before each text,
    from the vector of the word `start`. options: lr, and for the others optimizer, subset, rank. Raises ValueError for an unknown kind, for a part that it does not have, and as the
    attacks do; FileNotFoundError as `mu.concepts.sets.read_folder` does."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of attack {kind!r}: allowed are {', '.join(KINDS)}")
    if bool(first) != bool(first_steps):
        raise ValueError(
            f"a first phase needs a set and steps, got first={first!r}, first_steps={first_steps}: give both, or neither"
        )
    if kind != "fine-tuning" and (others or first):
        raise ValueError(
            f"others={others!r} and first={first!r} are parts of 'fine-tuning', {kind!r} has none: leave them empty"
        )

    def read(name):
        return encode_folder(pipe, Path(folder) / name, cache) if name else None

    names = {i["expected"].split(":")[1] for i in probe.items if i["group"] == "forget"}
    if kind.endswith("inversion"):
        if len(names) != 1:
            raise ValueError(
                f"an inversion learns one word, the probe's forget prompts expect {', '.join(sorted(names))}: choose another kind of attack"
            )
        (name,) = names
        said = (
            (lambda text: swapped(text, called or name, word))
            if kind == "textual-inversion"
            else (lambda text: f"{word} {text}")
        )
        return lambda seed: learned_word(
            pipe, concept_set, probe, word, start, said, lr=options["lr"], seed=seed
        )
    if kind == "dreambooth":
        related = sorted({i["prompt"] for i in probe.items if i["group"] == "related"})
        return lambda seed: dreambooth(
            pipe,
            concept_set,
            probe,
            related,
            class_images=class_images,
            seed=seed,
            others_weight=others_weight,
            guidance=guidance,
            sampling_steps=sampling_steps,
            **options,
        )
    mixed, benign = read(others), read(first)
    return lambda seed: fine_tuning(
        pipe,
        concept_set,
        probe,
        seed=seed,
        others=mixed,
        others_weight=others_weight,
        first=benign,
        first_steps=first_steps,
        **options,
    )
