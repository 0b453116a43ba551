"""The objective of unlearning and meta-unlearning: arXiv 2410.12777, eq. 3-5."""

import math
from dataclasses import dataclass

from mu.attackers import Attacker, Inner
from mu.controls import Controls
from mu.draws import SAMPLED
from mu.frozen import reference
from mu.losses import Term, denoising, predictions
from mu.targets import ESD, SDD

DRIFT_TERMS = ("related", "unrelated", "empty", "any", "sampled")


@dataclass(frozen=True)
class Weights:
    """Weights of the objective; 0 switches a term off."""

    unlearn: float = 1.0  # γ1: the method's own loss at θ
    retain: float = 0.0  # drift D from the frozen UNet at θ (ours)
    learn_related: float = 0.0  # L(θ; related), the public code's retention
    learn_unrelated: float = 0.0  # L(θ; unrelated), likewise
    ascent: float = 0.0  # −min[L(θ; forget), ascent_bound], no simulated attack (ours)
    relearn: float = 0.0  # γ2: −L(θ_FT; forget)
    self_destruct: float = 0.0  # γ2 ζ: −[L(θ_FT; related) − L(θ; related)]
    keep: float = 0.0  # L(θ_FT; unrelated), and the drift there on own unrelated samples (ours)
    clean: float = 0.0  # ½ [...] of related and unrelated after simulated CLEAN (ours)


@dataclass(frozen=True)
class Objective:
    """What a training minimises over the trained weights θ.

        unlearn · L_method(θ) + retain · ⅓ Σ_x D(θ; x) − ascent · L(θ; forget)
        + learn_related · L(θ; related) + learn_unrelated · L(θ; unrelated)
        − relearn · L(θ_FT; forget) − self_destruct · [L(θ_FT; related) − L(θ; related)]
        + keep · [L(θ_FT; unrelated) + D(θ_FT; sampled unrelated)]

    where every `clean_every`-th step has, in place of the last two lines,

        clean · ½ Σ_{x = related, unrelated} [L(θ_CL; x) − L(θ; x)].

    θ_FT and θ_CL are θ after a simulated fine-tuning on the forget and on the unrelated set
    (`mu.attackers.Attacker`). Every loss is a mean over elements. The two losses of a bracket share
    images, noise and timesteps. The term of keep has no second half: with a weight above the
    drift's, it would ask for an unbounded loss at θ. The drift D(θ; x) is the mean squared
    difference to the frozen UNet's predictions: the denoising loss without the noise of its
    target. Its x are noisy related and unrelated images ("related", "unrelated"), unrelated ones
    with the empty prompt ("empty") or a random one ("any"), and points of θ's own trajectories
    ("sampled": with related and unrelated prompts, and with the empty one).
    With relearn = self_destruct = clean = 0 this is plain ESD or SDD, bit for bit.
    """

    weights: Weights = Weights()
    method: ESD | SDD = ESD()
    inner: Inner = Inner()
    clean_every: int = 3  # every n-th step simulates CLEAN instead of the attack
    drift_terms: tuple[str, ...] = DRIFT_TERMS[:-1]  # x of D: images, other prompts, own samples
    retain_guidance: float = 5.0  # scale of the trajectories of "sampled"
    retain_batch_size: int = 16  # images per step and retain set; half for the other x
    ascent_bound: float = float("inf")  # largest L(θ; forget) that ascent asks for
    timestep: int | None = None  # of every denoising loss; None: random
    clip: float = 1.0  # largest norm of the gradient
    meta_clip: float = 0.0  # largest norm of each gradient at θ_FT, in norms of that at θ; 0: any
    drift_bound: float = math.inf  # drift at θ from which `meta_clip` shrinks (`guards.calm`)
    controls: Controls = Controls()

    @property
    def simulates(self):
        """Return whether steps simulate attackers."""
        w = self.weights
        return bool(w.relearn or w.self_destruct or w.clean)

    def attacker(self, step):
        """Return the `Attacker` that step number `step` (from 0) simulates, or None."""
        w = self.weights
        if w.clean and step % self.clean_every == self.clean_every - 1:
            measured = {"related": w.clean / 2, "unrelated": w.clean / 2}
            return Attacker("unrelated", measured, brackets=("related", "unrelated"))
        if not (w.relearn or w.self_destruct):
            return None
        visits = step - step // self.clean_every if w.clean else step
        measured = {"forget": -w.relearn, "related": -w.self_destruct}
        if w.keep:
            measured["unrelated"] = w.keep
        return Attacker("forget", measured, visits % self.inner.pool, ("related",))

    def check(self, state, runtime):
        """Raise ValueError for what cannot be minimised."""
        if not any((*vars(self.weights).values(), self.controls.active)):
            raise ValueError(
                "every weight is 0, nothing to minimise: give unlearn, retain, ascent, relearn, "
                "self_destruct or clean a weight"
            )
        inner = self.inner
        warm = dict(one_prompt=inner.one_prompt, head_start=inner.head_start)
        warm |= dict(inner_rank=any(inner.rank))
        if not inner.horizon and (given := [name for name, value in warm.items() if value]):
            raise ValueError(
                f"{given[0]} is for attackers that persist, and horizon is 0: set a horizon, such "
                f"as [100, 200], or leave {given[0]} at its default"
            )
        if self.drift_bound < math.inf and not (self.meta_clip and self.weights.retain):
            raise ValueError(
                f"drift_bound is {self.drift_bound:g}, a drift from which meta_clip shrinks: "
                "set meta_clip and retain, such as 1.5 and 100, or drift_bound to 0"
            )
        if unknown := sorted(set(self.drift_terms) - set(DRIFT_TERMS)):
            raise ValueError(f"unknown drift term {unknown[0]!r}: choose {', '.join(DRIFT_TERMS)}")
        if isinstance(self.method, SDD) and state.ema is None:
            raise ValueError("SDD returns a running average of the weights: set ema, e.g. 0.999")
        self.controls.check(runtime)


PLAIN = Objective(Weights(retain=5.0))
META = Objective(
    Weights(2.0, retain=100.0, ascent=1.0, self_destruct=300.0, keep=60.0, clean=12.0),
    inner=Inner(
        steps=(8, 8),
        lr=(4e-5, 2e-4),
        batch_size=4,
        horizon=(100, 200),
        one_prompt=0.5,
        head_start=(48, 48),
    ),
    clean_every=4,
    drift_terms=DRIFT_TERMS,
    ascent_bound=30.0,
    meta_clip=1.5,
    drift_bound=0.015,
)


def frozen_predictions(unet, unet_frozen, draws, objective, runtime):
    """Return what the frozen UNet predicts for the targets of a step, by name, in one pass."""
    asked = objective.method.asked(draws) if objective.weights.unlearn else {}
    if objective.weights.retain:
        kept = [name for name in draws.retained if name in objective.drift_terms]
        asked |= {name: draws.retained[name].inputs for name in kept} | draws.prompts
    with reference(unet, unet_frozen) as net:
        found = predictions(net, list(asked.values()), runtime.accumulation)
    return dict(zip(asked, found, strict=True))


def terms_at_theta(unet, draws, frozen, objective, runtime):
    """Return the terms of the objective at θ. Their order is the row order of the pass.

    frozen: predictions of the frozen UNet by name. A related or unrelated loss gets the opposite
    of its weight after the simulated attack: the bracket's second half.
    """
    weights, terms = objective.weights, []
    drift = weights.retain / 3
    if weights.unlearn:
        target = objective.method.target(frozen, unet, draws, runtime)
        terms.append(Term("unlearn", weights.unlearn, draws.concept, target))
    learn = {"related": weights.learn_related, "unrelated": weights.learn_unrelated}
    after = draws.simulation.attacker.bracketed if draws.simulation else {}
    for name, batch in draws.retained.items():
        terms.append(denoising(batch, name, learn[name] - after.get(name, 0.0)))
        if name in frozen:
            terms.append(Term(f"{name} drift", drift, batch.inputs, frozen[name]))
    for name, inputs in draws.prompts.items():
        share = 0.5 if name.startswith("sampled") else 1.0  # halves of the own samples
        terms.append(Term(f"{name} drift", share * drift, inputs, frozen[name]))
    if weights.ascent:
        term = denoising(draws.ascent, "forget", -weights.ascent, bound=objective.ascent_bound)
        terms.append(term)
    return terms


def terms_after_attack(draws, frozen, objective):
    """Return the terms of the objective at θ_FT or θ_CL; maximised losses are bounded."""
    inner, attacker = objective.inner, draws.simulation.attacker
    bounds = {"bound": inner.bound}
    if inner.image_bound < math.inf:
        bounds = {"image_bound": inner.image_bound}
    terms = [
        denoising(draws.simulation.outer[name], name, weight, **(bounds if weight < 0 else {}))
        for name, weight in attacker.measured.items()
    ]
    keep = objective.weights.keep
    if attacker.trains_on == "forget" and keep > 0:
        own = [name for name in SAMPLED[1] if name in frozen]
        terms += [Term(f"{name} drift", keep, draws.prompts[name], frozen[name]) for name in own]
    return terms
