"""Synthetic result files of attacks, as the attack notebooks write them."""

import json

FACTS = {
    "model": "m (1)",
    "sets": "s",
    "judge": "j",
    "probe_seeds": "8,1",
    "sampling_steps": 15,
    "sampling_guidance": 5.0,
}
# attack → model → step → share of 10 concept images, the same in both trainings
SCORES = {
    "full": {
        "unlearned": {0: 0.0, 50: 0.9, 100: 0.6},
        "meta-unlearned": {0: 0.0, 50: 0.1, 100: 0.2},
    },
    "sly": {
        "unlearned": {0: 0.1, 50: 0.4, 100: 0.7},
        "meta-unlearned": {0: 0.0, 50: 0.3, 100: 0.8},
    },
    "words": {
        "unlearned": {0: 0.2, 50: 0.1, 100: 0.0},
        "meta-unlearned": {0: 0.0, 50: 0.0, 100: 0.0},
    },
}
# model → share of 10 related images after the first step
RELATED = {"unlearned": 0.9, "meta-unlearned": 0.4, "edited": 1.0}


def make_rows(run, step, share, related):
    """Rows of ten concept images and, if related is given, of ten related images."""
    row = run | {"step": step}
    forget = row | {"group": "forget", "prompt": "a cat"}
    rows = [forget | {"seed": i, "hit": int(i < round(10 * share))} for i in range(10)]
    if related is not None:
        count = round(10 * related) if step else 10
        row = row | {"group": "related", "seed": 0}
        rows += [row | {"prompt": f"p{i}", "hit": int(i < count)} for i in range(10)]
    return rows


def write_attacks(folder, scores=SCORES, attack="forget", **facts):
    """Write one file per attack into `folder` and return it; "words" has no related images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, models in scores.items():
        rows, budget = [], []
        for model, steps in models.items():
            related = RELATED[model] if name != "words" else None
            for training in (0, 1):
                run = {"model": model, "run": f"{model.split('-')[0]}-{training}"}
                run |= {"attack": attack, "name": name, "lr": 1e-4, "attack_seed": 0}
                for step, share in steps.items():
                    rows += make_rows(run, step, share, related)
                    costs = {"images": 12 * bool(step), "passes": step, "seconds": step / 10}
                    budget.append(run | {"step": step} | costs)
        made = {"rows": rows, "budget": budget, "protocol": FACTS | facts}
        (folder / f"{name}.json").write_text(json.dumps(made))
    return folder


def edit_attack(folder, name, change):
    """Apply `change` to the rows of one file, in place."""
    file = folder / f"{name}.json"
    made = json.loads(file.read_text())
    for row in made["rows"]:
        change(row)
    file.write_text(json.dumps(made))
