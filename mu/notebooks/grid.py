"""A grid of notebooks as data: one file names the axes (methods, attack sets, seeds, ...) and, once for all of them, what runs on them."""

import re
from itertools import product

PLACE = re.compile(r"\{(\w+)((?:\.\w+)*)\}")


def look(axes, chosen, path):
    """What an axis says of its chosen value: "axis" is all of it, "axis.fact.fact" a part; {} where it says nothing. Raises ValueError for an axis of which none is chosen."""
    axis, *facts = path.split(".")
    if axis not in chosen:
        raise ValueError(
            f"{path}: no value of {axis!r} is chosen here, only of {', '.join(chosen)}"
        )
    value = axes[axis][chosen[axis]]
    for fact in facts:
        value = (value or {}).get(fact, {})
    return {} if value is None else value


def several(text, axes, chosen):
    """`text` with its {places} filled: once for each combination of the axes that it names and that are not chosen yet. A text that is one place keeps the value's type."""
    open_axes = list(dict.fromkeys(axis for axis, _ in PLACE.findall(text) if axis not in chosen))
    found = []
    for values in product(*(axes[axis] for axis in open_axes)):
        now = chosen | dict(zip(open_axes, values, strict=False))

        def said(place):
            return look(axes, now, place[1] + place[2]) if place[2] else now[place[1]]

        whole = PLACE.fullmatch(text)
        found.append(said(whole) if whole else PLACE.sub(lambda place: str(said(place)), text))
    return (
        list(dict.fromkeys(found))
        if all(isinstance(value, (str, int, float)) for value in found)
        else found
    )


def parameters(parts, axes, chosen):
    """Parameters of one notebook. parts: a dict, or a list of dicts and of paths such as "method.meta", the later ones win. In a value, an axis that is not chosen stands for all its names, with commas."""
    merged = {}
    for part in parts if isinstance(parts, list) else [parts]:
        merged |= look(axes, chosen, part) if isinstance(part, str) else part

    def open_in(value):
        return isinstance(value, str) and any(
            axis not in chosen for axis, _ in PLACE.findall(value)
        )

    def fill(value):
        return several(value, axes, chosen)[0] if isinstance(value, str) else value

    return {
        name: ",".join(map(str, several(value, axes, chosen))) if open_in(value) else fill(value)
        for name, value in merged.items()
    }


def expand(grid, model, seeds):
    """The experiment (name → notebook, after, leaves, parameters, ...; see Snakefile) of a grid.

    grid: {"models": {name: facts}, "axes": {name: list or {value: facts}, or a path such as "model.panels"}, "experiment": {pattern: step}}. A step whose pattern names axes, as
    "30_{method}-{attack}-{seed}", is there once for each combination of their values; in its texts {axis} is the value and {axis.fact} what the axis says of it. In `after`,
    `shows` (files that it reads where they are there) and `leaves`, an axis that the pattern does not name stands for all its values. Besides the file's axes there are `model` (the chosen one) and `seed`.
    A step with `gpu: true` takes a GPU where the model's facts say `gpu: true`, too: the experiment's "gpu" is their number, 0 or 1.
    Raises ValueError for an unknown model, for no seeds or others than whole numbers, for a step that waits for one that is not there, for an axis that nobody knows."""
    if model not in grid["models"]:
        raise ValueError(f"unknown model {model!r}: allowed are {', '.join(grid['models'])}")
    words = str(seeds).replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f'seeds must be whole numbers with spaces, as in "0 1 2"; got {seeds!r}')
    axes = {
        "model": {model: grid["models"][model]},
        "seed": dict.fromkeys(sorted({int(word) for word in words}), {}),
    }
    for name, values in grid.get("axes", {}).items():
        values = look(axes, {"model": model}, values) if isinstance(values, str) else values
        axes[name] = values if isinstance(values, dict) else dict.fromkeys(values, {})
    experiment = {}
    for pattern, step in grid["experiment"].items():
        used = list(dict.fromkeys(axis for axis, _ in PLACE.findall(pattern)))
        if unknown := [axis for axis, _ in PLACE.findall(f"{pattern} {step}") if axis not in axes]:
            raise ValueError(
                f"{pattern}: there is no axis {unknown[0]!r}; there are: {', '.join(axes)}"
            )
        for values in product(*(axes[axis] for axis in used)):
            chosen = {"model": model} | dict(zip(used, values, strict=False))

            def every(texts):
                return [found for text in texts for found in several(text, axes, chosen)]

            (name,), notebook = several(pattern, axes, chosen), step.get("notebook", pattern)
            experiment[name] = {
                fact: value for fact, value in step.items() if fact != "parameters"
            } | {
                "notebook": notebook,
                "gpu": int(bool(step.get("gpu") and look(axes, chosen, "model.gpu"))),
                "after": every(step.get("after", [])),
                "shows": every(step.get("shows", [])),
                "leaves": every(step.get("leaves", [])),
                "parameters": parameters(step.get("parameters", {}), axes, chosen),
            }
    for name, step in experiment.items():
        if missing := [other for other in step["after"] if other not in experiment]:
            raise ValueError(f"{name} waits for {missing[0]}, which is no step of this experiment")
    return experiment


def read_experiment(config):
    """The model and the experiment of a configuration as Snakemake hands it over: an experiment that is written out as it is, a grid for its `model` and `seeds`.
    Every step then has a notebook and parameters. Raises as `expand` does."""
    model = str(config.get("model", "pocket"))
    experiment = (
        expand(config, model, config.get("seeds", 0))
        if "models" in config
        else config["experiment"]
    )
    return model, {
        name: {"notebook": name, "parameters": {}} | step for name, step in experiment.items()
    }
