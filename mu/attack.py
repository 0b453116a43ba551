"""Malicious fine-tuning, looked at on the way."""

import torch

from mu.evaluate import evaluate
from mu.runs import resume, run_loop
from mu.train import State, finetune


def attack_curve(pipe, judge, probe, concept_set, *, at=(0, 25, 50, 100), lr=2e-5, optimizer="adam", subset="f",
                 batch_size=8, seed=0, guidance=5.0, sampling_steps=25, folder=None, progress=lambda records: records):
    """Fine-tune `pipe.unet` on a concept set and draw the probe after each number of steps in `at`.

    The steps are `mu.train.finetune`'s, the inner step of the defence. Yields (step, rows of `evaluate`, images); the UNet has its
    old weights back when the generator ends. `folder` keeps checkpoints, so that a killed attack goes on with the same numbers.
    `progress` wraps the records (tqdm)."""
    before = [p.detach().clone() for p in pipe.unet.parameters()]
    state = State(pipe.unet, subset, lr=lr, optimizer=optimizer, seed=seed)
    if folder:
        resume(folder, state)
    try:
        for step in sorted(s for s in at if s >= state.step):
            records = finetune(state, pipe.scheduler, concept_set, steps=step, batch_size=batch_size)
            for _ in progress(run_loop(folder, state, records) if folder else records):
                pass
            yield step, *evaluate(pipe, judge, probe, guidance, sampling_steps)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(pipe.unet.parameters()), before)
