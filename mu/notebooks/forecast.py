"""Forecast how many notebooks an experiment would run, and for how long: `make paper DRY=1`.

    python -m mu.notebooks.forecast snakemake --cores 2 \\
        --configfile notebooks/profiles/paper.yaml --config model=pocket seeds=0

Snakemake decides which of them run. Minutes are FLOPs of the UNet (`mu.notebooks.cost`) divided by
the FLOP/s at hand, plus start-up. A notebook is assumed to start from scratch; a stopped one, or
one that finds its runs, takes less.
"""

import csv
import functools
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from snakemake.cli import parse_args, parse_config

from mu.concepts.sets import read_groups
from mu.models import load_pipeline
from mu.notebooks.cost import DEFAULTS, estimate, pass_flops
from mu.notebooks.grid import read_experiment
from mu.notebooks.preflight import guessed_speed, speed
from mu.notebooks.run import effective
from mu.notebooks.sizes import SIZES, random_pipeline
from mu.notebooks.trace import Tracker
from mu.runs.parameters import check_method

START = 12  # seconds to import everything and load a pocket model, measured on two cores
OTHERS = 0.5  # minutes of any other notebook: a guess, right for 10_prepare_concepts on two cores
PICTURES = 50  # evaluation images if their prompts are not there yet
# share of `speed` at ROWS that the steps of a pocket model reach, as measured on two cores: 0.7 for
# attacks, up to 1 for trainings
SHARE = 0.8
ROWS = 16  # of a timed pass
STAND_IN = "A100-40"  # assumed for a large model without a GPU whose data sheet is known


def pending(command):
    """Return the names of the notebooks that a Snakemake command would run; nothing is run.

    Raises RuntimeError with Snakemake's message.
    """
    summary = subprocess.run([*command, "--summary"], capture_output=True, text=True)
    if summary.returncode:
        raise RuntimeError((summary.stderr + summary.stdout).strip())
    lines = csv.DictReader(summary.stdout.splitlines(), delimiter="\t")
    return [line["rule"] for line in lines if line["plan"] == "update pending"]


class Hardware:
    """FLOPs of a model's passes, and the FLOP/s at hand.

    model: as notebooks name it. A model of `SIZES` is not loaded, and not timed.
    """

    def __init__(self, model, precision):
        self.sized = model in SIZES
        self.model = model if self.sized else load_pipeline(model, precision=precision)
        self.gpu = self.sized or self.model.unet.device.type == "cuda"
        if self.sized:
            self.speed = guessed_speed(precision)
        else:  # the fastest: other processes do not change it
            self.speed = max(speed(self.model, ROWS) for _ in range(5))
        self.stands_in = math.isnan(self.speed)
        if self.stands_in:
            self.speed = guessed_speed(precision, STAND_IN)
        self.share = 1.0 if self.gpu else SHARE

    def passes(self, kind, rows, parameters):
        """Return the FLOPs of a pass, as `pass_flops` does."""
        names = ("subset", "rank", "precision", "gradient_checkpointing")
        known = {name: parameters[name] for name in names if name in parameters}
        return pass_flops(self.model, kind, rows, known, self.gpu)

    @functools.cached_property
    def decoding(self):
        """Return the FLOPs of the VAE for one image."""
        pipe = random_pipeline(self.model, device="meta") if self.sized else self.model
        side, channels = pipe.unet.config.sample_size, pipe.vae.config.latent_channels
        with torch.no_grad(), Tracker() as tracker:
            pipe.vae.decode(torch.zeros(1, channels, side, side, device=pipe.vae.device))
        return tracker.flops

    def pictures(self, count, p):
        """Return the FLOPs of drawing so many images."""
        guided = self.passes("sample", 2, p)
        each = guided if p["sampling_guidance"] > 1 else guided / 2
        return count * (p["sampling_steps"] * each + self.decoding)


hardware = functools.cache(Hardware)


def integers(text):
    """Return the integers of a comma-separated text."""
    return [int(n) for n in text.split(",")]


def probe(p):
    """Return how many images a notebook evaluates, how many of the concept, and its prompts.

    A guess if the concept folder does not exist yet.
    """
    seeds = integers(p["probe_seeds"])
    try:
        counts = [len(prompts) for prompts in read_groups(p["sets"]).values()]
    except FileNotFoundError:
        return PICTURES, seeds[0], 1
    images = [n * seed for n, seed in zip(counts, seeds, strict=True)]
    return sum(images), images[0], counts[0]


# Each of the next four returns the FLOPs of passes with gradients, and of drawing images.
# new: function of a folder; True at its first call for a folder that has no metrics yet.


def training(hw, p, new):
    """Count 20_unlearn or 21_meta_unlearn."""
    trained = 0
    if check_method(p["method"])[0] or "inner_steps" in p:  # a closed form alone takes seconds
        known = {name: p[name] for name in DEFAULTS if name in p}
        found = estimate(hw.model, known, hw.gpu)
        each = found.flops
        if p["angle_every"]:
            batches = [p.get(name, 8) for name in ("inner_batch_size", "retain_batch_size")]
            each += sum(hw.passes("train", n, p) for n in batches) / p["angle_every"]
        trained = found.steps * each
    folders = {"original", p["name"], p.get("baseline")} - {None, ""}
    drawn = probe(p)[0] * sum(new(f"{p['out']}/{name}") for name in folders)
    return trained, hw.pictures(drawn, p)


def attack(hw, p, new):
    """Count 30_attack_finetune."""
    runs, at = p["runs"].split(","), integers(p["at"])
    times = len(runs) * len(p["seeds"].split(","))
    is_dreambooth = p["kind"] == "dreambooth"
    batches = 2 if p["mixed_set"] or is_dreambooth else 1
    trained = times * max(at) * batches * hw.passes("train", p["batch_size"], p)
    evaluations = times * sum(step > 0 for step in at)
    evaluations += sum(new(f"{p['out']}/attack/{run}/before") for run in runs)
    drawn = evaluations * probe(p)[0] + p["drawn_images"]
    if is_dreambooth:
        drawn += times * p["class_images"]
    return trained, hw.pictures(drawn, p)


def searches(hw, p, new):
    """Count 31_attack_prompts.

    A gradient of words goes back through the UNet to its input but not to its weights: two passes.
    P4D's frozen UNet is a third.
    """
    at, (images, of_concept, prompts) = integers(p["at"]), probe(p)
    times = len(p["runs"].split(",")) * len(p["seeds"].split(","))
    later = sum(step > 0 for step in at)
    trained, drawn = 0, p["drawn_images"]
    for search in p["searches"].split(","):
        passes = {"unlearn-diff-atk": 2, "p4d": 3, "concept-inversion": 2}.get(search, 0)
        each = times * max(at) * passes * hw.passes("sample", p["batch_size"], p)
        if search == "concept-inversion":  # one for all prompts; evaluates all of them
            trained += each
            drawn += times * len(at) * images
            continue
        trained += each * prompts
        tried = (p["candidates"] + 1) * p["images_per_prompt"] if p["candidates"] > 1 else 0
        drawn += times * (len(at) * of_concept + later * prompts * tried)
    return trained, hw.pictures(drawn, p)


def prompt_count(source):
    """Return the number of prompts of a source of 50_evaluate: a name, or a CSV file."""
    known = {"": 0, "i2p-nudity": 142, "i2p": 4703, "coco": 30_000}
    if source in known:
        return known[source]
    if Path(source).is_file():
        return len(Path(source).read_text().splitlines()) - 1
    return PICTURES


def evaluation(hw, p, new):
    """Count 50_evaluate: images only."""
    (images, of_concept, _), runs = probe(p), p["runs"].split(",")
    each = images
    for name in ("prompts", "captions"):
        each += min(prompt_count(p[name]), p[f"{name}_limit"] or sys.maxsize)
    return 0, hw.pictures(len(runs) * each + images - of_concept, p)


KINDS = {
    "20_unlearn": training,
    "21_meta_unlearn": training,
    "30_attack_finetune": attack,
    "31_attack_prompts": searches,
    "50_evaluate": evaluation,
}


def minutes(experiment, folder="notebooks"):
    """Return name → minutes of each notebook on one core or GPU, and model → `Hardware`.

    experiment: of `mu.notebooks.grid.read_experiment`.
    """
    seen, found, hws = set(), {}, {}

    def new(place):
        first = place not in seen and not (Path(place) / "metrics.json").exists()
        seen.add(place)
        return first

    for name, step in experiment.items():
        found[name] = OTHERS
        if step["notebook"] in KINDS:
            p = effective(Path(folder) / f"{step['notebook']}.ipynb", changes=step["parameters"])
            hw = hws[p["model"]] = hardware(p["model"], p["precision"])
            trained, drawn = KINDS[step["notebook"]](hw, p, new)
            found[name] = (START + (trained / hw.share + drawn) / hw.speed) / 60
    return found, hws


@dataclass(frozen=True)
class Forecast:
    """The notebooks that an experiment would run, and how long they take."""

    steps: dict  # name → step of the experiment that would run
    minutes: dict  # name → minutes
    hws: dict  # model → `Hardware`
    side_by_side: dict  # number of GPUs that a notebook takes, 0 or 1 → how many run at once

    @property
    def hours(self):
        """Return a lower bound: the longest chain of notebooks, or all of them side by side."""

        @functools.cache
        def chain(name):
            before = [n for n in self.steps[name].get("after", []) if n in self.steps]
            return self.minutes[name] + max(map(chain, before), default=0)

        def together(gpu):
            names = [name for name, step in self.steps.items() if step.get("gpu", 0) == gpu]
            return sum(self.minutes[name] for name in names) / self.side_by_side[gpu]

        bounds = [*map(together, self.side_by_side), *map(chain, self.steps)]
        return max(bounds, default=0) / 60

    def table(self):
        """Return the lines of a table: minutes and hours of each kind of notebook."""
        kinds = {}
        for name, step in self.steps.items():
            kinds.setdefault(step["notebook"], []).append(self.minutes[name])
        yield f"{'notebook':22} {'how many':>8} {'minutes each':>13} {'hours':>6}"
        for kind, each in kinds.items():
            mean, hours = sum(each) / len(each), sum(each) / 60
            yield f"{kind:22} {len(each):8} {mean:13.1f} {hours:6.1f}"

    def assumptions(self):
        """Return lines on what is guessed."""
        kinds = dict.fromkeys(step["notebook"] for step in self.steps.values())
        others = ", ".join(kind for kind in kinds if kind not in KINDS)
        if others:
            text = f"{others}: not computed, taken for {OTHERS} minutes each"
            yield text + self.drawn_sets()
        folders = {step["parameters"].get("sets") for step in self.steps.values()} - {None}
        absent = sorted(f for f in folders if not Path(f, "probe.json").is_file())
        if absent:
            text = f"not there yet, the probe is taken for {PICTURES} pictures"
            yield f"{', '.join(absent)}: {text}"

    def drawn_sets(self):
        """Return a remark if a notebook has to draw its sets with a large model."""
        for step in self.steps.values():
            if step["notebook"] == "10_prepare_concepts" and step.get("gpu"):
                return (
                    "; where 10_prepare_concepts has to draw its sets with another model, these "
                    "hours come to it"
                )
        return ""

    def place(self):
        """Return the name of the hardware that the hours are for."""
        if any(hw.stands_in for hw in self.hws.values()):
            return f"an {STAND_IN}, for want of a known GPU here,"
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "this CPU"

    def total(self):
        """Return the last line: number of notebooks, time and hardware."""
        time = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.0f} minutes"
        speeds = ", ".join(f"{model} {hw.speed / 1e9:.0f}" for model, hw in self.hws.items())
        if speeds:
            is_guess = any(hw.sized for hw in self.hws.values())
            source = "guessed from its data sheet" if is_guess else "measured"
            speeds = f" ({source}: {speeds} GFLOP/s)"
        at_once = self.side_by_side[any(step.get("gpu") for step in self.steps.values())]
        count = f"{len(self.steps)} notebook{'s' if len(self.steps) > 1 else ''}"
        return f"{count}, about {time} on {self.place()} with {at_once} at a time{speeds}"

    def __str__(self):
        if not self.steps:
            return "0 notebooks: all is there"
        return "\n".join([*self.table(), *self.assumptions(), self.total()])


def forecast(command):
    """Return the `Forecast` of a Snakemake command.

    Raises RuntimeError with Snakemake's message, ValueError as `read_experiment` does and for
    parameters that no notebook has.
    """
    asked = parse_args(command[1:])[1]
    config = {}
    for file in asked.configfile or []:
        config |= yaml.safe_load(Path(file).read_text())
    experiment = read_experiment(config | parse_config(asked.config))[1]
    names = pending(command)
    steps = {name: step for name, step in experiment.items() if name in names}
    jobs = asked.cores if asked.executor in (None, "local") else asked.jobs
    gpus = asked.resources["gpu"].value if "gpu" in asked.resources else jobs
    torch.set_num_threads(1)  # as notebooks that run side by side
    return Forecast(steps, *minutes(steps), {0: jobs, 1: min(jobs, gpus)})


if __name__ == "__main__":
    try:
        print(forecast(sys.argv[1:]))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
