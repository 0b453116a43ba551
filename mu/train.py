"""The loops, as generators: each yields one frozen record after each step. Progress, logging and stopping belong to the caller."""

import contextlib
import functools
import math
import time
from dataclasses import dataclass

import torch
from accelerate import PartialState
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel

from mu.meta import (
    angle,
    descend,
    eight_bit,
    expansion,
    inner_step,
    make_inner_optimizer,
    meta_gradient,
)
from mu.models import reference, select, trainable
from mu.objectives import (
    denoising,
    draw_minibatch,
    esd,
    gradients,
    own,
    predictions,
    sample_trajectory,
    squared_errors,
)


@dataclass(frozen=True)
class Record:
    step: int  # steps done, this one included
    losses: dict  # name → float, before the update
    passes: int  # forward passes of the UNet, the frozen one and trajectories included
    seconds: float


class State:
    """What a loop needs to go on where it stopped: trained weights, optimiser, their running average, random generators, step. Goes to
    safetensors by `tensors()`.

    subset, rank: see `mu.models.trainable`. optimizer: adamw, adam, sgd, or adamw8bit (bitsandbytes). ema: decay of a running average
    of the trained weights, which is then the result (SDD's teacher); 0: none. seed: of everything drawn at random, new adapters included.
    named: name → tensor of what is trained instead of weights of the UNet, such as the vector of a word (textual inversion)."""

    def __init__(
        self,
        unet,
        subset="f",
        lr=1e-5,
        optimizer="adamw",
        weight_decay=1e-4,
        seed=0,
        rank=16,
        ema=0.0,
        named=None,
    ):
        kinds = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay, fused=True),
            "adam": lambda p: torch.optim.Adam(p, lr=lr, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=lr, fused=True),
            "adamw8bit": lambda p: eight_bit("AdamW8bit")(p, lr=lr, weight_decay=weight_decay),
        }
        if optimizer not in kinds:
            raise ValueError(f"unknown optimiser {optimizer!r}: allowed are {', '.join(kinds)}")
        self.unet, self.step = unet, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.named = named or trainable(unet, subset, rank)
        self.parameters = list(self.named.values())
        self.optimizer = kinds[optimizer](self.parameters)
        self.ema = EMAModel(self.parameters, decay=ema, min_decay=ema) if ema else None
        if ema:
            self.ema.optimization_step = (
                1  # no warm-up: the decay is the same from the first step on
            )
        # one stream a purpose: that a term is switched off does not change the draws of the others
        self.generators = {
            name: torch.Generator().manual_seed(seed * 1000 + i)
            for i, name in enumerate(("unlearn", "retain", "meta", "finetune", "angle"))
        }
        self.trajectory = None

    def tensors(self):
        """Flat dict of tensors, everything that `load` needs."""
        out = {"step": torch.tensor(self.step)} | {
            f"weights/{n}": p.detach() for n, p in self.named.items()
        }
        for name, p in self.named.items():
            out |= {
                f"optimizer/{name}/{k}": torch.as_tensor(v).clone()
                if k.startswith("qmap")
                else torch.as_tensor(v)  # bitsandbytes shares these tables
                for k, v in self.optimizer.state.get(p, {}).items()
            }
        out |= (
            {f"ema/{name}": p for name, p in zip(self.named, self.ema.shadow_params, strict=False)}
            if self.ema
            else {}
        )
        out |= {f"generator/{n}": g.get_state() for n, g in self.generators.items()}
        if self.trajectory:
            out |= dict(
                zip(
                    ("trajectory/latents", "trajectory/timesteps", "trajectory/prompt"),
                    self.trajectory,
                    strict=False,
                )
            )
        return out

    @torch.no_grad()
    def load(self, tensors):
        """Take over a saved state. Raises ValueError if it belongs to another set of trained weights."""
        names = {n.removeprefix("weights/") for n in tensors if n.startswith("weights/")}
        if names != set(self.named):
            raise ValueError(
                f"this checkpoint trains {len(names)} tensors, this run {len(self.named)}; first difference: {sorted(names ^ set(self.named))[0]}"
            )
        self.step = int(tensors["step"])
        for name, p in self.named.items():
            p.copy_(tensors[f"weights/{name}"])
            saved = {
                k.rsplit("/", 1)[1]: v.to(p.device, copy=True)
                for k, v in tensors.items()
                if k.startswith(f"optimizer/{name}/")
            }
            if saved:  # torch counts steps in a float tensor, bitsandbytes in an int
                self.optimizer.state[p] = {
                    k: v.item() if v.dtype == torch.int64 and not v.ndim else v
                    for k, v in saved.items()
                }
        for name, average in (
            zip(self.named, self.ema.shadow_params, strict=False) if self.ema else ()
        ):
            average.copy_(tensors[f"ema/{name}"])
        for name, g in self.generators.items():
            g.set_state(tensors[f"generator/{name}"].clone())
        if "trajectory/latents" in tensors:
            self.trajectory = tuple(
                tensors[f"trajectory/{k}"].to(p.device, copy=True)
                for k in ("latents", "timesteps", "prompt")
            )

    @contextlib.contextmanager
    def averaged(self):
        """The UNet with the running average as its weights, where there is one, inside a `with` block."""
        if self.ema is None:
            yield self.unet
            return
        present = [p.detach().clone() for p in self.parameters]
        self.ema.copy_to(self.parameters)
        try:
            yield self.unet
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, present)

    def release(self):
        """Make the running average, if there is one, the UNet's weights for good: it is what is saved and judged. Returns the UNet."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        return self.unet


def _finite(losses, step, scale=1.0):
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"not finite: {', '.join(bad)} is {losses[bad[0]]} at step {step + 1}: the weights of step {step} are kept; "
            "lower the learning rate or a weight, or bound the loss"
            + (
                f"; in float16 numbers over 65504 are infinite: lower loss_scale ({scale:g}), or choose precision bf16 or no"
                if scale != 1
                else ""
            )
        )


def finetune(
    state,
    noise_scheduler,
    concept_set,
    *,
    steps,
    batch_size=8,
    others=None,
    others_weight=1.0,
    accumulation=1,
    loss_scale=1.0,
):
    """Fine-tuning on a concept set by the denoising loss: the attack (on the concept), CLEAN (on others). Yields `Record`s.

    Minimises L(θ; concept_set) + others_weight · L(θ; others). others: a set, or None: pictures of its class that the model itself has drawn (DreamBooth's
    prior preservation), or benign ones mixed in by an attacker who would keep the rest of the model whole; its batch is as large as the first.
    concept_set may be a function of the steps done, called before each: for phases, or where what is trained is read by the text encoder.
    Optimiser, learning rate and subset are those of `state`; a state that has done k steps does the other steps − k.
    accumulation: micro-batches of a pass, see `squared_errors`; loss_scale: see `gradients`. Raises FloatingPointError as `unlearn` does."""
    g = state.generators["finetune"]
    while state.step < steps:
        began = time.perf_counter()
        sets = [
            concept_set(state.step) if callable(concept_set) else concept_set,
            *([others] if others is not None and others_weight else []),
        ]
        found = squared_errors(
            state.unet,
            *(own(denoising(draw_minibatch(s, noise_scheduler, batch_size, g))) for s in sets),
            accumulation=accumulation,
        )
        losses, loss = (
            dict(zip(("finetune", "others"), (x.item() for x in found), strict=False)),
            found[0] + sum(others_weight * x for x in found[1:]),
        )
        _finite(losses, state.step, loss_scale)

        def overflow(gradient):
            return _finite(
                {"gradient norm": torch.nn.utils.get_total_norm(gradient).item()},
                state.step,
                loss_scale,
            )

        inner_step(
            state.parameters,
            loss,
            state.optimizer,
            loss_scale,
            check=overflow if loss_scale != 1 else None,
        )
        state.step += 1
        yield Record(
            state.step,
            losses,
            1 if accumulation == 1 else 2 * accumulation,
            time.perf_counter() - began,
        )


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
    state,
    unet_frozen,
    noise_scheduler,
    forget,
    retain_related,
    retain_unrelated,
    unconditional,
    retain_prompts=None,
    replace=None,
    *,
    steps,
    method="esd",
    unlearn=1.0,
    eta=1.0,
    guidance=3.0,
    batch_size=4,
    trajectory_steps=50,
    trajectory_reuse=1,
    retain=0.0,
    keep=("related", "unrelated", "empty", "any"),
    ascent=0.0,
    relearn=0.0,
    self_destruct=0.0,
    clean=0.0,
    clean_every=3,
    gradient_norm=0.0,
    alignment=0.0,
    timestep=None,
    inner_steps=1,
    inner_lr=1e-5,
    inner_optimizer="sgd",
    inner_batch_size=8,
    retain_batch_size=8,
    order="first",
    bound=math.inf,
    clip=1.0,
    angle_every=0,
    accumulation=1,
    snapshot=None,
    loss_scale=1.0,
):
    """Unlearning (ESD, SDD) and meta-unlearning in one loop; with all meta weights 0 it is plain unlearning, bit for bit. Yields `Record`s.

    Minimises over the trained weights θ (arXiv 2410.12777, eq. 3–5; every loss is a mean over elements, t over all timesteps):

        unlearn · L_unlearn(θ) + retain · ⅓ [D(θ; related) + D(θ; unrelated) + D(θ; ∅) + D(θ; any)] − ascent · L(θ; forget)
        − relearn · L(θ_FT; forget) − self_destruct · [L(θ_FT; related) − L(θ; related)]

    and at every `clean_every`-th step, in place of the last line,

        + clean · ½ [L(θ_CL; related) − L(θ; related) + L(θ_CL; unrelated) − L(θ; unrelated)].

    L_unlearn, by method: "esd", ‖ε_θ(z_t, c) − ε_0(z_t, ∅) + η [ε_0(z_t, c) − ε_0(z_t, ∅)]‖², z_t sampled by the student; "sdd" (Kim et al.
    2023), ‖ε_θ(z_t, c) − stop-gradient ε_θ(z_t, ∅)‖², z_t sampled by the running average of the weights, which is the result (`State(ema=0.999)`).
    replace: the conditioning (one row) that the concept shall be drawn as, in place of ∅ in both; None: ∅.
    From a closed-form result (UCE, RECE) the meta gradient goes alone: unlearn=0, and unet_frozen is that result, since only retention keeps the edit.
    and, as controls that rehearse nothing, + gradient_norm · ‖∇L(θ; forget)‖² + alignment · ⟨∇L(θ; forget), ∇L(θ; related)⟩ (`mu.meta.expansion`; one process, no float16).

    D, the drift: mean squared difference to the frozen UNet's predictions (the denoising loss with its target's noise taken out, as far
    as the frozen UNet predicts the mean of that noise); ∅: the unrelated images with the empty prompt, which guidance leans on; any: the
    same with one of `retain_prompts` (a conditioning, or None for no such term) each: what other prompts draw, of which there are no images. keep: which of the four there are.
    unet_frozen: ε_0; None with subset "lora" only, which is then switched off to ask it. noise_scheduler: DDIM, with the model's betas.
    θ_FT: θ after `inner_steps` steps on the forget set, θ_CL: on the unrelated set. The two terms of a bracket share minibatch,
    noise and timesteps (common random numbers), so a bracket is exactly 0 at θ_FT = θ.
    inner_steps, inner_lr: a number, or (low, high) to draw from at each step; inner_optimizer: "sgd", "adam", "adam8bit" or a list to draw from.
    timestep: of all denoising losses, rehearsed ones included; None: all timesteps. bound: a loss after the attack that is above it is not pushed further. ascent: of the forget loss at θ, without an
        inner loop (the relearn term's zeroth order); alone it is a control.
    eta, guidance: ESD's and SDD's. trajectory_steps: DDIM steps of a trajectory; trajectory_reuse: steps that share one batch of
    trajectories, each with a random point of its own.
    angle_every: every so many steps, record inner product and cosine of ∇L(θ; forget) and ∇L(θ; related), before the update (`mu.meta.angle`); 0: never. It has a random
        stream of its own, so that looking changes nothing; two passes each time.
    accumulation: micro-batches of each pass (`squared_errors`). snapshot: device that keeps θ during a simulated fine-tuning, e.g. "cpu" (`meta_gradient`).
    loss_scale: for float16 (`gradients`). Batch sizes are those of all processes together (`own`); retain_batch_size is halved for ∅ and any.
    Passes a step, first order: 1 at θ, inner_steps + 1 from there to θ_FT, 1 of the frozen UNet, and the trajectories'; SDD has 1 more, for its
    target; the second order has M(M + 1)/2 more (see `mu.meta.meta_gradient`).
    Raises ValueError when every weight is 0, for an unknown method, for SDD without an average, for batches that cannot be shared evenly;
    FloatingPointError on a loss that is not finite: `state` then still holds the last good step."""
    if not any((unlearn, retain, ascent, relearn, self_destruct, clean, gradient_norm, alignment)):
        raise ValueError(
            "every weight is 0, so there is nothing to minimise: give unlearn, retain, ascent, relearn, self_destruct or clean a weight"
        )
    if unknown := set(keep) - {"related", "unrelated", "empty", "any"}:
        raise ValueError(
            f"there is no drift on {sorted(unknown)[0]!r} to keep down: allowed are related, unrelated, empty, any"
        )
    if (gradient_norm or alignment) and (PartialState().num_processes > 1 or loss_scale != 1):
        raise ValueError(
            "gradient_norm and alignment are controls for one process, without float16: choose processes 1 and precision no or bf16"
        )
    if method not in ("esd", "sdd"):
        raise ValueError(
            f"unknown method {method!r} of the loop: allowed are esd, sdd (UCE and RECE are closed forms: see mu.methods.closed_form)"
        )
    if method == "sdd" and state.ema is None:
        raise ValueError(
            "SDD's result is a running average of the weights: make the state with ema=0.999"
        )
    unet, parameters = state.unet, state.parameters
    names = inner_optimizer if isinstance(inner_optimizer, list) else [inner_optimizer]
    inner_optimizers = {name: make_inner_optimizer(name, parameters) for name in names}
    g_unlearn, g_retain, g_meta, g_angle = (
        state.generators[name] for name in ("unlearn", "retain", "meta", "angle")
    )

    def draw(concept_set, g, n=inner_batch_size):
        return denoising(draw_minibatch(concept_set, noise_scheduler, n, g, timestep))

    def repeat(one_row, n):
        return select(one_row, torch.zeros(n, dtype=torch.long))

    errors = functools.partial(squared_errors, unet, accumulation=accumulation)
    if order == "second" or gradient_norm or alignment:
        unet.set_attn_processor(
            AttnProcessor()
        )  # plain products, which can be differentiated twice everywhere
    passes = []
    hooks = [
        net.register_forward_hook(lambda *_: passes.append(1))
        for net in (unet, unet_frozen)
        if net is not None
    ]
    try:
        while state.step < steps:
            began, after, looked = time.perf_counter(), {}, {}
            passes.clear()
            if angle_every and state.step % angle_every == 0:
                pair = [
                    own(draw(forget, g_angle)),
                    own(draw(retain_related, g_angle, retain_batch_size)),
                ]
                looked = dict(
                    zip(
                        ("inner product", "cosine"),
                        angle(
                            parameters,
                            [lambda part=part: errors(part)[0] for part in pair],
                            loss_scale,
                        ),
                        strict=False,
                    )
                )
            if clean and state.step % clean_every == clean_every - 1:
                attacked, after = retain_unrelated, {"related": clean / 2, "unrelated": clean / 2}
            elif relearn or self_destruct:
                attacked, after = forget, {"forget": -relearn, "related": -self_destruct}

            asked = {}  # of the frozen UNet, in one pass
            if unlearn:
                if state.trajectory is None or state.step % trajectory_reuse == 0:
                    prompt = torch.randint(len(forget.prompts), (batch_size,), generator=g_unlearn)
                    with (
                        state.averaged()
                        if method == "sdd"
                        else contextlib.nullcontext(unet) as sampler
                    ):
                        state.trajectory = (
                            *sample_trajectory(
                                sampler,
                                noise_scheduler,
                                select(forget.conditioning, prompt),
                                unconditional,
                                g_unlearn,
                                guidance,
                                trajectory_steps,
                                shape=forget.mean.shape[1:],
                                points=trajectory_reuse,
                            ),
                            prompt.repeat(trajectory_reuse),
                        )
                some = slice(
                    state.step % trajectory_reuse * batch_size,
                    (state.step % trajectory_reuse + 1) * batch_size,
                )
                latents, timesteps, prompt = (x[some] for x in state.trajectory)
                concept, no_concept = (
                    own((latents, timesteps, c))
                    for c in (
                        select(forget.conditioning, prompt),
                        repeat(replace or unconditional, len(latents)),
                    )
                )
                if method == "esd":
                    asked |= {"no concept": no_concept, "concept": concept}
            batches = (
                {
                    "related": draw(retain_related, g_retain, retain_batch_size),
                    "unrelated": draw(retain_unrelated, g_retain, retain_batch_size),
                }
                if retain or after
                else {}
            )
            if retain:
                asked |= {name: own(part[:3]) for name, part in batches.items() if name in keep}
                latents, timesteps = (
                    x[::2] for x in batches["unrelated"][:2]
                )  # every second: half of them, over all timesteps
                if "empty" in keep:
                    asked["empty"] = own((latents, timesteps, repeat(unconditional, len(latents))))
                if retain_prompts and "any" in keep:
                    some = torch.randint(
                        len(retain_prompts["encoder_hidden_states"]),
                        (len(latents),),
                        generator=g_retain,
                    )
                    asked["any"] = own((latents, timesteps, select(retain_prompts, some)))
            batches = {name: own(part) for name, part in batches.items()}
            with reference(unet, unet_frozen) as frozen_net:
                frozen = dict(
                    zip(
                        asked,
                        predictions(frozen_net, *asked.values(), accumulation=accumulation),
                        strict=False,
                    )
                )

            parts, weights = (
                [],
                {},
            )  # weights in the order of the parts' targets: by it the losses get their names
            if unlearn:
                target = (
                    esd(frozen["no concept"], frozen["concept"], eta)
                    if method == "esd"
                    else predictions(unet, no_concept, accumulation=accumulation)[0]
                )
                parts.append((*concept, target))
                weights["unlearn"] = unlearn
            for name, part in batches.items():
                parts.append((*part, *([frozen[name]] if name in frozen else [])))
                weights |= {name: -after.get(name, 0.0)} | (
                    {f"{name} drift": retain / 3} if name in frozen else {}
                )
            for name in [name for name in ("empty", "any") if name in asked]:
                parts.append((*asked[name], frozen[name]))
                weights[f"{name} drift"] = retain / 3
            if ascent:
                parts.append(own(draw(forget, g_meta)))
                weights["forget"] = -ascent
            losses = dict(zip(weights, errors(*parts), strict=False)) if parts else {}
            gradient = (
                gradients(
                    sum(weights[name] * loss for name, loss in losses.items()),
                    parameters,
                    loss_scale,
                )
                if losses
                else [torch.zeros_like(p) for p in parameters]
            )
            losses = {name: loss.item() for name, loss in losses.items()}

            if after:
                inner = [own(draw(attacked, g_meta)) for _ in range(_draw(inner_steps, g_meta))]
                batches["forget"] = own(draw(forget, g_meta))

                def outer_loss():
                    values = dict(
                        zip(after, errors(*(batches[name] for name in after)), strict=False)
                    )
                    losses.update({f"{name} after": value.item() for name, value in values.items()})
                    return sum(
                        w * (values[name].clamp(max=bound) if w < 0 else values[name])
                        for name, w in after.items()
                    )

                _, simulated = meta_gradient(
                    parameters,
                    [lambda part=part: errors(part)[0] for part in inner],
                    outer_loss,
                    inner_optimizers[_draw(inner_optimizer, g_meta)],
                    _draw(inner_lr, g_meta, log=True),
                    order,
                    snapshot,
                    loss_scale,
                )
                torch._foreach_add_(gradient, simulated)
                del simulated

            if gradient_norm or alignment:
                pair = [own(draw(forget, g_meta)), own(draw(retain_related, g_meta))]
                losses["expansion"], more = expansion(
                    parameters,
                    *(lambda part=part: errors(part)[0] for part in pair),
                    gradient_norm,
                    alignment,
                )
                torch._foreach_add_(gradient, more)
                del more

            norm = torch.nn.utils.get_total_norm(gradient)
            _finite(losses | {"gradient norm": norm.item()}, state.step, loss_scale)
            torch._foreach_mul_(gradient, min(1.0, clip / (norm.item() + 1e-6)))
            descend(parameters, gradient, state.optimizer)
            del gradient
            if state.ema is not None:
                state.ema.step(parameters)
            state.step += 1
            yield Record(state.step, losses | looked, len(passes), time.perf_counter() - began)
    finally:
        for hook in hooks:
            hook.remove()
