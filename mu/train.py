"""The loops, as generators: each yields one frozen record after each step. Progress, logging and stopping belong to the caller."""

import math
import time
from dataclasses import dataclass

import torch

from mu.meta import inner_step, make_inner_optimizer, meta_gradient
from mu.models import rows, trainable
from mu.objectives import denoising, draw_minibatch, esd, gradients, predictions, sample_trajectory, squared_errors


@dataclass(frozen=True)
class Record:
    step: int  # steps done, this one included
    losses: dict  # name → float, before the update
    passes: int  # forward passes of the UNet, the frozen one and trajectories included
    seconds: float


class State:
    """What a loop needs to go on where it stopped: trained weights, optimiser, random generators, step. Goes to safetensors by `tensors()`."""

    def __init__(self, unet, subset="f", lr=1e-5, optimizer="adamw", weight_decay=1e-4, seed=0):
        kinds = {"adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay, fused=True),
                 "adam": lambda p: torch.optim.Adam(p, lr=lr, fused=True), "sgd": lambda p: torch.optim.SGD(p, lr=lr, fused=True)}
        if optimizer not in kinds:
            raise ValueError(f"unknown optimiser {optimizer!r}: allowed are {', '.join(kinds)}")
        self.unet, self.step = unet, 0
        self.named = trainable(unet, subset)
        self.parameters = list(self.named.values())
        self.optimizer = kinds[optimizer](self.parameters)
        # one stream a purpose: that a term is switched off does not change the draws of the others
        self.generators = {name: torch.Generator().manual_seed(seed * 1000 + i) for i, name in enumerate(("unlearn", "retain", "meta", "finetune"))}
        self.trajectory = None

    def tensors(self):
        """Flat dict of tensors, everything that `load` needs."""
        out = {"step": torch.tensor(self.step)} | {f"weights/{n}": p.detach() for n, p in self.named.items()}
        for name, p in self.named.items():
            out |= {f"optimizer/{name}/{k}": torch.as_tensor(v) for k, v in self.optimizer.state.get(p, {}).items()}
        out |= {f"generator/{n}": g.get_state() for n, g in self.generators.items()}
        if self.trajectory:
            out |= dict(zip(("trajectory/latents", "trajectory/timesteps", "trajectory/prompt"), self.trajectory))
        return out

    @torch.no_grad()
    def load(self, tensors):
        """Take over a saved state. Raises ValueError if it belongs to another set of trained weights."""
        names = {n.removeprefix("weights/") for n in tensors if n.startswith("weights/")}
        if names != set(self.named):
            raise ValueError(f"this checkpoint trains {len(names)} tensors, this run {len(self.named)}; first difference: {sorted(names ^ set(self.named))[0]}")
        self.step = int(tensors["step"])
        for name, p in self.named.items():
            p.copy_(tensors[f"weights/{name}"])
            saved = {k.rsplit("/", 1)[1]: v.clone() for k, v in tensors.items() if k.startswith(f"optimizer/{name}/")}
            if saved:
                self.optimizer.state[p] = saved
        for name, g in self.generators.items():
            g.set_state(tensors[f"generator/{name}"].clone())
        if "trajectory/latents" in tensors:
            self.trajectory = tuple(tensors[f"trajectory/{k}"].clone() for k in ("latents", "timesteps", "prompt"))


def _finite(losses, step):
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"not finite: {', '.join(bad)} is {losses[bad[0]]} at step {step + 1}: the weights of step {step} are kept; "
                                 "lower the learning rate or a weight, or bound the loss")


def finetune(state, noise_scheduler, concept_set, *, steps, batch_size=8):
    """Fine-tuning on a concept set by the denoising loss: the attack (on the concept), CLEAN (on others). Yields `Record`s.

    Optimiser, learning rate and subset are those of `state`; a state that has done k steps does the other steps − k."""
    g = state.generators["finetune"]
    while state.step < steps:
        began = time.perf_counter()
        loss = squared_errors(state.unet, denoising(draw_minibatch(concept_set, noise_scheduler, batch_size, g)))[0]
        _finite({"finetune": loss.item()}, state.step)
        inner_step(state.parameters, loss, state.optimizer)
        state.step += 1
        yield Record(state.step, {"finetune": loss.item()}, 1, time.perf_counter() - began)


def _draw(value, generator, log=False):
    """A number as it is; from a (low, high) pair one at random (integers uniformly, learning rates log-uniformly); from a list one of it."""
    if isinstance(value, list):
        return value[int(torch.randint(len(value), (), generator=generator))]
    if not isinstance(value, tuple):
        return value
    low, high = value
    u = torch.rand((), generator=generator).item()
    return low * (high / low) ** u if log else low + int(u * (high - low + 1))


def unlearn(
    state, unet_frozen, noise_scheduler, forget, retain_related, retain_unrelated, unconditional, retain_prompts=None, *, steps,
    unlearn=1.0, eta=1.0, guidance=3.0, batch_size=4, trajectory_steps=50, trajectory_reuse=1,
    retain=0.0, ascent=0.0, relearn=0.0, self_destruct=0.0, clean=0.0, clean_every=3,
    inner_steps=1, inner_lr=1e-5, inner_optimizer="sgd", inner_batch_size=8, retain_batch_size=8, order="first", bound=math.inf, clip=1.0,
):
    """Unlearning (ESD) and meta-unlearning in one loop; with all meta weights 0 it is plain unlearning, bit for bit. Yields `Record`s.

    Minimises over the trained weights θ (arXiv 2410.12777, eq. 3–5; every loss is a mean over elements, t over all timesteps):

        unlearn · L_ESD(θ) + retain · ⅓ [D(θ; related) + D(θ; unrelated) + D(θ; ∅) + D(θ; any)] − ascent · L(θ; forget)
        − relearn · L(θ_FT; forget) − self_destruct · [L(θ_FT; related) − L(θ; related)]

    and at every `clean_every`-th step, in place of the last line,

        + clean · ½ [L(θ_CL; related) − L(θ; related) + L(θ_CL; unrelated) − L(θ; unrelated)].

    D, the drift: mean squared difference to the frozen UNet's predictions (the denoising loss with its target's noise taken out, as far
    as the frozen UNet predicts the mean of that noise); ∅: the unrelated images with the empty prompt, which guidance leans on; any: the
    same with one of `retain_prompts` (a conditioning, or None for no such term) each: what other prompts draw, of which there are no images.
    θ_FT: θ after `inner_steps` steps on the forget set, θ_CL: on the unrelated set. The two terms of a bracket share minibatch,
    noise and timesteps (common random numbers), so a bracket is exactly 0 at θ_FT = θ.
    inner_steps, inner_lr: a number, or (low, high) to draw from at each step; inner_optimizer: "sgd", "adam" or a list to draw from.
    bound: a loss after the attack that is above it is not pushed further. ascent: of the forget loss at θ, without an
        inner loop (the relearn term's zeroth order); alone it is a control.
    eta, guidance: ESD's. trajectory_steps: DDIM steps of a student trajectory; trajectory_reuse: steps that share one batch of
    trajectories, each with a random point of its own.
    Passes a step, first order: 1 at θ, inner_steps + 1 from there to θ_FT, 1 of the frozen UNet, and the trajectories'; the second
    order has M(M + 1)/2 more (see `mu.meta.meta_gradient`).
    Raises ValueError when every weight is 0, FloatingPointError on a loss that is not finite: `state` then still holds the last good step."""
    if not any((unlearn, retain, ascent, relearn, self_destruct, clean)):
        raise ValueError("every weight is 0, so there is nothing to minimise: give unlearn, retain, ascent, relearn, self_destruct or clean a weight")
    unet, parameters = state.unet, state.parameters
    names = inner_optimizer if isinstance(inner_optimizer, list) else [inner_optimizer]
    inner_optimizers = {name: make_inner_optimizer(name, parameters) for name in names}
    g_unlearn, g_retain, g_meta = (state.generators[name] for name in ("unlearn", "retain", "meta"))
    draw = lambda concept_set, g, n=inner_batch_size: draw_minibatch(concept_set, noise_scheduler, n, g)
    empty = lambda n: rows(unconditional, torch.zeros(n, dtype=torch.long))
    passes = []
    hooks = [net.register_forward_hook(lambda *_: passes.append(1)) for net in (unet, unet_frozen)]
    try:
        while state.step < steps:
            began, after = time.perf_counter(), {}
            passes.clear()
            if clean and state.step % clean_every == clean_every - 1:
                attacked, after = retain_unrelated, {"related": clean / 2, "unrelated": clean / 2}
            elif relearn or self_destruct:
                attacked, after = forget, {"forget": -relearn, "related": -self_destruct}

            asked = {}  # of the frozen UNet, in one pass
            if unlearn:
                if state.trajectory is None or state.step % trajectory_reuse == 0:
                    prompt = torch.randint(len(forget.prompts), (batch_size,), generator=g_unlearn)
                    state.trajectory = (*sample_trajectory(
                        unet, noise_scheduler, rows(forget.conditioning, prompt), unconditional, g_unlearn, guidance, trajectory_steps,
                        shape=forget.mean.shape[1:], points=trajectory_reuse), prompt.repeat(trajectory_reuse))
                some = slice(state.step % trajectory_reuse * batch_size, (state.step % trajectory_reuse + 1) * batch_size)
                latents, timesteps, prompt = (x[some] for x in state.trajectory)
                asked["no concept"] = latents, timesteps, empty(len(latents))
                asked["concept"] = latents, timesteps, rows(forget.conditioning, prompt)
            batches = {"related": draw(retain_related, g_retain, retain_batch_size),
                       "unrelated": draw(retain_unrelated, g_retain, retain_batch_size)} if retain or after else {}
            if retain:
                asked |= {name: denoising(batch)[:3] for name, batch in batches.items()}
                latents, timesteps = (x[::2] for x in asked["unrelated"][:2])  # every second: half of them, over all timesteps
                asked["empty"] = latents, timesteps, empty(len(latents))
                if retain_prompts:
                    some = torch.randint(len(retain_prompts["encoder_hidden_states"]), (len(latents),), generator=g_retain)
                    asked["any"] = latents, timesteps, rows(retain_prompts, some)
            frozen = dict(zip(asked, predictions(unet_frozen, *asked.values())))

            parts, weights = [], {}  # weights in the order of the parts' targets: by it the losses get their names
            if unlearn:
                parts.append((*asked["concept"], esd(frozen["no concept"], frozen["concept"], eta)))
                weights["unlearn"] = unlearn
            for name, batch in batches.items():
                parts.append((*denoising(batch), *([frozen[name]] if retain else [])))
                weights |= {name: -after.get(name, 0.0)} | ({f"{name} drift": retain / 3} if retain else {})
            for name in [name for name in ("empty", "any") if name in asked]:
                parts.append((*asked[name], frozen[name]))
                weights[f"{name} drift"] = retain / 3
            if ascent:
                parts.append(denoising(draw(forget, g_meta)))
                weights["forget"] = -ascent
            losses = dict(zip(weights, squared_errors(unet, *parts)))
            gradient = gradients(sum(weights[name] * loss for name, loss in losses.items()), parameters)
            losses = {name: loss.item() for name, loss in losses.items()}

            if after:
                inner = [draw(attacked, g_meta) for _ in range(_draw(inner_steps, g_meta))]
                batches["forget"] = draw(forget, g_meta)

                def outer_loss():
                    values = dict(zip(after, squared_errors(unet, *(denoising(batches[name]) for name in after))))
                    losses.update({f"{name} after": value.item() for name, value in values.items()})
                    return sum(w * (values[name].clamp(max=bound) if w < 0 else values[name]) for name, w in after.items())

                _, simulated = meta_gradient(
                    parameters, [lambda batch=batch: squared_errors(unet, denoising(batch))[0] for batch in inner], outer_loss,
                    inner_optimizers[_draw(inner_optimizer, g_meta)], _draw(inner_lr, g_meta, log=True), order)
                gradient = [a + b for a, b in zip(gradient, simulated)]

            norm = torch.nn.utils.get_total_norm(gradient)
            _finite(losses | {"gradient norm": norm.item()}, state.step)
            for p, g in zip(parameters, gradient):
                p.grad = g
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            yield Record(state.step, losses, len(passes), time.perf_counter() - began)
    finally:
        for hook in hooks:
            hook.remove()
