"""All attacks on all models in one table: how far each brought the concept back, how soon, at what cost, and which is the strongest."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from mu.cards import same_protocol
from mu.plots import COLORS
from mu.runs import read_json
from mu.statistics import interval, median_revival, paired_interval, relearning_area, self_destruct_index, steps_to_revival

SAME = ("model", "sets", "judge", "probe_seeds", "sampling_steps", "sampling_guidance")  # facts of the cards without which two scores are not comparable


def read_attacks(folder, names=None):
    """Rows of all judged pictures, costs, and protocol cards (by name) of the files that 30_attack_finetune and 31_attack_prompts left in a folder; of these `names`, or of all.

    "training" is the number at the end of a run's name, "" where there is none. Raises FileNotFoundError for a missing file, and ValueError where two were judged by different protocols
    or pictures by nobody."""
    files = {name: Path(folder) / f"{name}.json" for name in names or sorted(f.stem for f in Path(folder).glob("*.json"))}
    found = {name: read_json(file) for name, file in files.items()}
    absent = [name for name, made in found.items() if made is None]
    if absent or not found:
        raise FileNotFoundError(f"{folder} has no attack {', '.join(absent) or 'at all'}: run 30_attack_finetune or 31_attack_prompts first; there are: "
                                f"{', '.join(sorted(f.stem for f in Path(folder).glob('*.json'))) or 'none'}")
    cards = {name: made["protocol"] for name, made in found.items()}
    same_protocol({name: {fact: card.get(fact) for fact in SAME} for name, card in cards.items()}, may_differ=())
    rows, budget = (pd.concat([pd.DataFrame(made[what]).assign(name=name) for name, made in found.items()], ignore_index=True) for what in ("rows", "budget"))
    unseen = rows[rows.hit.isna()].groupby("name").size()
    if len(unseen):
        raise ValueError(f"nobody has judged {', '.join(f'{count} pictures of {name}' for name, count in unseen.items())} (no score): attack again with a judge, or leave these attacks out")
    training = lambda table: table.assign(training=[(re.findall(r"-(\d+)$", run) or [""])[0] for run in table.run])
    return training(rows), training(budget), cards


def within(rows, budget, steps=0, images=0, seconds=0):
    """Rows and costs of what an attacker could do who has at most so many steps, images and seconds; 0: no limit. Step 0, before the attack, is always there.

    Seconds are those of the machine that the attack ran on, the mean over runs and seeds, so that all models are judged at the same steps."""
    spent = budget.groupby(["name", "step"], as_index=False)[["images", "seconds"]].mean().assign(steps=lambda table: table.step)
    for what, most in (("steps", steps), ("images", images), ("seconds", seconds)):
        spent = spent[(spent[what] <= most) | (spent.step == 0) | (not most)]
    keep = lambda table: table.merge(spent[["name", "step"]], on=["name", "step"])
    return keep(rows), keep(budget)


def _means(part):
    """Score and interval over whatever there are several of: trainings, seeds of the attack, pictures."""
    over = [column for column in ("training", "attack_seed", "seed") if part[column].nunique() > 1]
    return interval(part, over) if over else (part.hit.mean(), float("nan"), float("nan"))


def against(rows, budget, threshold=0.5, by="model"):
    """A table with a row for each attack and model (by="run": each of its trainings): how often the concept was recognised before it ("start") and at the step that was best for the
    attacker ("peak", with a 95 % interval over trainings, seeds and pictures), the first step with a score above the threshold ("revived": Kaplan and Meier's median over trainings and
    seeds; inf: in less than half of them it was seen to come back), the mean height of the curve ("area"), related and unrelated concepts at the peak's step (nan where they were
    not drawn), and what had been spent by then. The attacker stops where it suits him, so that every attack is judged at its own best step."""
    found = []
    for (name, model), part in rows.groupby(["name", by], sort=False):
        forget = part[part.group == "forget"]
        mean = forget.groupby("step").hit.mean()
        step, curves = mean.idxmax(), [one.groupby("step").hit.mean() for _, one in forget.groupby(["run", "attack_seed"])]
        score, low, high = _means(forget[forget.step == step])
        rest = {group: part[(part.group == group) & (part.step == step)].hit.mean() for group in ("related", "unrelated")}
        spent = budget[(budget.name == name) & (budget[by] == model) & (budget.step == step)][["images", "passes", "seconds"]].mean()
        found.append({"attack": name, by: model, "start": mean.iloc[0], "peak": score, "low": low, "high": high, "step": step,
                      "revived": median_revival([steps_to_revival(one.index, one, threshold) for one in curves]),
                      "area": relearning_area(mean.index, mean) if len(mean) > 1 else float("nan"), **rest, **spent})
    return pd.DataFrame(found)


def gains(rows, a="unlearned", b="meta-unlearned"):
    """A table with a row for each attack on both models: how much less often the concept is recognised in `b` than in `a`, each at its own best step: "gain", with its 95 %
    interval, paired by training, seed of the attack and picture. Attacks that met only one of them are left out."""
    found = []
    for name, part in rows[rows.group == "forget"].groupby("name", sort=False):
        if not {a, b} <= set(part.model):
            continue
        best = part.groupby(["model", "step"]).hit.mean().groupby("model").idxmax()
        peak = pd.concat([part[(part.model == m) & (part.step == best[m][1])] for m in (a, b)])
        over = [column for column in ("training", "attack_seed", "seed") if peak[column].nunique() > 1]
        found.append({"attack": name} | dict(zip(("gain", "low", "high"), paired_interval(peak, a, b, over=over))))
    return pd.DataFrame(found, columns=["attack", "gain", "low", "high"])


def strongest(table):
    """The row of each model's strongest attack: the highest peak, and of equal ones the earlier revival, then the larger area."""
    order = table.sort_values(["peak", "revived", "area"], ascending=[False, True, False], kind="stable")
    return order.groupby("model", sort=False).head(1).set_index("model")


def dots(table, threshold=0.5):
    """Figure: a line an attack, the strongest against the defended model on top; a dot a model at its peak, with its interval, and a tick where it began."""
    models = sorted(set(table.model) - set(COLORS)) + [m for m in COLORS if m in set(table.model)]  # the defended one is the last
    order = table[table.model == models[-1]].sort_values(["peak", "area"]).attack.tolist()
    order = [*(a for a in dict.fromkeys(table.attack) if a not in order), *order]
    fig, ax = plt.subplots(figsize=(6.4, 0.34 * len(order) + 1))
    for i, model in enumerate(models):
        part = table[table.model == model]
        y = [order.index(a) + 0.16 * (i - (len(models) - 1) / 2) for a in part.attack]
        color = COLORS.get(model, sns.color_palette()[i])
        ax.hlines(y, part.low, part.high, color=color, lw=2, alpha=0.5)
        ax.scatter(part.peak, y, color=color, label=model, zorder=3, s=26, marker="os^D"[i % 4])
        ax.scatter(part.start, y, color=color, marker="|", s=40, zorder=2)
    ax.axvline(threshold, color="#999999", lw=0.8, ls=":")
    ax.set(yticks=range(len(order)), yticklabels=order, xlim=(-0.03, 1.03), xlabel="concept recognised at the attack's best step (tick: before it)")
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1.0 + 1.1 / len(order)), ncols=len(models), frameon=False)
    return fig


def working(table):
    """Attack → {model: peak} of the models of a table on which it brings the concept back: the lower end of its peak's interval is above the model's floor, what it draws of the concept
    unattacked (the median of the attacks' starts: some change the model before their first step). An attack that does so on none shows nothing of any defence."""
    floor = table.groupby("model").start.median()
    return {attack: {row.model: row.peak for row in part.itertuples() if row.low > floor[row.model]} for attack, part in table.groupby("attack", sort=False)}


def verdict(table, gain, defended="meta-unlearned", plain="unlearned", threshold=0.5):
    """What the table says of the defended model, in sentences: first where it fails. An attack defeats it if the concept is recognised in more than `threshold` of the pictures."""
    mine = table[table.model == defended].sort_values("peak", ascending=False)
    if mine.empty:
        raise ValueError(f"no attack on a model {defended!r}: the table has {', '.join(sorted(set(table.model)))}")
    lost, top = mine[mine.peak > threshold], mine.iloc[0]
    words = lambda r: f"{r.attack} ({r.peak:.0%} after {r.step:g} steps)"
    first = (f"Meta-unlearning fails against {len(lost)} of {len(mine)} attacks, after which the concept is recognised in more than {threshold:.0%} of the pictures: {', '.join(words(r) for r in lost.itertuples())}."
             if len(lost) else f"None of {len(mine)} attacks brings the concept back into more than {threshold:.0%} of the pictures of the meta-unlearned model.")
    first += f" The strongest against it is {words(top)}, 95 % interval {top.low:.0%} to {top.high:.0%}."
    theirs = table[table.model == plain]
    if theirs.empty:
        return [first]
    worst = theirs.sort_values("peak").iloc[-1]
    second = f"Against the plainly unlearned model the strongest is {words(worst)}; {(theirs.peak > threshold).sum()} of {len(theirs)} attacks bring more than {threshold:.0%} back."
    works = working(table)
    elsewhere = {a: ", ".join(f"{m} ({peak:.0%})" for m, peak in works[a].items() if m not in (plain, defended)) for a in theirs.attack if plain not in works[a]}
    second += f" These do not clearly bring it back there, so that they show nothing of the defence: {', '.join(elsewhere)}." if elsewhere else ""
    other = [f"{attack} on {models}" for attack, models in elsewhere.items() if models]
    second += f" That they can is seen on other models: {'; '.join(other)}." if other else ""
    clear = gain[gain.low > 0].attack.tolist()
    worse = gain[gain.high < 0].attack.tolist()
    third = f"The meta-unlearned model gives back less than the plain one, with a 95 % interval above 0, under {len(clear)} of {len(gain)} attacks: {', '.join(clear) or 'none'}."
    third += f" It gives back more under: {', '.join(worse)}." if worse else ""
    return [first, second, third]


def self_destruction(rows, clean, group="related", by="model"):
    """A table with a row for each attack by training and model (by="run": each of its trainings): loss of the related concepts at the attack's last step that CLEAN was judged at, too, the
    loss by CLEAN at that step, and the self-destruct index, their difference (`mu.statistics.self_destruct_index`). clean: rows of a CLEAN fine-tuning of the same models."""
    found = []
    for (name, model), part in rows[(rows.group == group) & (rows.attack != "prompt")].groupby(["name", by], sort=False):
        means = lambda table: table[(table[by] == model) & (table.group == group)].groupby("step").hit.mean()
        attacked, reference = means(part), means(clean)
        common = sorted(set(attacked.index) & set(reference.index) - {0})
        if common and 0 in attacked.index and 0 in reference.index:
            after = (attacked[0], attacked[common[-1]], reference[0], reference[common[-1]])
            found.append({"attack": name, by: model, "after": common[-1], "lost to the attack": after[0] - after[1], "lost to CLEAN": after[2] - after[3],
                          "self-destruct index": self_destruct_index(*after)})
    return pd.DataFrame(found, columns=["attack", by, "after", "lost to the attack", "lost to CLEAN", "self-destruct index"])
