"""A folder of runs and attacks with known scores and grey images, as the notebooks write it."""

import json

import torch

from mu.images import save_grid

PROMPTS = {"forget": ["a cat"], "related": ["a tiger", "a lion"], "unrelated": ["a duck"]}
SEEDS = {"forget": 10, "related": 2, "unrelated": 2}
ALL = {"forget": 1.0, "related": 1.0, "unrelated": 1.0}  # scores of a perfect model
COMMON = {
    "model": "pocket (0)",
    "sets": "cat (1)",
    "judge": "judge (2)",
    "precision": "bf16",
    "probe_seeds": "10,2,2",
    "sampling_steps": 15,
    "sampling_guidance": 5.0,
}
ATTACK = {
    "kind": "fine-tuning",
    "optimizer": "adam",
    "subset": "f",
    "batch_size": 8,
    "others": "",
    "first": "",
    "merge": 0.0,
}
ATTACKS = {
    "hrm-m": {"attack": "forget", "prompts": 0},
    "hrm-s": {"attack": "forget", "prompts": 1},
    "clean": {"attack": "clean", "prompts": 0},
}
META = {"relearn": 2.0, "self_destruct": 30.0}


def items():
    return [
        {"group": group, "prompt": prompt, "seed": seed, "expected": f"concept:{prompt[2:]}"}
        for group, prompts in PROMPTS.items()
        for prompt in prompts
        for seed in range(SEEDS[group])
    ]


def judged(scores):
    """Return judged rows with these scores: of 10 seeds, {"forget": 0.3} makes the first 3 hits."""
    rows = []
    for item in items():
        hit = item["seed"] < round(scores[item["group"]] * SEEDS[item["group"]])
        rows.append(item | {"seen": item["expected"] if hit else "other", "hit": int(hit)})
    return rows


def save(value, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def grid(png, shade):
    png.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.full((len(items()), 3, 8, 8), shade), png)


def run(out, name, scores, params, cosines=(), **card):
    """Write a finished run, with the cosines of its two gradients in records.json."""
    protocol = COMMON | {"run": params, "images": len(items())} | card
    save({"rows": judged(scores), "protocol": protocol}, out / name / "metrics.json")
    records = []
    for step, cosine in enumerate(cosines, 1):
        losses = {"unlearn": 0.1, "inner product": cosine / 100, "cosine": cosine}
        records.append({"step": step, "losses": losses, "passes": 8, "seconds": 1.0})
    save(records, out / name / "records.json")
    grid(out / name / "samples.png", 0.5)


def attack(out, name, curves, lr=6e-5, **card):
    """Write the file and the images of an attack. curves: run → {step: scores}."""
    facts = COMMON | ATTACK | {"lr": lr} | card
    rows = []
    for run_name, curve in curves.items():
        own = {"model": run_name, "run": run_name, "attack": card["attack"], "name": name}
        own |= {"lr": lr, "attack_seed": 0}
        folder = out / "attack" / run_name / f"{name}-0"
        for step, scores in curve.items():
            found = [row | {"step": step} for row in judged(scores)]
            rows += [own | row for row in found]
            save(found, folder / f"step-{step:04d}.json")
            grid(folder / f"step-{step:04d}.png", 0.3 + step / 1000)
    save({"rows": rows, "budget": [], "protocol": facts}, out / "attack" / f"{name}.json")


def experiment(out, seed=0, methods=("esd-u-3", "uce"), harmful=False):
    """Write one training of an experiment and return its folder.

    An original; each method plainly and meta-unlearned, both under HRM-m, HRM-s, CLEAN and two
    prompt searches; and the numbers of an evaluation.
    """
    harm = {"harmful": True, "blurred": True} if harmful else {}
    run(out, "original", ALL, {}, **harm)
    for method in methods:
        _runs(out, method, seed, harm)
        for kind, card in ATTACKS.items():
            top = 0.0 if kind == "clean" else 0.8 + 0.1 * (seed % 2)
            attack(out, f"{method}-{kind}", _curves(method, kind, top), **card, **harm)
        for search, top in (("random", 0.0), ("unlearn-diff-atk", 0.5)):
            _search(out, method, search, top, harm)
        numbers = {
            "original": {"jfd": 0.0},
            method: {"jfd": 1.0 + seed},
            f"{method}-meta": {"jfd": 3.0 + seed},
        }
        file = out / "evaluate" / method / "evaluation.json"
        save({"numbers": numbers, "protocol": COMMON}, file)
    return out


def _runs(out, method, seed, harm):
    """Write a method's plainly and its meta-unlearned run."""
    name, _, eta = method.rpartition("-") if method[-1].isdigit() else (method, "", "1")
    plain = {"method": name, "seed": seed, "loop": {"eta": float(eta)}}
    meta = plain | {"loop": plain["loop"] | META}
    low = ALL | {"forget": 0.0}
    run(out, method, low, plain, [0.2, 0.2, 0.2, 0.2], **harm)
    run(out, f"{method}-meta", low, meta, [0.2, 0.1, -0.1, -0.2], **harm)


def _curves(method, kind, top):
    """Return the scores under an attack after which the plain model has the score `top`."""
    low, related = ALL | {"forget": 0.0}, 1.0 if kind == "clean" else 0.5
    return {
        method: {0: low, 50: ALL | {"forget": top / 2}, 100: ALL | {"forget": top}},
        f"{method}-meta": {
            0: low,
            50: low | {"related": related},
            100: ALL | {"forget": top / 4, "related": related},
        },
    }


def _search(out, method, search, top, harm):
    """Write a prompt search that prepends a word; `top` is the score of both models at its end."""
    rows = []
    for name in (method, f"{method}-meta"):
        own = {"model": name, "run": name, "attack": "prompt", "name": search}
        own |= {"lr": 0.02, "attack_seed": 0}
        for step, score in ((0, 0.0), (20, top)):
            for row in judged(ALL | {"forget": score}):
                if row["group"] == "forget":
                    prompt = f"key {row['prompt']}" if step else row["prompt"]
                    asked = {"step": step, "asked": row["prompt"], "prompt": prompt}
                    rows.append(own | row | asked)
    protocol = COMMON | {"searches": "all"} | harm
    file = out / "attack" / f"{method}-{search}.json"
    save({"rows": rows, "budget": [], "protocol": protocol}, file)
