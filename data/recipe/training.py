"""Train the pocket models and their judge: generators that yield after each step.

Progress bars, checkpoints and stopping belong to the caller.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel, compute_snr

from data.recipe.emoji import COLORS, TEMPLATES, augment, caption
from mu.models import encode_prompts, predict, text_encoders

PALETTE = torch.tensor(list(COLORS.values())) / 255
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def cosine_schedule(step, steps, warmup=100):
    """Return the share of the peak learning rate: linear warm-up, half a cosine down to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return min(1, (step + 1) / warmup) * (0.02 + 0.98 * cosine)


def optimizer_step(loss, optimizer, lr, clip=None):
    """Take one step down the loss at learning rate `lr`, with the gradient's norm clipped."""
    group = optimizer.param_groups[0]
    group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()


def random_backgrounds(n, generator, white=0.5):
    """Return n indices into COLORS, white with the given probability."""
    index = torch.randint(len(COLORS), (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < white, 0, index)


# --- autoencoder -----------------------------------------------------------------------------


def train_vae(vae, rgba, steps=2500, batch_size=16, lr=1e-3, seed=0):
    """Train the autoencoder; yields (step, loss).

    The loss is L1 of pixels and of their differences, which keeps lines thin, and a small KL.
    """
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    for step in range(steps):
        index = torch.randint(len(rgba), (batch_size,), generator=g)
        x = augment(rgba[index], PALETTE[random_backgrounds(batch_size, g)], g)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            y = vae.decode(z).sample
        y = y.float()
        pixels = (x - y).abs().mean()
        edges = sum((x.diff(dim=side) - y.diff(dim=side)).abs().mean() for side in (-1, -2))
        loss = pixels + edges + 1e-5 * posterior.kl().mean() / z[0].numel()
        optimizer_step(loss, optimizer, lr * cosine_schedule(step, steps), clip=1.0)
        yield step, loss.item()


@torch.no_grad()
def normalise_latents(vae, images):
    """Give each latent channel mean 0 and standard deviation 1 / scaling_factor over the images.

    Folds mean and deviation into the two 1×1 convolutions: z becomes (z − mean) / std, and the
    reconstructions stay the same. Returns both.
    """
    posterior = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)])
    mean, std = posterior.mean((0, 2, 3)), posterior.std((0, 2, 3)) * vae.config.scaling_factor
    c = len(mean)
    # the decoder first, with the old weight: its input is z · std + mean
    vae.post_quant_conv.bias += torch.einsum("oihw,i->o", vae.post_quant_conv.weight, mean)
    vae.post_quant_conv.weight *= std[None, :, None, None]
    # the encoder's first c outputs are the mean, the others the log-variance
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.bias[c:] -= 2 * std.log()
    return mean, std


# --- judge -----------------------------------------------------------------------------------


def judge_view(rgba, generator, strength=1.2):
    """Move, recolour, blur and noise drawings. Returns (B, 3, 64, 64) in [−1, 1]."""
    b = len(rgba)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    palette_or_any = rand(b, 1) < 0.5
    palette = PALETTE[random_backgrounds(b, generator)]
    x = augment(rgba, torch.where(palette_or_any, palette, rand(b, 3)), generator, strength)
    x = x * (0.8 + 0.4 * rand(b, 1, 1, 1)) + 0.2 * (rand(b, 3, 1, 1) - 0.5)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, 0.9 * rand(b, 1, 1, 1) * (rand(b, 1, 1, 1) < 0.5))
    noise = 0.15 * rand(b, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    return (x + noise).clamp(-1, 1)


def train_judge(judge, rgba, concept_ids, style_ids, steps=2000, batch_size=128, lr=2e-3, seed=0):
    """Train the judge by cross-entropy on `judge_view` of real drawings; yields (step, loss)."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    n = int(concept_ids.max()) + 1
    judge.train()
    for step in range(steps):
        index = torch.randint(len(rgba), (batch_size,), generator=g)
        x = judge_view(rgba[index], g)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(x).logits.float()
        concept = F.cross_entropy(logits[:, :n], concept_ids[index], label_smoothing=0.05)
        style = F.cross_entropy(logits[:, n:], style_ids[index], label_smoothing=0.05)
        loss = concept + 0.5 * style
        optimizer_step(loss, optimizer, lr * cosine_schedule(step, steps))
        yield step, loss.item()
    judge.eval()


# --- text encoder and UNet -------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The numbers of one stage of `train_unet`."""

    steps: int = 6000
    batch_size: int = 64
    lr: float = 1e-3  # at its peak, see `cosine_schedule`
    seed: int = 0
    style_share: float = 0.5  # of captions name a style
    ema_decay: float = 0.9985


class PocketState:
    """Everything `train_unet` needs to resume: weights, optimizer, average, random stream, step."""

    def __init__(self, parameters, schedule):
        self.parameters, self.step = parameters, 0  # steps done
        options = dict(lr=schedule.lr, weight_decay=0.01, betas=(0.9, 0.99))
        self.optimizer = torch.optim.AdamW(parameters, **options)
        self.ema = EMAModel(parameters, decay=schedule.ema_decay)
        self.generator = torch.Generator().manual_seed(schedule.seed)

    def pairs(self):
        """Return the numbered pairs of parameter and running average."""
        return enumerate(zip(self.parameters, self.ema.shadow_params, strict=True))

    def tensors(self):
        """Return a flat dict of tensors that `load` restores; "step" is the last step's index."""
        out = {"step": torch.tensor(self.step - 1), "generator": self.generator.get_state()}
        for i, (p, average) in self.pairs():
            kept = self.optimizer.state.get(p, {}) | {"weight": p, "ema": average}
            out |= {f"{i}/{name}": value.detach() for name, value in kept.items()}
        return out

    @torch.no_grad()
    def load(self, tensors):
        """Restore the tensors of `tensors`."""
        self.step = self.ema.optimization_step = int(tensors["step"]) + 1
        self.generator.set_state(tensors["generator"])
        for i, (p, average) in self.pairs():
            p.copy_(tensors[f"{i}/weight"])
            average.copy_(tensors[f"{i}/ema"])
            moments = [name for name in MOMENTS if f"{i}/{name}" in tensors]
            if moments:  # the last layer of SDXL's first text encoder has none: nothing reads it
                self.optimizer.state[p] = {name: tensors[f"{i}/{name}"].clone() for name in moments}


@torch.no_grad()
def encode_drawings(vae, rgba, repeats, seed=0, strength=0.6):
    """Encode `repeats` augmented views of every drawing.

    Returns the latents' mean and std, and the index of the drawing and background of each.
    """
    g = torch.Generator().manual_seed(seed)
    which = torch.arange(len(rgba)).repeat(repeats)
    colors = random_backgrounds(len(which), g)
    means, stds = [], []
    for index, color in zip(which.split(64), colors.split(64), strict=True):
        posterior = vae.encode(augment(rgba[index], PALETTE[color], g, strength)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return {"mean": torch.cat(means), "std": torch.cat(stds), "drawing": which, "color": colors}


def sample_captions(drawings, colors, generator, style_share=0.5):
    """Return one random caption per drawing; one in ten is empty, for guidance.

    A share of them names the style, all name a background that is not white.
    """
    names, captions = list(COLORS), []
    chances = torch.rand(len(drawings), 4, generator=generator)
    for drawing, color, chance in zip(drawings, colors.tolist(), chances, strict=True):
        style = drawing["style"] if chance[1] < style_share else None
        background = names[color] if color or chance[2] < 0.15 else None
        template = TEMPLATES[int(chance[3] ** 2 * len(TEMPLATES))]  # the first are more frequent
        text = caption(drawing["concept"], style, background, template)
        captions.append("" if chance[0] < 0.1 else text)
    return captions


def concept_weights(data, drawings):
    """Return the sampling weight of each view: 1 / √(number of drawings of its concept)."""
    counts = Counter(d["concept"] for d in drawings)
    concepts = [drawings[i]["concept"] for i in data["drawing"].tolist()]
    return torch.tensor([1 / counts[concept] ** 0.5 for concept in concepts])


def denoising_loss(pipe, latents, prompts, generator):
    """Return the loss of noise prediction with min-SNR-5 weights (Hang et al. 2023).

    latents: (mean, std) of the autoencoder's posterior, from which z_0 is drawn.
    """
    scheduler, (mean, std) = pipe.scheduler, latents
    noise, jitter = (torch.randn(mean.shape, generator=generator) for _ in range(2))
    z = (mean + std * jitter) * pipe.vae.config.scaling_factor
    most = scheduler.config.num_train_timesteps
    timesteps = torch.randint(most, (len(mean),), generator=generator)
    noisy = scheduler.add_noise(z, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = predict(pipe.unet, noisy, timesteps, encode_prompts(pipe, prompts))
    snr = compute_snr(scheduler, timesteps)
    errors = (predicted.float() - noise).pow(2).mean((1, 2, 3))
    return (errors * snr.clamp(max=5) / snr).mean()


def train_unet(pipe, data, drawings, schedule, saved=None):
    """Train UNet and text encoders together by `denoising_loss`; yields (step, loss, save).

    data: of `encode_drawings`. The result is the running average of the weights. save() returns
    the state as a flat dict of tensors; passed as `saved`, it continues the run with the numbers
    of an uninterrupted one.
    """
    parts = [part.requires_grad_(True) for part in (pipe.unet, *text_encoders(pipe))]
    state = PocketState([p for part in parts for p in part.parameters()], schedule)
    if saved:
        state.load(saved)
    g, weights = state.generator, concept_weights(data, drawings)
    while state.step < schedule.steps:
        index = torch.multinomial(weights, schedule.batch_size, True, generator=g)
        chosen = [drawings[i] for i in data["drawing"][index].tolist()]
        prompts = sample_captions(chosen, data["color"][index], g, schedule.style_share)
        loss = denoising_loss(pipe, (data["mean"][index], data["std"][index]), prompts, g)
        lr = schedule.lr * cosine_schedule(state.step, schedule.steps, warmup=200)
        optimizer_step(loss, state.optimizer, lr, clip=1.0)
        state.ema.step(state.parameters)
        state.step += 1
        yield state.step - 1, loss.item(), state.tensors
    state.ema.copy_to(state.parameters)
