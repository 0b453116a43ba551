"""An experiment through the notebooks, one rule each. Which, with what parameters, after which others, is data:

    snakemake --cores 2 --configfile notebooks/profiles/pocket-demo.yaml

A notebook runs again if it, its parameters or one before it has changed, or if something that it left is gone; a run that has then other
parameters, or comes from other weights, begins anew, and the old one is put aside. A changed `mu` is only reported: the runs below `runs/`
go on where they stopped, so running a notebook once more would not bring them up to date."""

import sys
from pathlib import Path

from mu.notebooks.grid import read_experiment
from mu.notebooks.run import check_parameters
from mu.notebooks.run import origin
from mu.notebooks.run import origin_of

if not config:
    sys.exit("say which experiment: --configfile notebooks/profiles/pocket-demo.yaml")
try:
    model, EXPERIMENT = read_experiment(config)
except ValueError as error:
    sys.exit(f"error: {error}")
REPORT, DONE = Path(config["report"].format(model=model)), Path(config["runs"].format(model=model)) / "done"
EARLIER = []

for name, step in EXPERIMENT.items():
    source, output = f"notebooks/{step['notebook']}.ipynb", REPORT / "notebooks" / f"{name}.ipynb"
    check_parameters(source, step["parameters"])  # all of them, before anything runs
    if not workflow.is_main_process:
        continue  # a job of a cluster, which may see files later than they are written
    if not all(Path(file).exists() for file in [output, output.with_suffix(".html"), *step.get("leaves", [])]):
        (DONE / name).unlink(missing_ok=True)
    elif origin_of(output).get("mu") != origin(source, {})["mu"]:
        EARLIER.append(name)

if EARLIER:
    print(f"note: of an earlier mu are {', '.join(EARLIER[:3])}{f' and {len(EARLIER) - 3} more' if len(EARLIER) > 3 else ''}. To make everything again, delete {config['runs'].format(model=model)}", file=sys.stderr)


rule experiment:
    default_target: True
    input:
        [DONE / name for name in EXPERIMENT],


for name, step in EXPERIMENT.items():

    rule:
        name:
            name
        input:
            [DONE / other for other in step.get("after", [])],
            [file for file in step.get("shows", []) if Path(file).exists()],
            notebook=f"notebooks/{step['notebook']}.ipynb",
        output:
            touch(DONE / name),
        params:
            output=str(REPORT / "notebooks" / f"{name}.ipynb"),
            parameters=step["parameters"],
        threads: step.get("threads", 1)
        priority: step.get("priority", 0)
        resources:
            **{name: step[name] for name in ("gpu", "runtime") if name in step},
        script:
            "notebooks/run.py"


onerror:
    for file in REPORT.glob("notebooks/*.unfinished.ipynb"):
        print(f"as far as it came: {file}", file=sys.stderr)
    for name, step in EXPERIMENT.items():
        if step["notebook"] == "90_figures":
            told = " ".join(f'-p {key} "{value}"' for key, value in step["parameters"].items())
            print(f"what is there can be shown all the same: {sys.executable} -m mu.notebooks.run notebooks/90_figures.ipynb {REPORT / 'notebooks' / '90_figures.ipynb'} {told} --again", file=sys.stderr)
