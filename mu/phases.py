"""Train in phases: each has its own objective, and ends by steps or by what the attack does."""

from dataclasses import dataclass, replace

import torch

from mu.draws import Data
from mu.objective import Objective
from mu.parallel import Runtime
from mu.state import Best, State
from mu.train import unlearn
from mu.validation import Validation, Validator


@dataclass(frozen=True)
class Phase:
    """A part of a training."""

    name: str
    steps: int  # at most
    objective: Objective
    lr: float
    until: float = 0.0  # related share lost to a validation's attacks that ends it; 0: all steps
    patience: int = 0  # steps without a better score after which it is given up; 0: never
    anneal: bool = False  # lower the learning rate linearly to 0
    from_best: bool = False  # start from the best average of the phases before


def phase_end(state, phases):
    """Return the step number at which the present phase ends at the latest."""
    return state.phase_start + phases[state.phase].steps


def set_learning_rate(state, phases):
    """Give the optimizer the learning rate of the next step."""
    phase = phases[state.phase]
    left = (phase_end(state, phases) - state.step) / phase.steps
    for group in state.optimizer.param_groups:
        group["lr"] = phase.lr * (left if phase.anneal else 1.0)


def keep_best(state, score):
    """Keep the averaged weights if no validation before has scored higher."""
    if state.best is None or score > state.best.score:
        source = state.ema.shadow_params if state.ema else state.parameters
        state.best = Best(score, state.step, [p.detach().clone() for p in source])


def ends_phase(state, phases, lost):
    """Return whether this step ends its phase; if so, start the next one.

    Without patience, that is the next one that starts from the best average, if there is one.
    lost: share of related pictures lost to the attacks of this step's validation, or None.
    """
    phase = phases[state.phase]
    since = state.step - max(state.best.step if state.best else 0, state.phase_start)
    reached = lost is not None and 0 < phase.until <= lost
    stalled = lost is not None and 0 < phase.patience <= since and not reached
    if not (reached or stalled or state.step == phase_end(state, phases)):
        return False
    later = range(state.phase + 1, len(phases))
    healing = [i for i in later if phases[i].from_best]
    state.phase = next(iter(healing if stalled else later), len(phases))
    state.phase_start = state.step
    if state.phase in healing:
        state.restart_from_best()
    return True


def restart_lost(pool, cosines, below):
    """Let members start anew whose displacement no fresh attack follows any more."""
    for slot, value in cosines.items():
        if slot.startswith("forget") and pool[slot].steps >= 15 and value < below:
            pool[slot].finish()


def unlearn_in_phases(
    state: State,
    unet_frozen: torch.nn.Module | None,
    noise_scheduler,
    data: Data,
    phases: list[Phase],
    *,
    validation: Validation = Validation(),
    runtime: Runtime = Runtime(),
):
    """Run `mu.train.unlearn` for one phase after the other; yields its records.

    Every `validation.every` steps of a phase with simulated attackers, or from the best average,
    fresh attacks run, and what they find joins the losses of the record, with the number of the
    phase. A phase ends when these attacks lose enough related pictures, after its steps, or with
    its patience. The result is the average that validates best (`mu.validation.Found.score`):
    `State.release`.
    """
    fixed = (unet_frozen, noise_scheduler, data)
    validation.check(runtime)
    validator = Validator(state, *fixed, validation, runtime)
    while state.phase < len(phases):
        phase, end = phases[state.phase], phase_end(state, phases)
        set_learning_rate(state, phases)
        validated = validation.every and (phase.objective.simulates or phase.from_best)
        for record in unlearn(state, *fixed, phase.objective, steps=end, runtime=runtime):
            lost = None
            if validated and state.step % validation.every == 0:
                found = validator.validate()
                shares = validation.lost, validation.harmed
                lost = found.lost("related", validation.lost)
                keep_best(state, found.score(*shares))
                restart_lost(state.pool, found.cosines, phase.objective.inner.restart_below)
                own = {"validation phase": state.phase}
                losses = record.losses | found.losses(*shares) | own
                record = replace(record, losses=losses, passes=record.passes + found.passes)
            # before the record is seen: a checkpoint of this step starts the next phase
            ends = ends_phase(state, phases, lost)
            yield record
            if ends:
                break
            set_learning_rate(state, phases)
