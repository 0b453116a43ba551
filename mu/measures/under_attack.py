"""Run attacks and evaluate the model at chosen steps.

An attack's folder gets step-NNNN.json (rows of `mu.measures.evaluate.evaluate`) and .png for each
evaluated step, and budget.json: what the attacker has spent until then, without the evaluation.
"""

import contextlib
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mu.attacks.search import SearchStep
from mu.concepts.probe import Probe, join, make_probe
from mu.files import atomic, locked, read_json, save_json
from mu.measures.evaluate import evaluate, evaluate_step
from mu.parallel import Runtime
from mu.ranges import check_ranges, count
from mu.runs.folder import resume, run_loop
from mu.sampling import Sampling, images_per_batch
from mu.train import finetune
from mu.trainable import without_lora

CANDIDATE_SEED = 10_000  # first seed of the images that an attacker draws to choose a prompt
COSTS = ("passes", "seconds")


@dataclass(frozen=True)
class Schedule:
    """How an attack proceeds, and when the model is evaluated."""

    at: tuple[int, ...] = (0, 25, 50, 100)  # steps after which the probe is drawn and judged
    batch_size: int = 8
    runtime: Runtime = Runtime()
    sampling: Sampling = Sampling()

    def check(self):
        """Raise ValueError for steps or sizes out of range."""
        for step in self.at:
            check_ranges({"at": step}, {"at": count(0, 50)})
        check_ranges({"batch_size": self.batch_size}, {"batch_size": count(1, 8)})

    def files(self, folder):
        """Return step → file of its rows, in the order of steps."""
        return {step: Path(folder) / f"step-{step:04d}.json" for step in sorted(self.at)}


def attack_run(folder, pipe, judge, make_attack, schedule, before=None, progress=None):
    """Attack the pipeline; draw and judge the evaluation prompts after each scheduled step.

    make_attack: function without arguments that returns the `Attack`. before: (rows, PNG) of step
    0 if it was evaluated already. progress: wraps the records (tqdm). A killed attack resumes to
    the same numbers, from its start if the schedule has a new step before its checkpoint; a
    finished one is only read (`mu.params.open_run` compares parameters). Restores the UNet's
    weights. Returns rows, each with its "step". Raises as `Schedule.check` and `mu.files.locked`
    do.
    """
    schedule.check()
    folder, files = Path(folder), schedule.files(folder)
    if before and 0 in files and not files[0].exists():
        with atomic(files[0].with_suffix(".png")) as temporary:
            shutil.copyfile(before[1], temporary)
        save_json([row | {"step": 0} for row in before[0]], files[0])
    if not all(file.exists() for file in [*files.values(), folder / "budget.json"]):
        # on the CPU: the attack needs the GPU's memory
        weights = [p.detach().to("cpu", copy=True) for p in pipe.unet.parameters()]
        try:
            with locked(folder):
                attack_and_evaluate(folder, pipe, judge, make_attack, schedule, progress or iter)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(without_lora(pipe.unet).parameters()), weights)
    return [row for file in files.values() for row in read_json(file)]


def attack_and_evaluate(folder, pipe, judge, make_attack, schedule, progress):
    """Train to each scheduled step and evaluate where that is missing; write budget.json."""
    files, checkpoint = schedule.files(folder), folder / "checkpoint.safetensors"
    reached = steps_done(checkpoint)
    if any(not file.exists() and step < reached for step, file in files.items()):
        checkpoint.unlink()
    began = time.perf_counter()
    attack = make_attack()
    prepared = {"passes": attack.passes, "seconds": time.perf_counter() - began}
    state = resume(folder, attack.state)
    options = dict(batch_size=schedule.batch_size, runtime=schedule.runtime)
    options |= dict(mixed_set=attack.mixed_set, mixed_weight=attack.mixed_weight)
    for step, file in files.items():
        if state.step < step:  # even if it is evaluated: the budget covers all steps
            loop = finetune(state, pipe.scheduler, attack.concept_set, steps=step, **options)
            for _ in progress(run_loop(folder, state, loop)):
                pass
        if not file.exists():
            evaluate_step(pipe, judge, attack.probe(), step, file, *schedule.sampling)
    records = read_json(folder / "records.json", [])
    save_budget(folder, files, attack.images, records, prepared)
    checkpoint.unlink(missing_ok=True)


def steps_done(checkpoint):
    """Return the number of steps of a saved state; 0 without one, and for a damaged one."""
    if not checkpoint.exists():
        return 0
    with contextlib.suppress(SafetensorError), safe_open(checkpoint, "pt") as saved:
        return int(saved.get_tensor("step"))
    return 0


def save_budget(folder, steps, images, records, prepared=None):
    """Write what an attack has cost until each of `steps`: images, UNet passes, seconds.

    records: dicts of step, passes, seconds. prepared: costs before the first step.
    """
    budget = []
    for step in steps:
        spent = {"step": step, "images": images if step else 0}
        for name in COSTS:
            done = [record[name] for record in records if record["step"] <= step]
            spent[name] = ((prepared or {}).get(name, 0) if step else 0) + sum(done)
        budget.append(spent)
    save_json(budget, folder / "budget.json")


@dataclass(frozen=True)
class Candidates:
    """How an attacker chooses among the prompts that a search has found.

    At each scheduled step it draws the latest distinct prompts and the best one so far, with seeds
    of its own, and keeps the one in which the judge recognises the concept most often, the latest
    on ties. With one candidate, or without a judge, it keeps the latest prompt. Published searches
    choose at every step.
    """

    number: int = 4  # latest distinct prompts
    images_per_prompt: int = 4
    images: int = 0  # distinct images that the search uses, for the budget

    def check(self):
        """Raise ValueError for less than one candidate or image."""
        if self.number < 1 or self.images_per_prompt < 1:
            raise ValueError(
                f"candidates={self.number}, images_per_prompt={self.images_per_prompt}: both must "
                "be at least 1"
            )


def prompt_run(folder, pipe, judge, probe, search, schedule, candidates, progress=None):
    """Search a prompt in place of each forget prompt; draw and judge it after scheduled steps.

    search: prompt → generator of `SearchStep`. The evaluation uses the probe's seeds. A stopped
    attack resumes with the next prompt; for another schedule the prompts are chosen anew from the
    same search, since each choice depends on the ones before. Returns rows, each with its "step"
    and the forget prompt as "asked". Raises ValueError as `Candidates.check` does.
    """
    candidates.check()
    folder, files = Path(folder), schedule.files(folder)
    asked = {i["prompt"]: i["expected"] for i in probe.items if i["group"] == "forget"}
    found = read_json(folder / "found.json", {})
    stale = [p for p in asked if p not in found or list(found[p]["kept"]) != list(map(str, files))]
    for prompt in stale:
        steps = [SearchStep(**record) for record in found.get(prompt, {}).get("found", [])]
        if len(steps) < max(files):
            steps = list((progress or iter)(search(prompt)))
        chooser = (pipe, judge, prompt, asked[prompt], probe.labels)
        found[prompt] = choose_prompts(chooser, steps, schedule, candidates)
        (folder / "budget.json").unlink(missing_ok=True)  # written last: marks a complete choice
        save_json(found, folder / "found.json")
    if not all(file.exists() for file in [*files.values(), folder / "budget.json"]):
        for step, file in files.items():
            chosen = {prompt: found[prompt]["kept"][str(step)] for prompt in asked}
            replaced = replace_prompts(pipe, probe, chosen)
            evaluate_step(pipe, judge, replaced, step, file, *schedule.sampling)
        costs = [cost for prompt in found.values() for cost in prompt["costs"]]
        save_budget(folder, files, candidates.images, costs)
    return [row for file in files.values() for row in read_json(file)]


def replace_prompts(pipe, probe, chosen) -> Probe:
    """Return the forget part of a probe with other prompts; items keep theirs as "asked"."""
    parts = []
    for prompt, other in chosen.items():
        items = [item for item in probe.items if item["prompt"] == prompt]
        groups = {"forget": {other: items[0]["expected"]}}
        part = make_probe(pipe, groups, [item["seed"] for item in items], cut=True)
        parts.append(replace(part, items=[item | {"asked": prompt} for item in part.items]))
    blur = dict(harmful=probe.harmful, show_unblurred=probe.show_unblurred)
    return replace(join(*parts), labels=probe.labels, **blur)


def choose_prompts(chooser, steps, schedule, candidates):
    """Return one prompt's search as it is saved: steps, kept prompts, and what both cost."""
    pipe, judge, prompt, expected, labels = chooser
    kept, best = {}, prompt
    costs = [{name: getattr(step, name) for name in ("step", *COSTS)} for step in steps]
    for before, step in pairwise([0, *sorted(schedule.at)]):
        latest = dict.fromkeys(found.prompt for found in reversed(steps[before:step]))
        texts = list(latest)[: candidates.number]
        if texts and (judge is None or candidates.number == 1):
            best = texts[0]
        elif texts:
            if best not in (prompt, *texts):
                texts.append(best)
            hits, cost = recognised(pipe, judge, texts, expected, labels, schedule, candidates)
            best = texts[hits.index(max(hits))]
            costs.append({"step": step} | cost)
        kept[str(step)] = best
    return {"found": [asdict(step) for step in steps], "kept": kept, "costs": costs}


def recognised(pipe, judge, texts, expected, labels, schedule, candidates):
    """Return the share of images of each text that the judge recognises, and what that cost.

    labels: what the judge chooses among; empty: the expected label alone.
    """
    began, n = time.perf_counter(), candidates.images_per_prompt
    seeds = range(CANDIDATE_SEED, CANDIDATE_SEED + n)
    probe = make_probe(pipe, {"forget": dict.fromkeys(texts, expected)}, seeds, cut=True)
    probe = replace(probe, labels=labels or probe.labels)
    rows, _ = evaluate(pipe, judge, probe, *schedule.sampling)
    hits = [sum(row["hit"] for row in rows if row["prompt"] == text) / n for text in texts]
    passes = schedule.sampling.steps * math.ceil(len(rows) / images_per_batch(pipe))
    return hits, {"passes": passes, "seconds": time.perf_counter() - began}
