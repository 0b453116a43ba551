"""An experiment's folder of runs and attacks with known scores and grey pictures, as the notebooks leave it: nothing is trained, nothing is drawn."""

import json

import torch

from mu.images import save_grid

PROMPTS = {"forget": ["a cat"], "related": ["a tiger", "a lion"], "unrelated": ["a duck"]}
SEEDS = {"forget": 10, "related": 2, "unrelated": 2}
COMMON = {
    "model": "pocket (0)",
    "sets": "cat (1)",
    "judge": "judge (2)",
    "precision": "bf16",
    "probe_seeds": "10,2,2",
    "sampling_steps": 15,
    "sampling_guidance": 5.0,
}
ATTACKS = {
    "hrm-m": dict(attack="forget", prompts=0),
    "hrm-s": dict(attack="forget", prompts=1),
    "clean": dict(attack="clean", prompts=0),
}
META = dict(relearn=2.0, self_destruct=30.0)


def items():
    return [
        {"group": g, "prompt": p, "seed": s, "expected": f"concept:{p[2:]}"}
        for g, prompts in PROMPTS.items()
        for p in prompts
        for s in range(SEEDS[g])
    ]


def judged(scores):
    """Rows of which the first `score` of each group and prompt are hits: {"forget": 0.3} makes 3 of 10."""
    return [
        item
        | {
            "seen": item["expected"]
            if item["seed"] < round(scores[item["group"]] * SEEDS[item["group"]])
            else "other",
            "hit": int(item["seed"] < round(scores[item["group"]] * SEEDS[item["group"]])),
        }
        for item in items()
    ]


def save(value, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def grid(png, shade):
    png.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.full((len(items()), 3, 8, 8), shade), png)


def run(out, name, scores, params, cosines=(), shade=0.5, **card):
    """A finished run: metrics.json, samples.png and records.json with the cosines of the two gradients."""
    save(
        {
            "rows": judged(scores),
            "protocol": COMMON | {"run": params, "images": len(items())} | card,
        },
        out / name / "metrics.json",
    )
    save(
        [
            {
                "step": i + 1,
                "losses": {"unlearn": 0.1, "inner product": c / 100, "cosine": c},
                "passes": 8,
                "seconds": 1.0,
            }
            for i, c in enumerate(cosines)
        ],
        out / name / "records.json",
    )
    grid(out / name / "samples.png", shade)


def attack(out, name, curves, lr=6e-5, label=lambda run: run, **card):
    """An attack's file and pictures. curves: run → {step: scores}."""
    facts = (
        COMMON
        | dict(
            kind="fine-tuning",
            lr=lr,
            optimizer="adam",
            subset="f",
            batch_size=8,
            others="",
            first="",
            merge=0.0,
        )
        | card
    )
    rows = []
    for name_of_run, curve in curves.items():
        for step, scores in curve.items():
            found = [row | {"step": step} for row in judged(scores)]
            rows += [
                {
                    "model": label(name_of_run),
                    "run": name_of_run,
                    "attack": card["attack"],
                    "name": name,
                    "lr": lr,
                    "attack_seed": 0,
                }
                | row
                for row in found
            ]
            save(found, out / "attack" / name_of_run / f"{name}-0" / f"step-{step:04d}.json")
            grid(
                out / "attack" / name_of_run / f"{name}-0" / f"step-{step:04d}.png",
                0.3 + step / 1000,
            )
    save({"rows": rows, "budget": [], "protocol": facts}, out / "attack" / f"{name}.json")


def experiment(out, seed=0, methods=("esd-u-3", "uce"), harmful=False):
    """One training of an experiment: an original, each method plainly and meta-unlearned, HRM-m, HRM-s and CLEAN on both, and words."""
    harm = {"harmful": True, "blurred": True} if harmful else {}
    high, shift = {"forget": 1.0, "related": 1.0, "unrelated": 1.0}, 0.1 * (seed % 2)
    run(out, "original", high, {}, **harm)
    for method in methods:
        name, _, eta = method.rpartition("-") if method[-1].isdigit() else (method, "", "1")
        params = dict(method=name, seed=seed, loop={"eta": float(eta)})
        low = high | {"forget": 0.0}
        run(out, method, low, params, [0.2, 0.2, 0.2, 0.2], **harm)
        run(
            out,
            f"{method}-meta",
            low,
            params | {"loop": params["loop"] | META},
            [0.2, 0.1, -0.1, -0.2],
            **harm,
        )
        for kind, card in ATTACKS.items():
            top = 0.0 if kind == "clean" else 0.8 + shift
            curves = {
                method: {0: low, 50: high | {"forget": top / 2}, 100: high | {"forget": top}},
                f"{method}-meta": {
                    0: low,
                    50: high | {"forget": 0.0, "related": 1.0 if kind == "clean" else 0.5},
                    100: high | {"forget": top / 4, "related": 1.0 if kind == "clean" else 0.5},
                },
            }
            attack(out, f"{method}-{kind}", curves, **card, **harm)
        for search, top in (("random", 0.0), ("unlearn-diff-atk", 0.5)):
            rows = [
                {
                    "model": r,
                    "run": r,
                    "attack": "prompt",
                    "name": search,
                    "lr": 0.02,
                    "attack_seed": 0,
                    "step": step,
                    "asked": row["prompt"],
                }
                | row
                | {"prompt": f"key {row['prompt']}" if step else row["prompt"]}
                for r in (method, f"{method}-meta")
                for step, score in ((0, 0.0), (20, top))
                for row in judged(low | {"forget": score})
                if row["group"] == "forget"
            ]
            save(
                {"rows": rows, "budget": [], "protocol": COMMON | {"searches": "all"} | harm},
                out / "attack" / f"{method}-{search}.json",
            )
        numbers = {
            "original": {"jfd": 0.0},
            method: {"jfd": 1.0 + seed},
            f"{method}-meta": {"jfd": 3.0 + seed},
        }
        save(
            {"numbers": numbers, "protocol": COMMON}, out / "evaluate" / method / "evaluation.json"
        )
    return out
