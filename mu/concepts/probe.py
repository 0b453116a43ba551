"""Evaluation prompts: what is drawn, and which label a judge should find in it."""

from dataclasses import dataclass, replace

import torch

from mu.concepts.prompts import read_prompts, to_rows
from mu.concepts.sets import is_harmful, read_groups
from mu.models import encode_prompts, select, stack


@dataclass(frozen=True)
class Probe:
    """Evaluation prompts, encoded once: one row per image."""

    items: list  # {"group", "prompt", "expected": judge's label, "seed", maybe "guidance"}
    conditioning: dict
    unconditional: dict
    harmful: bool = False  # the concept is harmful
    show_unblurred: bool = False  # show its images nevertheless
    labels: tuple = ()  # the labels that a judge chooses from

    @property
    def blurred(self):
        """True if images are saved and shown blurred (`mu.images.blur`). Judges see originals."""
        return self.harmful and not self.show_unblurred


def encode_items(pipe, items):
    """Return the `Probe` of some items."""
    prompts = sorted({item["prompt"] for item in items})
    index = torch.tensor([prompts.index(item["prompt"]) for item in items])
    conditioning = select(encode_prompts(pipe, prompts), index)
    labels = tuple(sorted({item["expected"] for item in items}))
    return Probe(items, conditioning, encode_prompts(pipe, [""]), labels=labels)


def make_probe(pipe, groups, seeds=range(8)):
    """Return the `Probe` of every prompt with every seed. groups: name → {prompt: label}."""
    prompts = [(group, *pair) for group, labels in groups.items() for pair in labels.items()]
    return encode_items(
        pipe,
        [
            {"group": group, "prompt": prompt, "expected": expected, "seed": int(seed)}
            for group, prompt, expected in prompts
            for seed in seeds
        ],
    )


def join(*probes):
    """Return several probes as one; blur settings are the first's."""
    return replace(
        probes[0],
        items=[item for probe in probes for item in probe.items],
        conditioning=stack(*(probe.conditioning for probe in probes)),
        labels=tuple(sorted({label for probe in probes for label in probe.labels})),
    )


def load_probe(pipe, folder, seeds, show_unblurred=False, concept_prompts=""):
    """Return the `Probe` of a concept folder.

    seeds: "8,2,1" draws 8 images of each forget prompt, 2 of each related, 1 of each unrelated.
    concept_prompts: source for `read_prompts` ("i2p-nudity", a CSV) that replaces the forget
    prompts, one image each, with the source's seeds and guidance. Raises ValueError for seeds that
    do not fit the groups.
    """
    groups, counts = read_groups(folder), seeds.split(",")
    if len(counts) != len(groups) or not all(n.strip().isdigit() and int(n) for n in counts):
        names = ", ".join(groups)
        raise ValueError(f"seeds needs one positive integer for each of {names}, got {seeds!r}")
    parts = [
        make_probe(pipe, {group: prompts}, range(int(n)))
        for (group, prompts), n in zip(groups.items(), counts, strict=True)
    ]
    if concept_prompts:
        group, prompts = next(iter(groups.items()))
        common = {"group": group, "expected": next(iter(prompts.values()))}
        rows = to_rows(read_prompts(concept_prompts))
        parts[0] = encode_items(pipe, [common | row for row in rows])
    return replace(join(*parts), harmful=is_harmful(folder), show_unblurred=show_unblurred)


def blur_facts(probe):
    """Return the blur settings of a harmful concept for protocols; {} for any other."""
    return {"harmful": True, "blurred": probe.blurred} if probe.harmful else {}
