"""How many notebooks an experiment would run, and how long they take on the hardware at hand: `make paper DRY=1`.

    python -m mu.notebooks.forecast snakemake --cores 2 --configfile notebooks/profiles/paper.yaml --config model=pocket seeds=0

Which of them run is Snakemake's to say. Their minutes are FLOPs of the UNet (`mu.notebooks.preflight`) by the FLOP/s at hand, and the seconds that starting takes; a notebook
that runs is taken to have everything still to do, so that one which was stopped, or finds its runs, is done sooner."""

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
from mu.notebooks.grid import read_experiment
from mu.notebooks.preflight import DEFAULTS, Tracker, estimate, guessed_speed, pass_flops, speed
from mu.notebooks.run import effective
from mu.notebooks.sizes import SIZES, random_pipeline
from mu.runs.train import check_method

START = 12  # seconds until a kernel has imported everything and loaded a pocket model, measured on two cores
OTHERS = 0.5  # minutes of a notebook of another kind: a guess, right for 10_prepare_concepts on two cores
PICTURES = 50  # of a probe that is not there yet
SHARE = 0.8  # of `speed` at ROWS that a pocket model's steps reach, the optimiser and passes of fewer rows among them: measured on two cores, 0.7 of attacks, up to 1 of trainings
ROWS = 16  # of a timed pass
STAND_IN = "A100-40"  # whose data sheet is asked where a large model's experiment is planned on a machine without a GPU, or with one that `mu.notebooks.preflight` does not know


def pending(command):
    """Names of the notebooks that a command line of Snakemake would run, as it says itself; nothing is run. Raises RuntimeError with its words."""
    said = subprocess.run([*command, "--summary"], capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError((said.stderr + said.stdout).strip())
    return [
        line["rule"]
        for line in csv.DictReader(said.stdout.splitlines(), delimiter="\t")
        if line["plan"] == "update pending"
    ]


class Hardware:
    """FLOPs of a model's passes, and the FLOP/s at hand. model: as a notebook has it; its weights are loaded where they are small enough to be timed."""

    def __init__(self, model, precision):
        self.sized = model in SIZES
        self.model = model if self.sized else load_pipeline(model, precision=precision)
        self.gpu = self.sized or self.model.unet.device.type == "cuda"
        self.speed = (
            guessed_speed(precision)
            if self.sized
            else max(speed(self.model, ROWS) for _ in range(5))
        )  # the fastest: what else runs just now is no matter
        self.stands_in = math.isnan(self.speed)
        self.speed = guessed_speed(precision, STAND_IN) if self.stands_in else self.speed
        self.share = 1.0 if self.gpu else SHARE

    def passes(self, kind, rows, parameters):
        known = {
            name: parameters[name]
            for name in ("subset", "rank", "precision", "gradient_checkpointing")
            if name in parameters
        }
        return pass_flops(self.model, kind, rows, known, self.gpu)

    @functools.cached_property
    def decoding(self):
        """FLOPs of the VAE for one picture."""
        pipe = random_pipeline(self.model, device="meta") if self.sized else self.model
        side = pipe.unet.config.sample_size
        with torch.no_grad(), Tracker() as tracker:
            pipe.vae.decode(
                torch.zeros(1, pipe.vae.config.latent_channels, side, side, device=pipe.vae.device)
            )
        return tracker.flops

    def pictures(self, count, p):
        """FLOPs of drawing so many pictures."""
        return count * (
            p["sampling_steps"]
            * self.passes("sample", 2, p)
            / (1 if p["sampling_guidance"] > 1 else 2)
            + self.decoding
        )


hardware = functools.cache(Hardware)


def probe(p):
    """(pictures, of them of the concept, prompts of the concept) of a notebook's probe; a guess where its sets are not there yet."""
    seeds = [int(n) for n in p["probe_seeds"].split(",")]
    try:
        counts = [len(prompts) for prompts in read_groups(p["sets"]).values()]
    except FileNotFoundError:
        return PICTURES, seeds[0], 1
    return (
        sum(n * seed for n, seed in zip(counts, seeds, strict=False)),
        counts[0] * seeds[0],
        counts[0],
    )


def training(hw, p, new):
    """20_unlearn, 21_meta_unlearn. This and the next three: (FLOPs of passes with gradients, FLOPs of drawing); `new` says once of each folder that nothing was measured there."""
    trained = 0
    if check_method(p["method"])[0] or "inner_steps" in p:  # a closed form alone takes seconds
        known = {name: p[name] for name in DEFAULTS if name in p}
        looked = (
            sum(
                hw.passes("train", p.get(name, 8), p)
                for name in ("inner_batch_size", "retain_batch_size")
            )
            / p["angle_every"]
            if p["angle_every"]
            else 0
        )
        trained = p["steps"] * (estimate(hw.model, known, hw.gpu).flops + looked)
    folders = {"original", p["name"], *([p["beside"]] if p.get("beside") else [])}
    return trained, hw.pictures(probe(p)[0] * sum(new(f"{p['out']}/{name}") for name in folders), p)


def attack(hw, p, new):
    """30_attack_finetune."""
    runs, at = p["runs"].split(","), [int(n) for n in p["at"].split(",")]
    times = len(runs) * len(p["seeds"].split(","))
    trained = (
        times
        * max(at)
        * hw.passes("train", p["batch_size"], p)
        * (2 if p["mixed_set"] or p["kind"] == "dreambooth" else 1)
    )
    looks = times * sum(step > 0 for step in at) + sum(
        new(f"{p['out']}/attack/{run}/before") for run in runs
    )
    return trained, hw.pictures(
        looks * probe(p)[0]
        + p["drawn_images"]
        + times * p["class_images"] * (p["kind"] == "dreambooth"),
        p,
    )


def searches(hw, p, new):
    """31_attack_prompts. A gradient of words goes back through the UNet to its input, and not to its weights: two passes, p4d's frozen UNet is a third."""
    at, (pictures, of_concept, prompts) = [int(n) for n in p["at"].split(",")], probe(p)
    times, later = (
        len(p["runs"].split(",")) * len(p["seeds"].split(",")),
        sum(step > 0 for step in at),
    )
    trained, drawn = 0, p["drawn_images"]
    for search in p["searches"].split(","):
        inversion = (
            search == "concept-inversion"
        )  # is judged by the whole probe, and looks at nothing on its way
        passes = {"unlearn-diff-atk": 2, "p4d": 3, "concept-inversion": 2}.get(search, 0)
        trained += (
            times
            * (1 if inversion else prompts)
            * max(at)
            * passes
            * hw.passes("sample", p["batch_size"], p)
        )
        drawn += (
            times * len(at) * pictures
            if inversion
            else times
            * (
                len(at) * of_concept
                + later * prompts * (p["candidates"] + 1) * p["images_per_prompt"] * (p["candidates"] > 1)
            )
        )
    return trained, hw.pictures(drawn, p)


def evaluation(hw, p, new):
    """50_evaluate: pictures alone."""
    length = {"": 0, "i2p-nudity": 142, "i2p": 4703, "coco": 30_000}

    def rows(source):
        return (
            length[source]
            if source in length
            else len(Path(source).read_text().splitlines()) - 1
            if Path(source).is_file()
            else PICTURES
        )

    several = [
        min(rows(p[name]), p[f"{name}_limit"] or sys.maxsize) for name in ("prompts", "captions")
    ]
    (pictures, of_concept, _), runs = probe(p), p["runs"].split(",")
    return 0, hw.pictures(len(runs) * (pictures + sum(several)) + pictures - of_concept, p)


KINDS = {
    "20_unlearn": training,
    "21_meta_unlearn": training,
    "30_attack_finetune": attack,
    "31_attack_prompts": searches,
    "50_evaluate": evaluation,
}


def minutes(experiment, folder="notebooks"):
    """Name → minutes of each notebook of an experiment (`mu.notebooks.grid.read_experiment`), each on one core or on one GPU; and model → `Hardware` of those that train or draw."""
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
    steps: dict  # name → the step of the experiment; those that would run
    minutes: dict  # name → minutes
    hws: dict  # model → `Hardware`
    side_by_side: dict  # number of GPUs that a notebook takes, 0 or 1 → how many such run at once

    @property
    def hours(self):
        """No less than any chain of notebooks that wait for each other takes, and no less than all takes on what there is."""
        chain = functools.cache(
            lambda name: (
                self.minutes[name]
                + max(
                    (
                        chain(other)
                        for other in self.steps[name].get("after", [])
                        if other in self.steps
                    ),
                    default=0,
                )
            )
        )
        share = {
            gpu: sum(
                self.minutes[name] for name, step in self.steps.items() if step.get("gpu", 0) == gpu
            )
            / n
            for gpu, n in self.side_by_side.items()
        }
        return max([*share.values(), *map(chain, self.steps)], default=0) / 60

    def __str__(self):
        if not self.steps:
            return "0 notebooks: all is there"
        kinds = list(dict.fromkeys(step["notebook"] for step in self.steps.values()))
        of = {
            kind: [
                self.minutes[name] for name, step in self.steps.items() if step["notebook"] == kind
            ]
            for kind in kinds
        }
        lines = [f"{'notebook':22} {'how many':>8} {'minutes each':>13} {'hours':>6}"]
        lines += [
            f"{kind:22} {len(each):8} {sum(each) / len(each):13.1f} {sum(each) / 60:6.1f}"
            for kind, each in of.items()
        ]
        if guessed := [kind for kind in kinds if kind not in KINDS]:
            drawn = any(
                step["notebook"] == "10_prepare_concepts" and step.get("gpu")
                for step in self.steps.values()
            )
            lines.append(
                f"{', '.join(guessed)}: not computed, taken for {OTHERS} minutes each"
                + "; where 10_prepare_concepts has to draw its sets with another model, these hours come to it"
                * drawn
            )
        if absent := sorted(
            {
                step["parameters"]["sets"]
                for step in self.steps.values()
                if "sets" in step["parameters"]
                and not Path(step["parameters"]["sets"], "probe.json").is_file()
            }
        ):
            lines.append(
                f"{', '.join(absent)}: not there yet, the probe is taken for {PICTURES} pictures"
            )
        gpus = any(step.get("gpu") for step in self.steps.values())
        sized, stands_in = (
            any(getattr(hw, name) for hw in self.hws.values()) for name in ("sized", "stands_in")
        )
        place = (
            f"an {STAND_IN}, for want of a known GPU here,"
            if stands_in
            else torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else "this CPU"
        )
        speeds = ", ".join(f"{model} {hw.speed / 1e9:.0f}" for model, hw in self.hws.items())
        words = (
            f" ({'guessed from its data sheet' if sized else 'measured'}: {speeds} GFLOP/s)"
            * bool(speeds)
        )
        time = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.0f} minutes"
        return "\n".join(
            [
                *lines,
                f"{len(self.steps)} notebook{'s' * (len(self.steps) > 1)}, about {time} on {place} with {self.side_by_side[gpus]} at a time{words}",
            ]
        )


def forecast(command):
    """The `Forecast` of a command line of Snakemake. Raises RuntimeError with Snakemake's words, ValueError as `read_experiment` does and for parameters that no notebook has."""
    asked = parse_args(command[1:])[1]
    config = {}
    for file in asked.configfile or []:
        config |= yaml.safe_load(Path(file).read_text())
    experiment = read_experiment(config | parse_config(asked.config))[1]
    names = pending(command)
    steps = {name: experiment[name] for name in experiment if name in names}
    jobs = asked.cores if asked.executor in (None, "local") else asked.jobs
    gpus = asked.resources["gpu"].value if "gpu" in asked.resources else jobs
    torch.set_num_threads(1)  # as notebooks side by side have
    return Forecast(steps, *minutes(steps), {0: jobs, 1: min(jobs, gpus)})


if __name__ == "__main__":
    try:
        print(forecast(sys.argv[1:]))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
