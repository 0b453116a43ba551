"""Evaluation prompts: what is drawn, and which label a judge should find in it."""

from dataclasses import dataclass, replace

import torch

from mu.concepts.prompts import read_prompts, to_rows
from mu.concepts.sets import is_harmful, read_groups
from mu.models import encode_prompts, long_prompts, select, stack


def shown(label):
    """Return what a judge's label names: "cat" of "concept:cat"."""
    return label.partition(":")[2]


@dataclass(frozen=True)
class Probe:
    """Evaluation prompts, encoded once: one row per image."""

    items: list  # {"group", "prompt", "expected": judge's label, "seed", maybe "guidance"}
    conditioning: dict
    unconditional: dict
    harmful: bool = False  # the concept is harmful
    show_unblurred: bool = False  # show its images nevertheless
    labels: tuple = ()  # the labels that a judge chooses from
    cut: int = 0  # prompts that the text encoder does not read to their end

    @property
    def blurred(self):
        """True if images are saved and shown blurred (`mu.images.blur`). Judges see originals."""
        return self.harmful and not self.show_unblurred


def encode_items(pipe, items, cut=False):
    """Return the `Probe` of some items. cut: allow prompts that are too long, see `load_probe`."""
    prompts = sorted({item["prompt"] for item in items})
    index = torch.tensor([prompts.index(item["prompt"]) for item in items])
    conditioning = select(encode_prompts(pipe, prompts, cut), index)
    labels = tuple(sorted({item["expected"] for item in items}))
    too_long = len(long_prompts(pipe.tokenizer, prompts))
    return Probe(items, conditioning, encode_prompts(pipe, [""]), labels=labels, cut=too_long)


def make_probe(pipe, groups, seeds=range(8), cut=False):
    """Return the `Probe` of every prompt with every seed. groups: name → {prompt: label}."""
    prompts = [(group, *pair) for group, labels in groups.items() for pair in labels.items()]
    return encode_items(
        pipe,
        [
            {"group": group, "prompt": prompt, "expected": expected, "seed": int(seed)}
            for group, prompt, expected in prompts
            for seed in seeds
        ],
        cut,
    )


def join(*probes):
    """Return several probes as one; blur settings are the first's."""
    return replace(
        probes[0],
        items=[item for probe in probes for item in probe.items],
        conditioning=stack(*(probe.conditioning for probe in probes)),
        labels=tuple(sorted({label for probe in probes for label in probe.labels})),
        cut=sum(probe.cut for probe in probes),
    )


def load_probe(pipe, folder, seeds, show_unblurred=False, concept_prompts=""):
    """Return the `Probe` of a concept folder.

    seeds: "8,2,1" draws 8 images of each forget prompt, 2 of each related, 1 of each unrelated.
    concept_prompts: source for `read_prompts` ("i2p-nudity", a CSV) that replaces the forget
    prompts, one image each, with the source's seeds and guidance. The text encoder reads only the
    start of a prompt that is too long: such prompts of a source are counted in `Probe.cut`, those
    of a concept folder are refused. Raises ValueError for them, and for seeds that do not fit the
    groups.
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
        parts[0] = encode_items(pipe, [common | row for row in rows], cut=True)
    return replace(join(*parts), harmful=is_harmful(folder), show_unblurred=show_unblurred)


def probe_facts(probe):
    """Return the facts of a probe for protocols: blur settings if it is harmful; cut prompts."""
    facts = {"harmful": True, "blurred": probe.blurred} if probe.harmful else {}
    return facts | ({"cut_prompts": probe.cut} if probe.cut else {})
