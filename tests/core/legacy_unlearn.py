"""The loop as it was before the restructuring (commit 10a9643), kept verbatim as the golden
reference of test_golden.py. Not maintained: it goes when the restructuring is proven."""

# ruff: noqa
# fmt: off
from mu.models import select as rows
from mu.models import predict
from mu.frozen import reference
from mu.models import stack
from mu.trainable import trainable


from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch.utils.checkpoint import checkpoint



@dataclass(frozen=True)
class Minibatch:
    """Everything random about a denoising loss, drawn once: used at two sets of weights it gives common random numbers."""
    noisy_latents: torch.Tensor  # (n, channels, height, width), z_t, latents × scaling_factor
    noise: torch.Tensor  # the same shape, ε
    timesteps: torch.Tensor  # (n,), integers in 0 … num_train_timesteps − 1
    conditioning: dict  # n rows


def draw_minibatch(concept_set, noise_scheduler, batch_size, generator, timestep=None):
    """Random images of a concept set with fresh noise; t uniform over the training timesteps, one from each of `batch_size` equal
    strata: the same expectation as independent draws, with far less variance, since the loss depends on t most of all. timestep: this one for all, instead."""
    n, device = concept_set.mean.shape[0], concept_set.mean.device
    index = torch.randint(n, (batch_size,), generator=generator)  # all of it on the CPU: the same numbers whatever the device
    shape = concept_set.mean[index].shape
    latents = concept_set.mean[index] + concept_set.std[index] * torch.randn(shape, generator=generator).to(device)
    noise = torch.randn(shape, generator=generator).to(device)
    strata = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    t_max = noise_scheduler.config.num_train_timesteps
    timesteps = (strata * (t_max / batch_size)).long().clamp(max=t_max - 1).to(device)
    timesteps = timesteps if timestep is None else torch.full_like(timesteps, timestep)
    return Minibatch(noise_scheduler.add_noise(latents, noise, timesteps), noise, timesteps,
                     rows(concept_set.conditioning, concept_set.prompt[index]))


def share(part, index, count):
    """The `index`-th of `count` shares of a part's rows, every `count`-th of them: small and large timesteps in each. The part may be any tuple.

    Raises ValueError where the rows cannot be shared evenly: means of means would not be the mean."""
    n = len(part[0])
    if n % count:
        raise ValueError(f"{n} rows cannot be shared among {count} processes or micro-batches: choose batch sizes that are multiples of processes × accumulation")
    take = slice(index, None, count)
    return tuple(rows(x, take) if isinstance(x, dict) else x[take] for x in part) if count > 1 else part


def own(part):
    """This process's share of a part."""
    return share(part, PartialState().process_index, PartialState().num_processes)


def _all(unet, parts):
    """Predictions for the rows of several parts in one pass, part by part."""
    latents, timesteps, conditionings = zip(*(part[:3] for part in parts))
    return predict(unet, torch.cat(latents), torch.cat(timesteps), stack(*conditionings)).split([len(x) for x in latents])


def squared_errors(unet, *parts, accumulation=1):
    """Mean squared error of each (noisy latents, timesteps, conditioning, target, …), all in ONE pass of the UNet. List of scalars,
    one a target: a part may carry several.

    accumulation: in so many micro-batches instead, one after the other, none of which keeps anything for its backward pass but its
    inputs: the same losses with the memory of one, at the price of another forward pass. With several processes each part holds this process's
    share; values are means over all of them, gradients this process's, to be averaged by `gradients`. Raises as `share` does."""
    def errors(*shared):
        return torch.stack([(p.float() - target.float()).pow(2).mean() for p, part in zip(_all(unet, shared), shared) for target in part[3:]])

    if accumulation == 1:
        losses = errors(*parts)
    else:
        once = errors if not torch.is_grad_enabled() else lambda *shared: checkpoint(errors, *shared, use_reentrant=False)
        losses = sum(once(*(share(part, i, accumulation) for part in parts)) for i in range(accumulation)) / accumulation
    if PartialState().num_processes > 1:
        losses = losses + (reduce(losses.detach(), "mean") - losses.detach())
    return list(losses)


def denoising(batch):
    """The part of L_DM = E ‖ε − ε_θ(z_t, t, c)‖² (mean over elements) for `squared_errors`."""
    return batch.noisy_latents, batch.timesteps, batch.conditioning, batch.noise


@torch.no_grad()
def predictions(unet, *parts, accumulation=1):
    """What a UNet predicts for the inputs of each of `parts`, in one pass (or `accumulation` of them), without gradient: targets of ESD, SDD and
    of retention. Tuple of tensors. Raises as `share` does."""
    if not parts:
        return ()
    if accumulation == 1:
        return _all(unet, parts)
    shares = [_all(unet, [share(part[:3], i, accumulation) for part in parts]) for i in range(accumulation)]
    return tuple(torch.stack(pieces, 1).flatten(0, 1) for pieces in zip(*shares))  # every `accumulation`-th row is of the same share


def loss_scale(precision):
    """What losses are multiplied by before their gradient is taken (`gradients`): float16 loses numbers below 6e-8, the others do not."""
    return 1024.0 if precision == "fp16" else 1.0


def gradients(loss, parameters, scale=1.0, **kwargs):
    """∇ loss, the mean over all processes; a list of tensors. Under the profiler's name for UNet passes (as `predict`).

    scale: the loss is multiplied by it first and the gradient divided by it after, so that float16 does not lose small numbers."""
    with torch.profiler.record_function("unet pass"):
        found = torch.autograd.grad(loss if scale == 1 else loss * scale, parameters, **kwargs)
    if kwargs.get("create_graph"):  # to be differentiated again, on this process's rows
        return list(found)
    if scale != 1:
        torch._foreach_div_([g for g in found if g is not None], scale)
    return [g if g is None else reduce(g, "mean") for g in found] if PartialState().num_processes > 1 else list(found)


@torch.no_grad()
def sample_trajectory(unet, noise_scheduler, conditioning, unconditional, generator, guidance=3.0, steps=50, shape=None, points=1):
    """DDIM trajectories of the student (SDD: of its teacher), one a row, each stopped at `points` random steps (ESD's z_t, t drawn inside that step's bin).

    Returns noisy latents (points · n, …) and timesteps (points · n,), all rows' first points first: a latent carries the noise level
    of the step that would come next, and t is uniform over [that step's timestep, the one before it). Costs as many guided passes
    of n rows as the latest of the drawn steps; several processes share the rows. Raises as `share` does."""
    n, device = conditioning["encoder_hidden_states"].shape[0], conditioning["encoder_hidden_states"].device
    noise_scheduler.set_timesteps(steps)
    grid = noise_scheduler.timesteps.cpu()
    stride = noise_scheduler.config.num_train_timesteps // steps
    stop = torch.randint(steps, (points, n), generator=generator)
    latents = torch.randn((n, *shape), generator=generator) * noise_scheduler.init_noise_sigma
    timesteps = grid[stop.flatten()] + torch.randint(stride, (points * n,), generator=generator)
    latents, conditioning, stop = own((latents.to(device), conditioning, stop.T.to(device)))
    stop = stop.T
    stopped = latents.expand(points, *latents.shape).clone()
    both = stack({k: v.expand(len(latents), *v.shape[1:]) for k, v in unconditional.items()}, conditioning)
    for i in range(int(stop.max())):
        empty, full = predict(unet, torch.cat([latents] * 2), grid[i].expand(2 * len(latents)).to(device), both).float().chunk(2)
        latents = noise_scheduler.step(empty + guidance * (full - empty), grid[i], latents).prev_sample
        stopped = torch.where((stop == i + 1)[..., None, None, None], latents, stopped)
    if PartialState().num_processes > 1:  # every process holds all rows, as every checkpoint does
        every = gather(stopped.transpose(0, 1).contiguous())  # process by process: rows 0, k, 2k, …, then 1, k + 1, …
        stopped = every.unflatten(0, (PartialState().num_processes, -1)).transpose(0, 1).flatten(0, 1).transpose(0, 1)
    return stopped.flatten(0, 1), timesteps.clamp(max=noise_scheduler.config.num_train_timesteps - 1).to(device)


def esd(empty, full, eta=1.0):
    """ESD's target for ε_θ(z_t, c): ε_0(z_t, ∅) − η [ε_0(z_t, c) − ε_0(z_t, ∅)], from the frozen UNet's two predictions (Gandikota et al. 2023)."""
    return empty - eta * (full - empty)


import torch



def descend(parameters, gradient, optimizer):
    """One step of the optimiser along a gradient, in place."""
    for p, g in zip(parameters, gradient):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def inner_step(parameters, loss, optimizer, scale=1.0, check=None):
    """One step of fine-tuning in place: the same for the simulated attack, the real one and the CLEAN one. Returns the loss before it.

    scale: of the loss, see `mu.objectives.gradients`. check: a function of the gradient that may raise, before anything has moved."""
    gradient = gradients(loss, parameters, scale)
    if check is not None:
        check(gradient)
    descend(parameters, gradient, optimizer)
    return loss.detach()


def angle(parameters, losses, scale=1.0):
    """(inner product, cosine) of the gradients of two losses, functions without arguments, at the parameters' present values. Below 0, a small step of SGD that lowers the one
    raises the other; to first order, ζ τ times the inner product is what self-destruction adds to the objective (arXiv 2410.12777, section 3). scale: see `mu.objectives.gradients`."""
    one, other = (gradients(loss(), parameters, scale) for loss in losses)
    product = sum(torch.sum(a.float() * b.float()) for a, b in zip(one, other)).item()
    norms = [torch.nn.utils.get_total_norm(g).item() for g in (one, other)]
    return product, product / max(norms[0] * norms[1], torch.finfo(torch.float32).tiny)


def expansion(parameters, forget, related, gradient_norm=0.0, alignment=0.0):
    """What the meta objective is to first order, taken by itself: gradient_norm · ‖∇L(forget)‖² + alignment · ⟨∇L(forget), ∇L(related)⟩, sums over all parameters (section 3 of
    arXiv 2410.12777 has them with the factors τ and ζ τ), and its exact gradient, by differentiating twice.

    forget, related: functions without arguments, each a loss at the parameters' present values. Returns value (float), list of gradients."""
    one = gradients(forget(), parameters, create_graph=True)
    other = gradients(related(), parameters, create_graph=True) if alignment else one
    product = lambda a, b: sum((x * y).sum() for x, y in zip(a, b))
    value = gradient_norm * product(one, one) + alignment * product(one, other)
    return value.item(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients(value, parameters, allow_unused=True))]


def eight_bit(name):
    """An optimiser of bitsandbytes, whose moments take one byte each. Raises ImportError with the command that installs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("8-bit Adam needs bitsandbytes: pip install bitsandbytes (or this project's extra `gpu`), or choose adamw, adam or sgd") from error
    return getattr(bitsandbytes.optim, name)


def make_inner_optimizer(name, parameters):
    """torch's SGD or Adam, or Adam in 8 bits, built once; `meta_gradient` sets its learning rate and clears its state for each simulated attack."""
    kinds = {"sgd": lambda: torch.optim.SGD(parameters, lr=0.0, fused=True), "adam": lambda: torch.optim.Adam(parameters, lr=0.0, fused=True),
             "adam8bit": lambda: eight_bit("Adam8bit")(parameters, lr=0.0)}
    if name not in kinds:
        raise ValueError(f"unknown inner optimiser {name!r}: allowed are {', '.join(kinds)}")
    return kinds[name]()


def meta_gradient(parameters, inner_losses, outer_loss, optimizer, lr, order="first", snapshot=None, scale=1.0):
    """∇_θ of outer_loss(θ_FT), θ_FT = θ after one `inner_step` for each of `inner_losses`.

    parameters: the trained tensors, holding θ; they hold θ again, bit for bit, when this returns.
    inner_losses: M functions without arguments, each the loss of one simulated step at the parameters' present values.
    outer_loss: a function without arguments, evaluated at θ_FT.
    order="first": the gradient at θ_FT stands for the gradient at θ (FOMAML). order="second": exact through SGD,
    v ← v − τ ∇²L_m(θ_m) v for m = M … 1, each a Hessian-vector product; θ_m is found again by repeating the first m − 1 steps,
    so that memory does not depend on M (at the cost of M(M − 1)/2 more passes).
    snapshot: the device that keeps θ meanwhile, by default the parameters' own; "cpu" spares a GPU one copy of them.
    scale: of the losses, see `mu.objectives.gradients`.
    Returns outer loss, list of gradients. Raises ValueError for another order, or the second with another optimiser than SGD."""
    if order not in ("first", "second"):
        raise ValueError(f"unknown order {order!r}: allowed are first, second")
    if order == "second" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError("order='second' is exact through SGD only: use inner_optimizer='sgd', or order='first'")
    start = [p.detach().to(snapshot or p.device, copy=True) for p in parameters]

    def replay(m):
        optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = lr
        for loss in inner_losses[:m]:
            inner_step(parameters, loss(), optimizer, scale)

    @torch.no_grad()
    def restore():
        torch._foreach_copy_(parameters, start)

    try:
        replay(len(inner_losses))
        loss = outer_loss()
        gradient = gradients(loss, parameters, scale)
        for m in reversed(range(len(inner_losses))) if order == "second" else ():
            restore()
            replay(m)
            inner = gradients(inner_losses[m](), parameters, create_graph=True)
            product = gradients(inner, parameters, grad_outputs=gradient, allow_unused=True)
            gradient = [v if h is None else v - lr * h for v, h in zip(gradient, product)]
    finally:
        restore()
        optimizer.state.clear()
    return loss.detach(), gradient


import contextlib
import functools
import math
import time
from dataclasses import dataclass

import torch
from accelerate import PartialState
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel



@dataclass(frozen=True)
class Record:
    step: int  # steps done, this one included
    losses: dict  # name → float, before the update
    passes: int  # forward passes of the UNet, the frozen one and trajectories included
    seconds: float


class State:
    """What a loop needs to go on where it stopped: trained weights, optimiser, their running average, random generators, step. Goes to
    safetensors by `tensors()`.

    subset, rank: see `mu.trainable.trainable`. optimizer: adamw, adam, sgd, or adamw8bit (bitsandbytes). ema: decay of a running average
    of the trained weights, which is then the result (SDD's teacher); 0: none. seed: of everything drawn at random, new adapters included.
    named: name → tensor of what is trained instead of weights of the UNet, such as the vector of a word (textual inversion)."""

    def __init__(self, unet, subset="f", lr=1e-5, optimizer="adamw", weight_decay=1e-4, seed=0, rank=16, ema=0.0, named=None):
        kinds = {"adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay, fused=True),
                 "adam": lambda p: torch.optim.Adam(p, lr=lr, fused=True), "sgd": lambda p: torch.optim.SGD(p, lr=lr, fused=True),
                 "adamw8bit": lambda p: eight_bit("AdamW8bit")(p, lr=lr, weight_decay=weight_decay)}
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
            self.ema.optimization_step = 1  # no warm-up: the decay is the same from the first step on
        # one stream a purpose: that a term is switched off does not change the draws of the others
        self.generators = {name: torch.Generator().manual_seed(seed * 1000 + i) for i, name in enumerate(("unlearn", "retain", "meta", "finetune", "angle"))}
        self.trajectory = None

    def tensors(self):
        """Flat dict of tensors, everything that `load` needs."""
        out = {"step": torch.tensor(self.step)} | {f"weights/{n}": p.detach() for n, p in self.named.items()}
        for name, p in self.named.items():
            out |= {f"optimizer/{name}/{k}": torch.as_tensor(v).clone() if k.startswith("qmap") else torch.as_tensor(v)  # bitsandbytes shares these tables
                    for k, v in self.optimizer.state.get(p, {}).items()}
        out |= {f"ema/{name}": p for name, p in zip(self.named, self.ema.shadow_params)} if self.ema else {}
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
            saved = {k.rsplit("/", 1)[1]: v.to(p.device, copy=True) for k, v in tensors.items() if k.startswith(f"optimizer/{name}/")}
            if saved:  # torch counts steps in a float tensor, bitsandbytes in an int
                self.optimizer.state[p] = {k: v.item() if v.dtype == torch.int64 and not v.ndim else v for k, v in saved.items()}
        for name, average in zip(self.named, self.ema.shadow_params) if self.ema else ():
            average.copy_(tensors[f"ema/{name}"])
        for name, g in self.generators.items():
            g.set_state(tensors[f"generator/{name}"].clone())
        if "trajectory/latents" in tensors:
            self.trajectory = tuple(tensors[f"trajectory/{k}"].to(p.device, copy=True) for k in ("latents", "timesteps", "prompt"))

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
        raise FloatingPointError(f"not finite: {', '.join(bad)} is {losses[bad[0]]} at step {step + 1}: the weights of step {step} are kept; "
                                 "lower the learning rate or a weight, or bound the loss"
                                 + (f"; in float16 numbers over 65504 are infinite: lower loss_scale ({scale:g}), or choose precision bf16 or no" if scale != 1 else ""))


def finetune(state, noise_scheduler, concept_set, *, steps, batch_size=8, others=None, others_weight=1.0, accumulation=1, loss_scale=1.0):
    """Fine-tuning on a concept set by the denoising loss: the attack (on the concept), CLEAN (on others). Yields `Record`s.

    Minimises L(θ; concept_set) + others_weight · L(θ; others). others: a set, or None: pictures of its class that the model itself has drawn (DreamBooth's
    prior preservation), or benign ones mixed in by an attacker who would keep the rest of the model whole; its batch is as large as the first.
    concept_set may be a function of the steps done, called before each: for phases, or where what is trained is read by the text encoder.
    Optimiser, learning rate and subset are those of `state`; a state that has done k steps does the other steps − k.
    accumulation: micro-batches of a pass, see `squared_errors`; loss_scale: see `gradients`. Raises FloatingPointError as `unlearn` does."""
    g = state.generators["finetune"]
    while state.step < steps:
        began = time.perf_counter()
        sets = [concept_set(state.step) if callable(concept_set) else concept_set, *([others] if others is not None and others_weight else [])]
        found = squared_errors(state.unet, *(own(denoising(draw_minibatch(s, noise_scheduler, batch_size, g))) for s in sets), accumulation=accumulation)
        losses, loss = dict(zip(("finetune", "others"), (x.item() for x in found))), found[0] + sum(others_weight * x for x in found[1:])
        _finite(losses, state.step, loss_scale)
        overflow = lambda gradient: _finite({"gradient norm": torch.nn.utils.get_total_norm(gradient).item()}, state.step, loss_scale)
        inner_step(state.parameters, loss, state.optimizer, loss_scale, check=overflow if loss_scale != 1 else None)
        state.step += 1
        yield Record(state.step, losses, 1 if accumulation == 1 else 2 * accumulation, time.perf_counter() - began)


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
    state, unet_frozen, noise_scheduler, forget, retain_related, retain_unrelated, unconditional, retain_prompts=None, replace=None, *, steps,
    method="esd", unlearn=1.0, eta=1.0, guidance=3.0, batch_size=4, trajectory_steps=50, trajectory_reuse=1,
    retain=0.0, keep=("related", "unrelated", "empty", "any"), ascent=0.0, relearn=0.0, self_destruct=0.0, clean=0.0, clean_every=3, gradient_norm=0.0, alignment=0.0, timestep=None,
    inner_steps=1, inner_lr=1e-5, inner_optimizer="sgd", inner_batch_size=8, retain_batch_size=8, order="first", bound=math.inf, clip=1.0,
    angle_every=0, accumulation=1, snapshot=None, loss_scale=1.0,
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
        raise ValueError("every weight is 0, so there is nothing to minimise: give unlearn, retain, ascent, relearn, self_destruct or clean a weight")
    if unknown := set(keep) - {"related", "unrelated", "empty", "any"}:
        raise ValueError(f"there is no drift on {sorted(unknown)[0]!r} to keep down: allowed are related, unrelated, empty, any")
    if (gradient_norm or alignment) and (PartialState().num_processes > 1 or loss_scale != 1):
        raise ValueError("gradient_norm and alignment are controls for one process, without float16: choose processes 1 and precision no or bf16")
    if method not in ("esd", "sdd"):
        raise ValueError(f"unknown method {method!r} of the loop: allowed are esd, sdd (UCE and RECE are closed forms: see mu.methods.closed_form)")
    if method == "sdd" and state.ema is None:
        raise ValueError("SDD's result is a running average of the weights: make the state with ema=0.999")
    unet, parameters = state.unet, state.parameters
    names = inner_optimizer if isinstance(inner_optimizer, list) else [inner_optimizer]
    inner_optimizers = {name: make_inner_optimizer(name, parameters) for name in names}
    g_unlearn, g_retain, g_meta, g_angle = (state.generators[name] for name in ("unlearn", "retain", "meta", "angle"))
    draw = lambda concept_set, g, n=inner_batch_size: denoising(draw_minibatch(concept_set, noise_scheduler, n, g, timestep))
    repeat = lambda one_row, n: rows(one_row, torch.zeros(n, dtype=torch.long))
    errors = functools.partial(squared_errors, unet, accumulation=accumulation)
    if order == "second" or gradient_norm or alignment:
        unet.set_attn_processor(AttnProcessor())  # plain products, which can be differentiated twice everywhere
    passes = []
    hooks = [net.register_forward_hook(lambda *_: passes.append(1)) for net in (unet, unet_frozen) if net is not None]
    try:
        while state.step < steps:
            began, after, looked = time.perf_counter(), {}, {}
            passes.clear()
            if angle_every and state.step % angle_every == 0:
                pair = [own(draw(forget, g_angle)), own(draw(retain_related, g_angle, retain_batch_size))]
                looked = dict(zip(("inner product", "cosine"), angle(parameters, [lambda part=part: errors(part)[0] for part in pair], loss_scale)))
            if clean and state.step % clean_every == clean_every - 1:
                attacked, after = retain_unrelated, {"related": clean / 2, "unrelated": clean / 2}
            elif relearn or self_destruct:
                attacked, after = forget, {"forget": -relearn, "related": -self_destruct}

            asked = {}  # of the frozen UNet, in one pass
            if unlearn:
                if state.trajectory is None or state.step % trajectory_reuse == 0:
                    prompt = torch.randint(len(forget.prompts), (batch_size,), generator=g_unlearn)
                    with state.averaged() if method == "sdd" else contextlib.nullcontext(unet) as sampler:
                        state.trajectory = (*sample_trajectory(
                            sampler, noise_scheduler, rows(forget.conditioning, prompt), unconditional, g_unlearn, guidance, trajectory_steps,
                            shape=forget.mean.shape[1:], points=trajectory_reuse), prompt.repeat(trajectory_reuse))
                some = slice(state.step % trajectory_reuse * batch_size, (state.step % trajectory_reuse + 1) * batch_size)
                latents, timesteps, prompt = (x[some] for x in state.trajectory)
                concept, no_concept = (own((latents, timesteps, c)) for c in (rows(forget.conditioning, prompt), repeat(replace or unconditional, len(latents))))
                if method == "esd":
                    asked |= {"no concept": no_concept, "concept": concept}
            batches = {"related": draw(retain_related, g_retain, retain_batch_size),
                       "unrelated": draw(retain_unrelated, g_retain, retain_batch_size)} if retain or after else {}
            if retain:
                asked |= {name: own(part[:3]) for name, part in batches.items() if name in keep}
                latents, timesteps = (x[::2] for x in batches["unrelated"][:2])  # every second: half of them, over all timesteps
                if "empty" in keep:
                    asked["empty"] = own((latents, timesteps, repeat(unconditional, len(latents))))
                if retain_prompts and "any" in keep:
                    some = torch.randint(len(retain_prompts["encoder_hidden_states"]), (len(latents),), generator=g_retain)
                    asked["any"] = own((latents, timesteps, rows(retain_prompts, some)))
            batches = {name: own(part) for name, part in batches.items()}
            with reference(unet, unet_frozen) as frozen_net:
                frozen = dict(zip(asked, predictions(frozen_net, *asked.values(), accumulation=accumulation)))

            parts, weights = [], {}  # weights in the order of the parts' targets: by it the losses get their names
            if unlearn:
                target = (esd(frozen["no concept"], frozen["concept"], eta) if method == "esd"
                          else predictions(unet, no_concept, accumulation=accumulation)[0])
                parts.append((*concept, target))
                weights["unlearn"] = unlearn
            for name, part in batches.items():
                parts.append((*part, *([frozen[name]] if name in frozen else [])))
                weights |= {name: -after.get(name, 0.0)} | ({f"{name} drift": retain / 3} if name in frozen else {})
            for name in [name for name in ("empty", "any") if name in asked]:
                parts.append((*asked[name], frozen[name]))
                weights[f"{name} drift"] = retain / 3
            if ascent:
                parts.append(own(draw(forget, g_meta)))
                weights["forget"] = -ascent
            losses = dict(zip(weights, errors(*parts))) if parts else {}
            gradient = (gradients(sum(weights[name] * loss for name, loss in losses.items()), parameters, loss_scale) if losses
                        else [torch.zeros_like(p) for p in parameters])
            losses = {name: loss.item() for name, loss in losses.items()}

            if after:
                inner = [own(draw(attacked, g_meta)) for _ in range(_draw(inner_steps, g_meta))]
                batches["forget"] = own(draw(forget, g_meta))

                def outer_loss():
                    values = dict(zip(after, errors(*(batches[name] for name in after))))
                    losses.update({f"{name} after": value.item() for name, value in values.items()})
                    return sum(w * (values[name].clamp(max=bound) if w < 0 else values[name]) for name, w in after.items())

                _, simulated = meta_gradient(
                    parameters, [lambda part=part: errors(part)[0] for part in inner], outer_loss,
                    inner_optimizers[_draw(inner_optimizer, g_meta)], _draw(inner_lr, g_meta, log=True), order, snapshot, loss_scale)
                torch._foreach_add_(gradient, simulated)
                del simulated

            if gradient_norm or alignment:
                pair = [own(draw(forget, g_meta)), own(draw(retain_related, g_meta))]
                losses["expansion"], more = expansion(parameters, *(lambda part=part: errors(part)[0] for part in pair), gradient_norm, alignment)
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
