"""Run an experiment: one rule per notebook. A configuration file defines steps, parameters, order.

    snakemake --cores 2 --configfile notebooks/profiles/pocket-demo.yaml

A notebook runs again if it, its parameters or a notebook before it has changed, or if one of its
files is missing. Its runs start anew if their parameters or their initial weights have changed;
the old ones move aside. A changed `mu` is only reported: finished runs below `runs/` would be read
and not repeated.
"""

import sys
from pathlib import Path

from mu.notebooks.grid import read_experiment
from mu.notebooks.run import check_parameters
from mu.notebooks.run import origin
from mu.notebooks.run import read_origin

if not config:
    sys.exit("no experiment: add --configfile notebooks/profiles/pocket-demo.yaml")
try:
    model, EXPERIMENT = read_experiment(config)
except ValueError as error:
    sys.exit(f"error: {error}")
RUNS = Path(config["runs"].format(model=model))
REPORT, DONE = Path(config["report"].format(model=model)), RUNS / "done"
OUTDATED = []  # made by an earlier version of mu

for name, step in EXPERIMENT.items():
    notebook = f"notebooks/{step['notebook']}.ipynb"
    check_parameters(notebook, step["parameters"])  # of all notebooks, before the first one runs
    if not workflow.is_main_process:
        continue  # a job on a cluster may see files late
    output = REPORT / "notebooks" / f"{name}.ipynb"
    files = [output, output.with_suffix(".html"), *step.get("leaves", [])]
    if not all(Path(file).exists() for file in files):
        (DONE / name).unlink(missing_ok=True)
    elif read_origin(output).get("mu") != origin(notebook, {})["mu"]:
        OUTDATED.append(name)

if OUTDATED:
    more = f" and {len(OUTDATED) - 3} more" if len(OUTDATED) > 3 else ""
    names = ", ".join(OUTDATED[:3]) + more
    note = f"note: made by an earlier mu: {names}. To repeat everything, delete {RUNS}"
    print(note, file=sys.stderr)


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
        print(f"stopped early: {file}", file=sys.stderr)
    for name, step in EXPERIMENT.items():
        if step["notebook"] == "90_figures":
            values = " ".join(f'-p {key} "{value}"' for key, value in step["parameters"].items())
            files = f"notebooks/90_figures.ipynb {REPORT / 'notebooks' / '90_figures.ipynb'}"
            command = f"{sys.executable} -m mu.notebooks.run {files} {values} --again"
            print(f"to report what is finished: {command}", file=sys.stderr)
