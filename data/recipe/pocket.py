"""The recipe of the pocket model: a real Stable-Diffusion-format pipeline that fits in 30 MB, and its judge.

Every trainer is a generator that yields its step and loss and leaves the schedule of looking, saving and stopping to the caller."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

from data.recipe.emoji import COLORS, STYLES, TEMPLATES, augment, caption
from mu.concepts.probe import make_probe
from mu.files import fill
from mu.images import from_grid
from mu.measures.evaluate import measure
from mu.measures.statistics import scores
from mu.models import encode_prompts, predict_noise, text_encoders
from mu.notebooks.sizes import LENGTH, WIDTH


def build_vae():
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.18215,
    )


def build_text_encoder(tokenizer, width=WIDTH, kind=CLIPTextModel):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=width,
        )
    )


def build_unet(**config):
    unet = UNet2DConditionModel(
        **dict(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 128, 192),
            norm_num_groups=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        )
        | config
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_sdxl(pipe, width_2=WIDTH // 2):
    """A pipeline in SDXL's format that starts where a trained pocket pipeline of SD's format is.

    What is SDXL's: two text encoders, whose last but one hidden states stand side by side as the context, the pooled embedding of the
    second and the time ids in the time embedding, linear projections around attention, zeros for the empty prompt. What is taken over:
    autoencoder, tokenizer, first text encoder, and the whole UNet, with zeros where it meets what is new, so that it begins by ignoring it."""
    encoder = build_text_encoder(pipe.tokenizer)
    encoder.load_state_dict(pipe.text_encoder.state_dict())
    unet = build_unet(
        cross_attention_dim=WIDTH + width_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + width_2,
    )
    old = pipe.unet.state_dict()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if name not in old:
                p.zero_() if name.startswith("add_embedding.linear_2") else None
            elif (
                p.shape == old[name].shape or p.numel() == old[name].numel()
            ):  # a 1×1 convolution is a linear map
                p.copy_(old[name].reshape(p.shape))
            else:
                p.zero_()[:, :WIDTH] = old[name]
    return StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=encoder,
        text_encoder_2=build_text_encoder(pipe.tokenizer, width_2, CLIPTextModelWithProjection),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
        add_watermarker=False,
    )


def build_judge(concepts, styles):
    """A ResNet (transformers') whose logits are the concepts, then the styles; `id2label` names them."""
    labels = [f"concept:{c}" for c in concepts] + [f"style:{s}" for s in styles]
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 2, 1],
            layer_type="basic",
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    )


def _cosine(step, steps, warmup=100):
    """Share of the full learning rate at a step: linear warm-up, then half a cosine down to 2 %."""
    return min(1, (step + 1) / warmup) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    )


def _descend(loss, optimizer, lr, clip=None):
    """One step of the optimiser at learning rate `lr`."""
    group = optimizer.param_groups[0]
    group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()


def _backgrounds(n, generator, white=0.5):
    """Indices into COLORS, white with the given probability."""
    index = torch.randint(len(COLORS), (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < white, 0, index)


PALETTE = torch.tensor(list(COLORS.values())) / 255


def train_vae(vae, rgba, steps=2500, batch_size=16, lr=1e-3, seed=0, dtype=torch.bfloat16):
    """L1 in pixels and in their differences (lines stay thin), small KL. Yields (step, loss).

    Leaves the latents of each channel with mean 0 and standard deviation 1 / scaling_factor: see `normalise_latents`."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    dx, dy = lambda x: x[..., 1:] - x[..., :-1], lambda x: x[..., 1:, :] - x[..., :-1, :]
    for step in range(steps):
        index = torch.randint(len(rgba), (batch_size,), generator=g)
        x = augment(rgba[index], PALETTE[_backgrounds(batch_size, g)], g)
        with torch.autocast("cpu", dtype):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            y = vae.decode(z).sample
        y = y.float()
        pixels, edges = (
            (x - y).abs().mean(),
            (dx(x) - dx(y)).abs().mean() + (dy(x) - dy(y)).abs().mean(),
        )
        loss = pixels + edges + 1e-5 * posterior.kl().mean() / z[0].numel()
        _descend(loss, optimizer, lr * _cosine(step, steps), clip=1.0)
        yield step, loss.item()


@torch.no_grad()
def normalise_latents(vae, images):
    """Fold the channels' mean and deviation into the two 1×1 convolutions, so that latents × scaling_factor has mean 0 and deviation 1."""
    posterior = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)])
    mean, std = posterior.mean((0, 2, 3)), posterior.std((0, 2, 3)) * vae.config.scaling_factor
    c = len(mean)
    # decoder first: its input is z·std + mean; the encoder's mean becomes (z − mean)/std, its log-variance loses 2 log std
    vae.post_quant_conv.bias += torch.einsum("oihw,i->o", vae.post_quant_conv.weight, mean)
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.bias[c:] -= 2 * std.log()
    return mean, std


def train_judge(
    judge,
    rgba,
    concept_ids,
    style_ids,
    steps=2000,
    batch_size=128,
    lr=2e-3,
    seed=0,
    dtype=torch.bfloat16,
):
    """Cross-entropy on concepts and styles, on real emoji only, with maps, colours, blur and noise drawn at random. Yields (step, loss)."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    n = int(concept_ids.max()) + 1
    judge.train()
    for step in range(steps):
        index = torch.randint(len(rgba), (batch_size,), generator=g)
        x = judge_view(rgba[index], g)
        with torch.autocast("cpu", dtype):
            logits = judge(x).logits.float()
        loss = F.cross_entropy(
            logits[:, :n], concept_ids[index], label_smoothing=0.05
        ) + 0.5 * F.cross_entropy(logits[:, n:], style_ids[index], label_smoothing=0.05)
        _descend(loss, optimizer, lr * _cosine(step, steps))
        yield step, loss.item()
    judge.eval()


def judge_view(rgba, generator, strength=1.2):
    """What the judge is trained on: real drawings, moved, recoloured, blurred and noised. (B, 3, 64, 64) in −1…1."""
    b = len(rgba)

    def r(*shape):
        return torch.rand(*shape, generator=generator)

    x = augment(
        rgba,
        torch.where(r(b, 1) < 0.5, PALETTE[_backgrounds(b, generator)], r(b, 3)),
        generator,
        strength,
    )
    x = x * (0.8 + 0.4 * r(b, 1, 1, 1)) + 0.2 * (r(b, 3, 1, 1) - 0.5)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, 0.9 * r(b, 1, 1, 1) * (r(b, 1, 1, 1) < 0.5))
    return (x + 0.15 * r(b, 1, 1, 1) * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@torch.no_grad()
def encode_drawings(vae, rgba, repeats, seed=0, strength=0.6):
    """`repeats` augmented views of every drawing → latents' mean and std, the drawing and the background colour of each."""
    g = torch.Generator().manual_seed(seed)
    which = torch.arange(len(rgba)).repeat(repeats)
    colors = _backgrounds(len(which), g)
    means, stds = [], []
    for index, color in zip(which.split(64), colors.split(64), strict=False):
        posterior = vae.encode(augment(rgba[index], PALETTE[color], g, strength)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return {"mean": torch.cat(means), "std": torch.cat(stds), "drawing": which, "color": colors}


def sample_captions(drawings, colors, generator, style_share=0.5):
    """One random caption each: a style in `style_share` of them, a background whenever it is not white, an empty one in ten (for guidance)."""
    names, r = list(COLORS), torch.rand(len(drawings), 4, generator=generator)
    return [
        ""
        if r[i, 0] < 0.1
        else caption(
            d["concept"],
            d["style"] if r[i, 1] < style_share else None,
            names[c] if c or r[i, 2] < 0.15 else None,
            TEMPLATES[int(r[i, 3] ** 2 * len(TEMPLATES))],
        )
        for i, (d, c) in enumerate(zip(drawings, colors.tolist(), strict=False))
    ]


def train_unet(
    pipe,
    data,
    drawings,
    steps=6000,
    batch_size=64,
    lr=1e-3,
    seed=0,
    dtype=torch.bfloat16,
    ema_decay=0.9985,
    style_share=0.5,
    state=None,
):
    """Denoising loss with min-SNR-5 weights, UNet and text encoders together, EMA of all, which is the result. Yields (step, loss, save).

    `save()` is the state as a flat dict of tensors; as `state` it continues the run with the numbers of an uninterrupted one."""
    unet, scheduler, scaling_factor = pipe.unet, pipe.scheduler, pipe.vae.config.scaling_factor
    parameters = [
        p for part in (unet, *text_encoders(pipe)) for p in part.requires_grad_(True).parameters()
    ]
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = EMAModel(parameters, decay=ema_decay)
    first = 0
    if state:
        first = ema.optimization_step = int(state["step"]) + 1
        g.set_state(state["generator"])
        with torch.no_grad():
            for i, (p, average) in enumerate(zip(parameters, ema.shadow_params, strict=False)):
                p.copy_(state[f"{i}/weight"])
                average.copy_(state[f"{i}/ema"])
                saved = {
                    k: state[f"{i}/{k}"].clone()
                    for k in ("step", "exp_avg", "exp_avg_sq")
                    if f"{i}/{k}" in state
                }
                if saved:  # not for SDXL's last layer of the first text encoder: nothing reads it
                    optimizer.state[p] = saved
    per_concept = Counter(d["concept"] for d in drawings)
    weights = torch.tensor(
        [1 / per_concept[drawings[i]["concept"]] ** 0.5 for i in data["drawing"].tolist()]
    )
    for step in range(first, steps):
        index = torch.multinomial(weights, batch_size, True, generator=g)
        prompts = sample_captions(
            [drawings[i] for i in data["drawing"][index].tolist()],
            data["color"][index],
            g,
            style_share,
        )
        noise, jitter = (torch.randn(data["mean"][index].shape, generator=g) for _ in range(2))
        latents = (data["mean"][index] + data["std"][index] * jitter) * scaling_factor
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=g)
        with torch.autocast("cpu", dtype):
            predicted = predict_noise(
                unet,
                scheduler.add_noise(latents, noise, timesteps),
                timesteps,
                encode_prompts(pipe, prompts),
            )
        snr = compute_snr(scheduler, timesteps)
        loss = ((predicted.float() - noise).pow(2).mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        _descend(loss, optimizer, lr * _cosine(step, steps, warmup=200), clip=1.0)
        ema.step(parameters)
        yield (
            step,
            loss.item(),
            lambda: (
                {"step": torch.tensor(step), "generator": g.get_state()}
                | {
                    f"{i}/{k}": v.detach()
                    for i, (p, average) in enumerate(
                        zip(parameters, ema.shadow_params, strict=False)
                    )
                    for k, v in (optimizer.state[p] | {"weight": p, "ema": average}).items()
                }
            ),
        )
    ema.copy_to(parameters)


def assess(out, pipe, judge, names, seeds, guidance, steps, facts):
    """Draw and judge every concept from `seeds` seeds, every style on one concept in five, and concepts without guidance; once, below `out`.

    Returns a table, a row an image, its groups "concepts", "styles", "unguided"."""
    asked = {
        "concepts": ({f"a {name}": f"concept:{name}" for name in names}, seeds, guidance),
        "styles": (
            {caption(name, style): f"style:{style}" for name in names[::5] for style in STYLES},
            2,
            guidance,
        ),
        "unguided": ({f"a {name}": f"concept:{name}" for name in names[::4]}, 2, 1.0),
    }
    return pd.concat(
        pd.DataFrame(
            measure(
                Path(out) / what,
                pipe,
                judge,
                make_probe(pipe, {what: prompts}, range(n)),
                scale,
                steps,
                facts,
            )
        )
        for what, (prompts, n, scale) in asked.items()
    )


def shown(out, found, what, every):
    """One in `every` of the samples of a group that `assess` has judged: images (n, 3, 64, 64) in 0…1."""
    tiles = np.stack(
        from_grid(Path(out) / what / "samples.png", int((found.group == what).sum()), 64)[::every]
    )
    return torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255


def quality(found):
    """The figures of a card from the table of `assess`: shares with 95 % intervals, by concept and by style."""
    result = scores(found, ["group"]).set_index("group")

    def share(what):
        return (
            found[found.group == what]
            .groupby("expected", sort=False)
            .hit.mean()
            .rename(lambda label: label.split(":")[1])
        )

    per_concept = share("concepts")
    return {
        what: result.loc[what].drop("n").to_dict() | {"images": int(result.n[what])}
        for what in result.index
    } | {
        "strong concepts": float((per_concept >= 0.85).mean()),
        "per concept": per_concept.to_dict(),
        "per style": share("styles").to_dict(),
    }


def megabytes(*folders):
    """Size of all files below the folders, in 10⁶ bytes."""
    return (
        sum(
            file.stat().st_size
            for folder in folders
            for file in Path(folder).rglob("*")
            if file.is_file()
        )
        / 1e6
    )


def fill_card(card, metrics, mark="figures"):
    """Write the figures of a metrics.json (see the notebook of the recipe) between the two marks of a Markdown card."""
    p, judge, vae = metrics["protocol"], metrics.get("judge"), metrics.get("autoencoder")

    def percent(x):
        return f"{100 * x:.1f} %"

    def interval(r):
        return f"{percent(r['score'])} ({percent(r['low'])} to {percent(r['high'])}), {r['images']} images"

    lines = [
        (
            'samples in which the judge sees the concept asked for, "a {concept}"',
            interval(metrics["concepts"]),
        ),
        (
            f"concepts that it sees in at least 85 % of their {p['seeds']} samples",
            f"{percent(metrics['strong concepts'])} of {len(metrics['per concept'])}",
        ),
        (
            'samples in which it sees the style asked for, "a {concept}, {style} style"',
            interval(metrics["styles"]),
        ),
        *(
            (f"the same, {style} alone", percent(share))
            for style, share in metrics["per style"].items()
        ),
        (
            "samples in which it sees the concept at guidance 1, that is without guidance",
            interval(metrics["unguided"]),
        ),
    ]
    if judge:  # made by the same recipe
        lines += [
            (
                "judge, new views of the drawings that it was trained on: concept, style",
                f"{percent(judge['concept'])}, {percent(judge['style'])}",
            ),
            (
                f"another judge, trained without any {judge['unseen style']} drawing, on those drawings: concept",
                percent(judge["unseen concept"]),
            ),
            (
                "autoencoder, reconstruction in the four styles, in the other five",
                f"{vae['psnr']:.1f} dB, {vae['psnr of unseen styles']:.1f} dB",
            ),
        ]
    lines.append(("size, pipeline and judge", f"{metrics['megabytes']:.1f} MB"))
    weakest = ", ".join(
        f"{name} {percent(share)}"
        for name, share in sorted(metrics["per concept"].items(), key=lambda x: x[1])[:8]
    )
    text = (
        "| figure | measured |\n|---|---|\n"
        + "".join(f"| {what} | {value} |\n" for what, value in lines)
        + (
            f"\nWeakest concepts: {weakest}. Guidance {p['guidance']}, {p['sampling_steps']} steps of {p['sampler']}, seeds 0 to {p['seeds'] - 1}; 95 % (Wilson) intervals over "
            f"images; {', '.join(f'{k} {v}' for k, v in p['versions'].items())}; weights {', '.join(f'{k} `{v}`' for k, v in p['weights'].items())}.\n"
        )
    )
    fill(card, text, mark)
