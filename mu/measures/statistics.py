"""Numbers with intervals: steps to revival, the relearning curve, self-destruction, and bootstrap intervals over seeds and prompts.

Everything here takes scores, shares in 0…1, and knows no model. NaN is refused: a picture that nobody judged is not a miss."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import CensoredData, binomtest, bootstrap, ecdf, t


def score(hits, level=0.95, seed=0, means=False):
    """Mean and its interval: (mean, low, high). Wilson's for hits (0 or 1), which holds near 0 and 1 too; percentile bootstrap for `means`
    (of seeds)."""
    hits = np.asarray(hits, float)
    if not len(hits) or not np.isfinite(hits).all():
        raise ValueError(f"a score needs at least one finite value, got {hits}")
    if not means:
        if not np.isin(hits, (0, 1)).all():
            raise ValueError(f"hits are 0 or 1, got {hits}: say means=True for means")
        found = binomtest(int(hits.sum()), len(hits)).proportion_ci(level, method="wilson")
        return hits.mean(), found.low, found.high
    if (hits == hits[0]).all():
        return hits.mean(), hits.mean(), hits.mean()
    found = bootstrap(
        (hits,), np.mean, confidence_level=level, method="percentile", n_resamples=2000, rng=seed
    ).confidence_interval
    return hits.mean(), found.low, found.high


def differences(table, names):
    """Each model minus the first, in each group, paired by prompt and seed: a line each, with the interval over those columns of the two that vary.

    table: rows with "run", "group", "prompt", "seed", "hit". No interval where neither varies."""
    found = []
    for name in names[1:]:
        for group, part in table[table.run.isin([name, names[0]])].groupby("group", sort=False):
            over = [column for column in ("prompt", "seed") if part[column].nunique() > 1]
            values = (
                paired_interval(part, name, names[0], "run", over)
                if over
                else (np.nan, np.nan, np.nan)
            )
            found.append(
                {
                    "run": name,
                    "group": group,
                    **dict(zip((f"minus {names[0]}", "low", "high"), values, strict=False)),
                    "over": " and ".join(over) or "one picture",
                }
            )
    return pd.DataFrame(found)


def scores(table, by, over=None):
    """Mean of "hit" and its 95 % interval in each group of rows: over images, or over the means of each `over` (columns; no interval from one)."""
    parts = [
        (key, part.hit if over is None else part.groupby(over).hit.mean())
        for key, part in table.groupby(by, sort=False)
    ]

    def interval(hits):
        return (
            score(hits, means=over is not None)
            if len(hits) > 1 and hits.notna().all()
            else (hits.mean(),)
        )  # no judge: no score

    found = [
        dict(zip(by, key, strict=False))
        | dict(zip(("score", "low", "high"), interval(hits), strict=False))
        | {"n": len(hits)}
        for key, hits in parts
    ]
    return pd.DataFrame(found, columns=[*by, "score", "low", "high", "n"])


def revival(table, threshold=0.5):
    """First evaluated step with a concept's score above the threshold, a row a run, learning rate and attack seed; inf if there is none."""
    one = ["model", "run", "lr", "attack_seed"]
    curve = (
        table[table.group == "forget"]
        .groupby([*one, "step"], sort=False, as_index=False)
        .hit.mean()
    )
    found = {
        key: (relearning_step(c.step, c.hit, threshold), c.step.max())
        for key, c in curve.groupby(one, sort=False)
    }
    return pd.DataFrame(
        [
            dict(zip(one, key, strict=False))
            | {"revived": float("inf") if r.censored else r.step, "last": last}
            for key, (r, last) in found.items()
        ]
    )


@dataclass(frozen=True)
class Revival:
    """When a concept came back, as far as somebody looked."""

    step: float  # first evaluated step at which the score was above the threshold; where it never was, the last evaluated one
    after: float  # the evaluated step before that one: it came back in (after, step]; -inf if it was there at the first; the last step if censored
    censored: bool  # it had not come back at the last evaluated step, which does not say that it never would


def curve(steps, scores):
    """Steps and scores of one curve as arrays. Raises ValueError for NaN, for steps that do not rise, for scores that are not one a step."""
    steps, scores = np.asarray(steps, float), np.asarray(scores, float)
    if steps.shape != scores.shape or steps.ndim != 1 or not len(steps):
        raise ValueError(
            f"a curve has one score a step, got {steps.size} steps and {scores.size} scores"
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"the scores hold NaN or infinite values at the steps {steps[~np.isfinite(scores)].tolist()}: judge these pictures, or leave the steps out"
        )
    if (np.diff(steps) <= 0).any():
        raise ValueError(
            f"the steps of a curve rise, got {steps.tolist()}: one curve is one run and one seed of the attack"
        )
    return steps, scores


def relearning_step(steps, scores, threshold=0.5):
    """The `Revival` of one curve: the first evaluated step with a score above the threshold, right-censored at the last. Raises as `curve` does."""
    steps, scores = curve(steps, scores)
    over = np.flatnonzero(scores > threshold)
    if not len(over):
        return Revival(steps[-1], steps[-1], True)
    return Revival(steps[over[0]], steps[over[0] - 1] if over[0] else -np.inf, False)


def median_relearning_step(relearning_table):
    """Kaplan and Meier's median of several runs' steps to revival; inf where less than half of them are known to have come back.

    A censored run counts as one that lasted at least until its last look, which is what a plain mean or median of the steps gets wrong."""
    found = CensoredData(
        uncensored=[r.step for r in relearning_table if not r.censored],
        right=[r.step for r in relearning_table if r.censored],
    )
    alive = ecdf(found).sf
    return next(
        (
            float(step)
            for step, share in zip(alive.quantiles, alive.probabilities, strict=False)
            if share <= 0.5
        ),
        np.inf,
    )


def restricted_mean_relearning(relearning_table, until):
    """Mean number of steps without the concept up to step `until`: the area under Kaplan and Meier's curve.

    Raises ValueError where a run was not looked at for so long."""
    if any(r.censored and r.step < until for r in relearning_table):
        raise ValueError(
            f"a run was looked at up to step {min(r.step for r in relearning_table if r.censored):g} only: `until` may be no later, got {until:g}"
        )
    return float(np.mean([min(r.step, until) for r in relearning_table]))


def relearning_area(steps, scores):
    """Mean height of the relearning curve, 0…1: its area by trapezoids, divided by the steps looked at. 0: never recognised, 1: always.

    It needs no threshold, and compares models attacked at the same steps only. Raises as `curve` does, and for a single step."""
    steps, scores = curve(steps, scores)
    if len(steps) < 2:
        raise ValueError(f"an area needs two steps or more, got {steps.tolist()}")
    return float(np.trapezoid(scores, steps) / (steps[-1] - steps[0]))


def self_destruct_index(before, attacked, reference_before, reference_after):
    """How much of the related concepts an attack on the concept destroys beyond what fine-tuning destroys anyway.

    (before − attacked) − (reference_before − reference_after), each a score of the related concepts. Any fine-tuning costs something, so a loss by itself
    says nothing; the reference is what else could have caused it: the same model after the same number of steps on other images (CLEAN: is it the *concept*
    that sets it off?), or a plainly unlearned model under the same attack (is it the *defence*?). Above 0: it self-destructs; 0: as fragile as the reference; below: less.
    Within −1…1 against CLEAN, where the two scores before are one. Raises ValueError for scores outside 0…1 and NaN."""
    scores = np.asarray([before, attacked, reference_before, reference_after], float)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores lie within 0…1, got {scores.tolist()}")
    return float((scores[0] - scores[1]) - (scores[2] - scores[3]))


def interval(table, over=("seed", "prompt"), value="hit", level=0.95, resamples=2000, seed=0):
    """Mean of a column and its percentile bootstrap interval: (mean, low, high).

    over: the columns whose values might have been others: seeds of training or attack, prompts, pictures. Each is drawn anew with replacement by itself (Owen's
    pigeonhole bootstrap, 2007), for the same prompts are drawn with every seed: to draw prompts afresh within each seed would take them for so many different ones, and
    be too narrow. A little too wide rather than too narrow, most so where pictures differ much and seeds and prompts little;
    but of a column with fewer than about six values that differ much, such as three trainings, too narrow: see `student_interval`.
    All values alike give an interval without width: for hits, `mu.measures.statistics.score` is the better one there.
    Raises ValueError for NaN, for a missing column, and for a column with a single value, which says nothing of others: leave it out of `over`."""
    over = [over] if isinstance(over, str) else list(over)
    absent = {*over, value} - set(table.columns)
    if absent or not over:
        raise ValueError(
            f"the table has no {', '.join(sorted(absent)) or 'column to resample'}; it has: {', '.join(map(str, table.columns))}"
        )
    values = table[value].to_numpy(float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} values of {value!r} are NaN or infinite: judge these pictures, or take them out and say so"
        )
    rng, weights = np.random.default_rng(seed), 1.0
    for column in over:
        codes, known = pd.factorize(table[column])
        if len(known) < 2:
            raise ValueError(
                f"there is one {column} only ({known[0]!r}): an interval over it needs two or more; leave it out of `over`"
            )
        weights = (
            weights
            * rng.multinomial(len(known), np.full(len(known), 1 / len(known)), resamples)[:, codes]
        )
    total = weights.sum(1)
    means = (weights @ values)[total > 0] / total[
        total > 0
    ]  # in a table with gaps a draw may hit nothing
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


FEW = 6  # trainings below which a bootstrap over them alone is too narrow


def student_interval(means, level=0.95):
    """Mean of a few independent values and Student's interval: (mean, low, high). For the means of trainings, of which there are three: a bootstrap draws one and the same too often.

    Raises ValueError for less than two values, and for NaN."""
    means = np.asarray(means, float)
    if len(means) < 2 or not np.isfinite(means).all():
        raise ValueError(
            f"an interval over trainings needs two or more, each with a score, got {means.tolist()}"
        )
    half = t.ppf((1 + level) / 2, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return float(means.mean()), float(means.mean() - half), float(means.mean() + half)


def paired_interval(table, a, b, column="model", over=("seed", "prompt"), value="hit", **options):
    """Difference of two methods' means, a − b, and its interval, as `interval` does it: (difference, low, high).

    column: where the methods' names stand. The two are compared seed by seed and prompt by prompt, and each draw is the same for both: what a prompt or a seed does to
    both cancels. Raises as `interval` does, and ValueError for a method that is not there or where the two do not have the same seeds and prompts."""
    known = table[column].unique().tolist()
    if not {a, b} <= set(known):
        raise ValueError(
            f"there is no {column} {a if a not in known else b!r}; there are: {', '.join(map(str, known))}"
        )
    over = [over] if isinstance(over, str) else list(over)
    part = table[table[column].isin([a, b])]
    if not np.isfinite(part[value].to_numpy(float)).all():
        raise ValueError(
            f"values of {value!r} are NaN or infinite: judge these pictures, or take them out of both and say so"
        )
    sides = part.groupby([*over, column])[value].agg(["mean", "size"]).unstack(column)
    alone = sides[sides.isna().any(axis=1)]
    if len(alone):
        raise ValueError(
            f"{a!r} and {b!r} are not paired, {len(alone)} of {len(sides)} are of one only, as {dict(zip(over, np.atleast_1d(alone.index[0]), strict=False))}"
        )
    if (sides["size", a] != sides["size", b]).any():
        raise ValueError(
            f"{a!r} and {b!r} are not paired: they have different numbers of pictures of one {' and '.join(over)}"
        )
    return interval(
        (sides["mean", a] - sides["mean", b]).rename(value).reset_index(), over, value, **options
    )
