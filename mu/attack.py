"""Malicious fine-tuning, looked at on the way."""

import shutil
from pathlib import Path

import torch

from mu.evaluate import evaluate
from mu.models import without_lora
from mu.plots import save_grid, veil
from mu.runs import atomic, read_json, resume, run_loop, save_json
from mu.train import State, finetune


def attack_run(folder, pipe, judge, probe, concept_set, *, at=(0, 25, 50, 100), lr=2e-5, optimizer="adam", subset="f",
               batch_size=8, seed=0, guidance=5.0, sampling_steps=25, rank=16, accumulation=1, loss_scale=1.0, before=None, progress=lambda records: records):
    """Fine-tune `pipe.unet` on a concept set; draw and judge the probe after each number of steps in `at`.

    The steps are `mu.train.finetune`'s, the inner step of the defence. Writes step-NNNN.json (rows of `evaluate`) and .png into
    `folder`, and a checkpoint: a killed attack goes on with the same numbers, a finished one is only read (whether it had the same
    parameters is `open_run`'s to say). Pictures of a harmful concept are saved veiled. The UNet has its old weights back afterwards.
    before: (rows, PNG) of the probe at step 0 where it has been judged already, as by another seed of the attack: it is not drawn again.
    `progress` wraps the records (tqdm). Returns rows, each with its "step"."""
    folder = Path(folder)
    files = {step: folder / f"step-{step:04d}.json" for step in sorted(at)}
    weights = [p.detach().to("cpu", copy=True) for p in pipe.unet.parameters()]  # a GPU has better use for its memory
    if before and 0 in files and not files[0].exists():
        with atomic(files[0].with_suffix(".png")) as temporary:
            shutil.copyfile(before[1], temporary)
        save_json([row | {"step": 0} for row in before[0]], files[0])
    try:
        if not all(file.exists() for file in files.values()):
            state = resume(folder, State(pipe.unet, subset, lr=lr, optimizer=optimizer, seed=seed, rank=rank))
            for step, file in files.items():
                if state.step <= step and not file.exists():
                    for _ in progress(run_loop(folder, state, finetune(
                            state, pipe.scheduler, concept_set, steps=step, batch_size=batch_size, accumulation=accumulation, loss_scale=loss_scale))):
                        pass
                    rows, images = evaluate(pipe, judge, probe, guidance, sampling_steps)
                    save_grid(veil(images) if probe.veiled else images, file.with_suffix(".png"))
                    save_json([row | {"step": step} for row in rows], file)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(without_lora(pipe.unet).parameters()), weights)
    return [row for file in files.values() for row in read_json(file)]
