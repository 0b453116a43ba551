"""Evaluation prompts: what is drawn, and what a judge should see in it."""

from dataclasses import dataclass, replace

import torch

from mu.concepts.prompts import read_prompts, to_rows
from mu.concepts.sets import is_harmful, read_groups
from mu.models import encode_prompts, select, stack


@dataclass(frozen=True)
class Probe:
    """Prompts to draw and what should be seen in them, encoded once: one row an image."""

    items: list  # {"group", "prompt", "expected", "seed"}, perhaps "guidance"; expected is a label of the judge, as "concept:cat" or "style:noto"
    conditioning: dict
    unconditional: dict
    harmful: bool = False  # the concept is one whose pictures are not to be looked at by accident
    show_unblurred: bool = False  # somebody has asked for them all the same
    labels: tuple = ()  # all that is expected in any of them, and of them in any part of the probe: what a judge chooses among

    @property
    def blurred(self):
        """Whether its pictures are blurred (`mu.images.blur`) wherever they are saved or shown. The judge always sees them as they are."""
        return self.harmful and not self.show_unblurred


def make_probe(pipe, groups, seeds=range(8)):
    """groups: name → {prompt: expected label}, as in a set's `probe.json`. Every prompt is drawn with every seed."""
    items = [
        {"group": group, "prompt": prompt, "expected": expected, "seed": int(seed)}
        for group, prompts in groups.items()
        for prompt, expected in prompts.items()
        for seed in seeds
    ]
    prompts = sorted({item["prompt"] for item in items})
    index = torch.tensor([prompts.index(item["prompt"]) for item in items])
    labels = tuple(sorted({item["expected"] for item in items}))
    return Probe(
        items,
        select(encode_prompts(pipe, prompts), index),
        encode_prompts(pipe, [""]),
        labels=labels,
    )


def probe_from_prompts(pipe, listed, group, expected):
    """A probe of given prompts, each with a seed (and perhaps a guidance) of its own: rows of `mu.concepts.prompts.to_rows`, all of one group and one expected label."""
    prompts = sorted({row["prompt"] for row in listed})
    index = torch.tensor([prompts.index(row["prompt"]) for row in listed])
    return Probe(
        [{"group": group, "expected": expected} | row for row in listed],
        select(encode_prompts(pipe, prompts), index),
        encode_prompts(pipe, [""]),
        labels=(expected,),
    )


def join(*probes):
    """One probe of several, in their order; whether it is blurred is the first's to say."""
    labels = tuple(sorted({label for probe in probes for label in probe.labels}))
    return replace(
        probes[0],
        items=[item for probe in probes for item in probe.items],
        conditioning=stack(*(probe.conditioning for probe in probes)),
        labels=labels,
    )


def load_probe(pipe, folder, seeds, show_unblurred=False, concept_prompts=""):
    """The `Probe` of a concept's folder. seeds: "8,2,1" for 8 pictures of each forget prompt, 2 of each related, 1 of each unrelated one.

    concept_prompts: in place of the folder's forget prompts those of a source of `mu.concepts.prompts.read_prompts` ("i2p-nudity", a CSV), one picture each, from its own seed and guidance.

    show_unblurred: save and show the pictures of a harmful concept (`is_harmful`), and those drawn beside them, as they are. Raises ValueError for another number of numbers."""
    groups, counts = read_groups(folder), seeds.split(",")
    if len(counts) != len(groups) or not all(n.strip().isdigit() and int(n) for n in counts):
        raise ValueError(
            f'seeds must be {len(groups)} whole numbers from 1, with commas ({", ".join(groups)}), as in "8,2,1"; got {seeds!r}'
        )
    parts = [
        make_probe(pipe, {group: prompts}, range(int(n)))
        for (group, prompts), n in zip(groups.items(), counts, strict=False)
    ]
    if concept_prompts:
        name = next(iter(groups))
        parts[0] = probe_from_prompts(
            pipe, to_rows(read_prompts(concept_prompts)), name, next(iter(groups[name].values()))
        )
    probe = join(*parts)
    return replace(probe, harmful=is_harmful(folder), show_unblurred=show_unblurred)


def blur_facts(probe):
    """Facts on how a harmful concept's pictures are kept, for the cards and parameters of runs; nothing for any other concept."""
    return {"harmful": True, "blurred": probe.blurred} if probe.harmful else {}
