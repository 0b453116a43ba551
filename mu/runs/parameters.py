"""Parameters of a training: the flat names of notebooks, and the dataclasses behind them.

Every default has its home in a dataclass: `Training` here, the others in `mu.objective`,
`mu.attackers`, `mu.controls` and `mu.sampling`.
"""

import math
from dataclasses import asdict, dataclass, fields, replace

from mu.attackers import Inner
from mu.controls import Controls
from mu.objective import META, Objective, Weights
from mu.parallel import Runtime
from mu.phases import Phase
from mu.ranges import ANY, NOT_NEGATIVE, SHARE, Range, check_ranges, count, positive
from mu.runs.folder import with_digests
from mu.sampling import Trajectory
from mu.targets import ESD, SDD
from mu.validation import Validation

# method → loss of the loop (None: a closed form comes first, then the meta terms alone), subset
METHODS = {
    "esd-x": ("esd", "x"),
    "esd-u": ("esd", "u"),
    "esd-f": ("esd", "f"),
    "sdd": ("sdd", "x"),
    "uce": (None, "f"),
    "rece": (None, "f"),
}
# flat name → (dataclass, field)
FLAT = {
    **{field.name: (Weights, field.name) for field in fields(Weights)},
    "eta": (ESD, "eta"),
    "batch_size": (ESD, "batch_size"),
    "guidance": (Trajectory, "guidance"),
    "trajectory_steps": (Trajectory, "steps"),
    "trajectory_reuse": (Trajectory, "reuse"),
    "inner_steps": (Inner, "steps"),
    "inner_lr": (Inner, "lr"),
    "inner_optimizer": (Inner, "optimizer"),
    "inner_batch_size": (Inner, "batch_size"),
    "order": (Inner, "order"),
    "bound": (Inner, "bound"),
    "image_bound": (Inner, "image_bound"),
    "horizon": (Inner, "horizon"),
    "pool": (Inner, "pool"),
    "one_prompt": (Inner, "one_prompt"),
    "restart_below": (Inner, "restart_below"),
    "restart_above": (Inner, "restart_above"),
    "head_start": (Inner, "head_start"),
    "inner_rank": (Inner, "rank"),
    "lora_lr": (Inner, "lora_lr"),
    **{field.name: (Controls, field.name) for field in fields(Controls)},
    "clean_every": (Objective, "clean_every"),
    "drift_terms": (Objective, "drift_terms"),
    "retain_batch_size": (Objective, "retain_batch_size"),
    "retain_guidance": (Objective, "retain_guidance"),
    "meta_clip": (Objective, "meta_clip"),
    "drift_bound": (Objective, "drift_bound"),
    "ascent_bound": (Objective, "ascent_bound"),
    "timestep": (Objective, "timestep"),
}
# of a phase, beside overrides of FLAT
PHASE = ("name", "steps", "until", "patience", "lr", "anneal", "from_best")
PAIRS = ("inner_steps", "inner_lr", "horizon", "head_start", "lora_lr")  # lowest and highest
BOUNDS = ("bound", "image_bound", "ascent_bound", "restart_above", "drift_bound")  # 0: none
LISTS = ("inner_optimizer", "inner_rank", "drift_terms")  # comma-separated
RANGES = {
    **{field.name: ANY for field in fields(Weights)},
    **{name: NOT_NEGATIVE for name in BOUNDS},
    "steps": count(0, 300),
    "until": SHARE,
    "patience": count(0, 90),
    "lr": positive(5e-5),
    "ema": Range(0, 1, example=0.95, open_high=True),
    "rank": count(1, 16),
    "retain_prompts": count(0, 256),
    "rehearsal_images": count(0, 64),
    "forget_images": count(0, 0),
    "eta": ANY,
    "batch_size": count(1, 4),
    "guidance": ANY,
    "trajectory_steps": count(1, 20),
    "trajectory_reuse": count(1, 8),
    "inner_steps": Range(1, example=[8, 8], whole=True, pair=True),
    "inner_lr": Range(0, example=[4e-5, 2e-4], open_low=True, pair=True),
    "inner_batch_size": count(1, 4),
    "horizon": Range(0, example=[90, 250], whole=True, pair=True),
    "pool": count(1, 3),
    "one_prompt": SHARE,
    "restart_below": Range(-1, 1, example=0.3),
    "head_start": Range(0, example=[0, 0], whole=True, pair=True),
    "lora_lr": Range(0, example=[1e-4, 1e-3], pair=True),
    "clean_every": count(0, 4),
    "retain_batch_size": count(1, 8),
    "retain_guidance": ANY,
    "meta_clip": NOT_NEGATIVE,
    "accumulation": count(1, 1),
}
META_TERMS = ("relearn", "self_destruct", "clean", "ascent", "gradient_norm", "alignment")
RUNTIME = (
    "frozen_dtype",
    "gradient_checkpointing",
    "accumulation",
    "snapshot",
    "half_pool",
    "offload",
)


@dataclass(frozen=True)
class Training:
    """A training as its `params.json` describes it."""

    model: str
    sets: str  # concept folder
    method: str = "esd-f"
    start: str = ""  # run folder or weights file; empty: the original model
    subset: str = ""  # empty: the method's
    rank: int = 16  # of LoRA
    replace: str = ""  # the concept is drawn as this text; empty: the empty prompt
    retain_prompts: int = 0  # random prompts of the drift term "any"
    rehearsal_images: int = 0  # that the original draws for simulated attackers; 0: forget set
    forget_images: int = 0  # images of the forget set that are used; 0: all
    lr: float = 5e-5
    optimizer: str = "adamw"
    ema: float = 0.0  # decay of a running average of the weights; 0: see `average_decay`
    weights_dtype: str = "full"
    precision: str = "auto"
    seed: int = 0
    loop: dict | None = None  # of `make_phases`; None: the start, or a closed form, is the result
    closed_form: dict | None = None  # keywords of `mu.runs.train.edit`; None: no closed form
    runtime: dict | None = None  # frozen_dtype, gradient_checkpointing, offload, and of `Runtime`


def check_method(method):
    """Return loss and subset of a method. Raises ValueError for an unknown one."""
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}: choose {', '.join(METHODS)} (the figure of a name such as "
            "ESD-u-3 is the parameter eta = 3.0)"
        )
    return METHODS[method]


def average_decay(ema, loss):
    """Return the decay of the running average: if 0 is given, 0.999 for SDD, which needs one."""
    return ema or (0.999 if loss == "sdd" else 0.0)


def make_objective(flat, loss="esd"):
    """Return the `Objective` of flat parameters; those that are missing keep their defaults.

    loss: esd, sdd, or None for the meta terms alone, after a closed form. Raises ValueError for an
    unknown parameter or loss.
    """
    if loss not in ("esd", "sdd", None):
        raise ValueError(f"unknown loss {loss!r}: choose esd, sdd, or None after a closed form")
    if unknown := sorted(set(flat) - set(FLAT)):
        raise ValueError(f"unknown parameter {unknown[0]!r}: choose {', '.join(FLAT)}")
    values = {name: _value(name, value) for name, value in flat.items()}

    def of(kind):
        names = {name: field for name, (owner, field) in FLAT.items() if owner is kind}
        return {field: values[name] for name, field in names.items() if name in values}

    weights, trajectory = Weights(**of(Weights)), Trajectory(**of(Trajectory))
    if loss is None:
        weights = replace(weights, unlearn=0.0)
    method = ESD(**of(ESD), trajectory=trajectory)
    if loss == "sdd":
        method = SDD(method.batch_size, trajectory)
    return Objective(
        weights, method, Inner(**of(Inner)), controls=Controls(**of(Controls)), **of(Objective)
    )


def make_phases(loop, loss, lr):
    """Return the phases and the `Validation` of a loop's parameters.

    loop: steps, flat parameters of the objective, and two more: "phases", a list of dicts with
    keys of `PHASE` and with flat parameters that differ in that phase; "validation", a dict of
    `Validation`'s fields. Without phases there is one, of all steps. Raises ValueError for an
    unknown key and for a number outside its range.
    """
    flat = dict(loop)
    check_ranges(flat, RANGES)
    steps, listed = flat.pop("steps", 0), flat.pop("phases", None) or []
    asked, known = flat.pop("validation", None) or {"every": 0}, Validation.__dataclass_fields__
    if unknown := sorted(set(asked) - set(known)):
        raise ValueError(f"unknown key {unknown[0]!r} of validation: choose {', '.join(known)}")
    validation = Validation(**asked)
    phases = []
    for given in listed or [{"name": "all", "steps": steps}]:
        if unknown := sorted(set(given) - set(FLAT) - set(PHASE)):
            allowed = ", ".join([*PHASE, *FLAT])
            raise ValueError(f"unknown key {unknown[0]!r} of a phase: choose {allowed}")
        check_ranges(given, RANGES)
        own = {name: value for name, value in given.items() if name in PHASE}
        overrides = {name: value for name, value in given.items() if name in FLAT}
        objective = make_objective(flat | overrides, loss)
        phases.append(Phase(**({"lr": lr} | own), objective=objective))
    return phases, validation


def flatten(objective):
    """Return the flat parameters of an objective, as notebooks write them."""
    parts = {
        Weights: objective.weights,
        ESD: objective.method,
        Trajectory: objective.method.trajectory,
        Inner: objective.inner,
        Controls: objective.controls,
        Objective: objective,
    }
    found = {name: getattr(parts[kind], field, None) for name, (kind, field) in FLAT.items()}
    for name in PAIRS:
        value = found[name]
        found[name] = list(value) if isinstance(value, tuple) else [value, value]
    for name in BOUNDS:
        found[name] = 0.0 if found[name] == math.inf else found[name]
    for name in LISTS:
        found[name] = ",".join(map(str, found[name]))
    found["timestep"] = -1 if found["timestep"] is None else found["timestep"]
    return found


def describe(parameters, closed_form=None):
    """Return the params.json of a training, and its runtime, from a notebook's parameters.

    parameters: name → value; other names are ignored, so a notebook passes `globals()`.
    closed_form: keywords of `mu.runs.train.edit`, for UCE and RECE. Without steps there is no loop:
    the run is what it starts from. Raises ValueError for an unknown method and for a number outside
    its range.
    """
    loss, _ = check_method(parameters["method"])
    check_ranges(parameters, RANGES)
    run = {f.name: parameters[f.name] for f in fields(Training) if f.name in parameters}
    loop = {name: parameters[name] for name in FLAT if name in parameters}
    trains = parameters["steps"] or parameters.get("phases")
    if trains and (loss or any(loop.get(name) for name in META_TERMS)):
        more = {name: parameters[name] for name in ("phases", "validation") if name in parameters}
        run["loop"] = loop | {"steps": parameters["steps"]} | more
        if not loss:
            run["loop"]["unlearn"] = 0.0  # as `make_objective` does
    else:
        run["loop"] = None
    run["closed_form"] = None if loss else closed_form
    run["files"] = with_digests(**{name: run.get(name, "") for name in ("model", "sets", "start")})
    runtime = {name: parameters[name] for name in RUNTIME if name in parameters}
    run.pop("runtime", None)
    return run, runtime


def defaults(objective=META):
    """Return every flat default of a training: of the objective, the run and the runtime."""
    run = {f.name: f.default for f in fields(Training) if f.default is not None}
    run = {name: run[name] for name in list(run)[2:]}  # all but model and sets
    runtime = asdict(Runtime()) | {"snapshot": ""}
    return run | flatten(objective) | {name: runtime[name] for name in ("accumulation", "snapshot")}


def _value(name, value):
    """Return a parameter as the dataclass has it: papermill and JSON know no tuples and no None."""
    if name in LISTS and isinstance(value, str):
        kind = int if name == "inner_rank" else str
        return tuple(kind(part) for part in value.split(","))
    if name == "timestep" and value is not None and value < 0:
        return None
    if name in BOUNDS and not value:
        return math.inf
    if name in PAIRS and isinstance(value, list):
        return tuple(value) if any(value) else 0
    return tuple(value) if isinstance(value, list) else value
