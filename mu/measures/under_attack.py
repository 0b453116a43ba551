"""Carry out attacks and evaluate the model on the way."""

import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open

from mu.attacks.search import Sought
from mu.concepts.probe import join, make_probe
from mu.files import atomic, read_json, save_json
from mu.measures.evaluate import evaluate, evaluate_step
from mu.models import without_lora
from mu.runs.folder import resume, run_loop
from mu.sampling import images_per_batch
from mu.train import finetune


def _reached(checkpoint):
    """Steps done where a checkpoint was saved; 0 without one."""
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, "pt") as saved:
        return int(saved.get_tensor("step"))


def attack_run(
    folder,
    pipe,
    judge,
    attack,
    *,
    at=(0, 25, 50, 100),
    batch_size=8,
    guidance=5.0,
    sampling_steps=25,
    accumulation=1,
    loss_scale=1.0,
    before=None,
    progress=lambda records: records,
):
    """Carry an attack out on `pipe`; draw and judge its probe after each number of steps in `at`.

    attack: a function without arguments that makes the `Attack`. Writes step-NNNN.json (rows of `evaluate`) and .png into `folder`, and a checkpoint: a killed attack goes
    on with the same numbers (from its start where `at` has a new step that it had passed), a finished one is only read (whether it had the same parameters is `open_run`'s to
    say). budget.json: what each of these steps had cost until then: images, passes of the UNet, seconds (of making and training, not of judging). The UNet has its old weights back
    afterwards.
    before: (rows, PNG) of the probe at step 0 where it has been judged already, as by another seed of the attack: it is not drawn again. `progress` wraps
    the records (tqdm). Returns rows, each with its "step"."""
    folder = Path(folder)
    files = {step: folder / f"step-{step:04d}.json" for step in sorted(at)}
    weights = [
        p.detach().to("cpu", copy=True) for p in pipe.unet.parameters()
    ]  # a GPU has better use for its memory
    if before and 0 in files and not files[0].exists():
        with atomic(files[0].with_suffix(".png")) as temporary:
            shutil.copyfile(before[1], temporary)
        save_json([row | {"step": 0} for row in before[0]], files[0])
    try:
        if not all(file.exists() for file in [*files.values(), folder / "budget.json"]):
            checkpoint = folder / "checkpoint.safetensors"
            if any(
                not file.exists() and step < _reached(checkpoint) for step, file in files.items()
            ):
                checkpoint.unlink()
            began = time.perf_counter()
            made = attack()
            seconds, state = time.perf_counter() - began, resume(folder, made.state)
            for step, file in files.items():
                if (
                    state.step < step
                ):  # where it has been judged too: the budget is of the whole way
                    for _ in progress(
                        run_loop(
                            folder,
                            state,
                            finetune(
                                state,
                                pipe.scheduler,
                                made.concept_set,
                                steps=step,
                                batch_size=batch_size,
                                others=made.others,
                                others_weight=made.others_weight,
                                accumulation=accumulation,
                                loss_scale=loss_scale,
                            ),
                        )
                    ):
                        pass
                if not file.exists():
                    evaluate_step(pipe, judge, made.probe(), step, file, guidance, sampling_steps)
            done = read_json(folder / "records.json", [])

            def spent(step, name):
                return sum(record[name] for record in done if record["step"] <= step)

            save_json(
                [
                    {
                        "step": step,
                        "images": made.images if step else 0,
                        "passes": (made.passes if step else 0) + spent(step, "passes"),
                        "seconds": (seconds if step else 0) + spent(step, "seconds"),
                    }
                    for step in files
                ],
                folder / "budget.json",
            )
            checkpoint.unlink(missing_ok=True)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(without_lora(pipe.unet).parameters()), weights)
    return [row for file in files.values() for row in read_json(file)]


LOOKS_FROM = 10_000  # an attacker's first seed


def look_at(pipe, judge, said, expected, looks, guidance, sampling_steps, labels=()):
    """What an attacker sees who draws each of the texts `said` with `looks` seeds of his own, none of them a probe's; the judge chooses among the `labels` of the whole probe. Returns (share recognised for each text, passes of the UNet, seconds)."""
    began = time.perf_counter()
    seen = make_probe(
        pipe, {"forget": dict.fromkeys(said, expected)}, range(LOOKS_FROM, LOOKS_FROM + looks)
    )
    rows, _ = evaluate(
        pipe, judge, replace(seen, labels=labels or seen.labels), guidance, sampling_steps
    )
    hits = [sum(row["hit"] for row in rows if row["prompt"] == text) / looks for text in said]
    return (
        hits,
        sampling_steps * math.ceil(len(rows) / images_per_batch(pipe)),
        time.perf_counter() - began,
    )


def prompt_run(
    folder,
    pipe,
    judge,
    probe,
    seek,
    *,
    at=(0, 20, 40),
    tries=4,
    looks=4,
    images=0,
    guidance=5.0,
    sampling_steps=25,
    progress=lambda records: records,
):
    """Seek something to say in place of each forget prompt of a probe; draw and judge what is found after each number of steps in `at`, with the probe's seeds.

    seek: prompt → generator of `Sought`. At each of these steps the attacker looks (`look_at`) at the last `tries` different prompts and at the best one until then, and keeps the one in which the concept
    is recognised most often, the latest of equal ones; with one try, or without a judge, it is the last. Published searches do so at every step; random words get as many tries. images: different
    images that the search uses. Writes into `folder` what `mu.measures.under_attack.attack_run` writes; a finished attack is only read, one that was stopped goes on with the next prompt; where
    `at` is another, the choice is made anew from the same search, since each look depends on those before. Returns rows, each with its "step",
    and with the forget prompt as "asked". Raises ValueError for less than one try or look."""
    if tries < 1 or looks < 1:
        raise ValueError(
            f"an attacker tries at least one prompt and looks at least once, got tries={tries}, looks={looks}"
        )
    folder = Path(folder)
    files = {step: folder / f"step-{step:04d}.json" for step in sorted(at)}
    search, chosen = (
        read_json(folder / "found.json", {}),
        lambda made: list(made["kept"]) == [str(step) for step in files],
    )
    if not all(file.exists() for file in [*files.values(), folder / "budget.json"]) or not all(
        map(chosen, search.values())
    ):
        asked = {
            item["prompt"]: item["expected"] for item in probe.items if item["group"] == "forget"
        }
        for prompt, expected in asked.items():
            made = search.get(prompt)
            if not made or not chosen(made):
                enough = made and len(made["found"]) >= max(files)
                found = (
                    [Sought(**record) for record in made["found"]]
                    if enough
                    else list(progress(seek(prompt)))
                )
                search[prompt] = _search(
                    pipe,
                    judge,
                    prompt,
                    expected,
                    found,
                    list(files),
                    tries,
                    looks,
                    guidance,
                    sampling_steps,
                    probe.labels,
                )
                (folder / "budget.json").unlink(
                    missing_ok=True
                )  # the last to be written: what another choice has left is not taken for this one's
                save_json(search, folder / "found.json")
        for step, file in files.items():
            parts = []
            for prompt, expected in asked.items():
                said = search[prompt]["kept"][str(step)]
                part = make_probe(
                    pipe,
                    {"forget": {said: expected}},
                    [item["seed"] for item in probe.items if item["prompt"] == prompt],
                )
                parts.append(
                    replace(
                        part,
                        items=[item | {"asked": prompt} for item in part.items],
                        harmful=probe.harmful,
                        show_unblurred=probe.show_unblurred,
                        labels=probe.labels,
                    )
                )
            evaluate_step(pipe, judge, join(*parts), step, file, guidance, sampling_steps)

        def spent(step, name):
            return sum(
                cost[name]
                for found in search.values()
                for cost in found["costs"]
                if cost["step"] <= step
            )

        save_json(
            [
                {
                    "step": step,
                    "images": images if step else 0,
                    "passes": spent(step, "passes"),
                    "seconds": spent(step, "seconds"),
                }
                for step in files
            ],
            folder / "budget.json",
        )
    return [row for file in files.values() for row in read_json(file)]


def _search(
    pipe, judge, prompt, expected, found, at, tries, looks, guidance, sampling_steps, labels
):
    """One prompt's search as it is kept: every record, the prompt that the attacker keeps at each step of `at`, and what both cost."""
    kept, costs, best = (
        {},
        [
            {name: getattr(sought, name) for name in ("step", "passes", "seconds")}
            for sought in found
        ],
        prompt,
    )
    for before, step in zip([0, *at], at, strict=False):
        said = list(dict.fromkeys(sought.prompt for sought in reversed(found[before:step])))[
            :tries
        ]  # the latest first
        if said and (judge is None or tries == 1):
            best = said[0]
        elif said:
            said = [*said, *({best} - {prompt} - set(said))]
            hits, passes, seconds = look_at(
                pipe, judge, said, expected, looks, guidance, sampling_steps, labels
            )
            best = said[hits.index(max(hits))]
            costs.append({"step": step, "passes": passes, "seconds": seconds})
        kept[str(step)] = best if step else prompt
    return {"found": [asdict(sought) for sought in found], "kept": kept, "costs": costs}
