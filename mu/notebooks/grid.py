"""Expand a grid of notebooks: axes (methods, attacks, seeds, ...) and step patterns over them."""

import re
from functools import partial
from itertools import product

FIELD = re.compile(r"\{(\w+)((?:\.\w+)*)\}")  # {axis} or {axis.fact.fact}


def axes_in(text):
    """Return the axes that the fields of a text name, in order and without repetition."""
    return list(dict.fromkeys(axis for axis, _ in FIELD.findall(text)))


def lookup(axes, chosen, path):
    """Return the facts of the chosen value of an axis, or {} if there are none.

    path: "axis" for all its facts, "axis.fact.fact" for one. Raises ValueError if no value of the
    axis is chosen.
    """
    axis, *facts = path.split(".")
    if axis not in chosen:
        known = ", ".join(chosen)
        raise ValueError(f"{path}: no value of {axis!r} is chosen here, only of {known}")
    value = axes[axis][chosen[axis]]
    for fact in facts:
        value = (value or {}).get(fact, {})
    return {} if value is None else value


def combinations(names, axes, chosen):
    """Return `chosen` extended by each combination of values of the named axes, as dicts."""
    values = product(*(axes[name] for name in names))
    return [chosen | dict(zip(names, combination, strict=True)) for combination in values]


def fill_text(text, axes, chosen):
    """Return a text with its fields filled; a text that is one field keeps the value's type."""

    def value(match):
        axis, facts = match.groups()
        return lookup(axes, chosen, axis + facts) if facts else chosen[axis]

    if field := FIELD.fullmatch(text):
        return value(field)
    return FIELD.sub(lambda match: str(value(match)), text)


def fill_all(text, axes, chosen):
    """Return the distinct fillings of a text, over all values of the axes that are not chosen."""
    open_axes = [axis for axis in axes_in(text) if axis not in chosen]
    found = [fill_text(text, axes, now) for now in combinations(open_axes, axes, chosen)]
    hashable = all(isinstance(value, (str, int, float)) for value in found)
    return list(dict.fromkeys(found)) if hashable else found


def parameters(parts, axes, chosen):
    """Return the parameters of one notebook.

    parts: a dict, or a list of dicts and of paths such as "method.meta"; later ones win. In a
    value, an axis that is not chosen stands for all its values, separated by commas.
    """
    merged = {}
    for part in parts if isinstance(parts, list) else [parts]:
        merged |= lookup(axes, chosen, part) if isinstance(part, str) else part
    for name, value in merged.items():
        if isinstance(value, str):
            found = fill_all(value, axes, chosen)
            is_open = any(axis not in chosen for axis in axes_in(value))
            merged[name] = ",".join(map(str, found)) if is_open else found[0]
    return merged


def make_axes(grid, model, seeds):
    """Return axis → {value: facts} of a grid for one model and its seeds.

    Raises ValueError for an unknown model, and for seeds that are not whole numbers.
    """
    if model not in grid["models"]:
        raise ValueError(f"unknown model {model!r}: choose {', '.join(grid['models'])}")
    words = str(seeds).replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f'seeds must be whole numbers with spaces, as in "0 1 2"; got {seeds!r}')
    numbers = sorted({int(word) for word in words})
    axes = {"model": {model: grid["models"][model]}, "seed": dict.fromkeys(numbers, {})}
    for name, values in grid.get("axes", {}).items():
        if isinstance(values, str):
            values = lookup(axes, {"model": model}, values)
        axes[name] = values if isinstance(values, dict) else dict.fromkeys(values, {})
    return axes


def make_step(pattern, step, axes, chosen):
    """Return one step of an experiment: a pattern's step with its texts filled."""
    fill = partial(fill_all, axes=axes, chosen=chosen)
    lists = ("after", "shows", "leaves")
    filled = {key: [value for text in step.get(key, []) for value in fill(text)] for key in lists}
    needs_gpu = step.get("gpu") and lookup(axes, chosen, "model.gpu")
    return step | {
        "notebook": step.get("notebook", pattern),
        "gpu": int(bool(needs_gpu)),
        **filled,
        "parameters": parameters(step.get("parameters", {}), axes, chosen),
    }


def expand(grid, model, seeds):
    """Return the experiment of a grid: name → step (notebook, after, leaves, parameters, ...).

    grid: {"models": {name: facts}, "axes": {name: list or {value: facts}, or a path such as
    "model.panels"}, "experiment": {pattern: step}}. The axes `model` and `seed` are added. A
    pattern such as "30_{method}-{attack}-{seed}" makes one step per combination of its axes. In a
    step's texts, {axis} is the value and {axis.fact} one of its facts; in `after`, `shows` (files
    that the notebook reads if they exist) and `leaves` (files that it writes), an axis that the
    pattern lacks stands for all its values. "gpu" is the number of GPUs, 0 or 1: 1 if both the
    step and the model have `gpu: true`.
    Raises ValueError as `make_axes` does, for an unknown axis, and for a step that waits for a
    missing one.
    """
    axes, experiment = make_axes(grid, model, seeds), {}
    for pattern, step in grid["experiment"].items():
        if unknown := [axis for axis in axes_in(f"{pattern} {step}") if axis not in axes]:
            raise ValueError(f"{pattern}: unknown axis {unknown[0]!r}: choose {', '.join(axes)}")
        for chosen in combinations(axes_in(pattern), axes, {"model": model}):
            name = fill_text(pattern, axes, chosen)
            experiment[name] = make_step(pattern, step, axes, chosen)
    for name, step in experiment.items():
        if missing := [other for other in step["after"] if other not in experiment]:
            raise ValueError(f"{name} waits for {missing[0]}, which is no step of this experiment")
    return experiment


def read_experiment(config):
    """Return model and experiment of a Snakemake configuration.

    The configuration is a grid, expanded for its `model` and `seeds`, or an experiment whose steps
    are written out. Each step returned has a notebook and parameters. Raises as `expand` does.
    """
    model, experiment = str(config.get("model", "pocket")), config["experiment"]
    if "models" in config:
        experiment = expand(config, model, config.get("seeds", 0))
    defaults = {"parameters": {}}
    steps = {name: {"notebook": name} | defaults | step for name, step in experiment.items()}
    return model, steps
