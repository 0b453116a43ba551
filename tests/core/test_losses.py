"""Losses and trajectories against plain diffusers and torch calls."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention

from mu.losses import Inputs, Term, denoising, draw_minibatch, predictions, squared_errors
from mu.models import predict_noise, select, stack
from mu.sampling import Trajectory, sample_trajectory
from mu.targets import ESD
from mu.trainable import trainable


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_minibatch_is_scaled_noise_on_drawn_images(sets, noise_scheduler):
    forget = sets[0]
    batch = draw_minibatch(forget, noise_scheduler, 500, generator())
    alpha = noise_scheduler.alphas_cumprod[batch.inputs.timesteps].view(-1, 1, 1, 1)
    latents = (batch.inputs.latents - (1 - alpha).sqrt() * batch.noise) / alpha.sqrt()
    early = batch.inputs.timesteps < 500  # where the latents can be told from the noise
    jitter = (latents[:, None] - forget.mean[None])[early] / 0.1
    size, image = jitter.pow(2).mean((2, 3, 4)).min(1)
    assert (
        size.max() < 1.5 and abs(size.mean() - 1) < 0.05
    )  # one image each, within the deviation of the VAE
    assert image.unique().tolist() == list(range(6))
    for row in torch.nonzero(early)[:20, 0]:  # and with the prompt of that image
        nearest = (latents[row] - forget.mean).pow(2).mean((1, 2, 3)).argmin()
        assert torch.equal(
            batch.inputs.conditioning["encoder_hidden_states"][row],
            forget.conditioning["encoder_hidden_states"][forget.prompt[nearest]],
        )
    assert (
        abs(batch.inputs.timesteps.float().mean() - 499.5) < 40
        and batch.inputs.timesteps.min() < 30
        and 970 < batch.inputs.timesteps.max() < 1000
    )
    assert (
        draw_minibatch(forget, noise_scheduler, 8, generator()).inputs.timesteps // 125
    ).tolist() == list(range(8))  # one of each stratum
    again = draw_minibatch(forget, noise_scheduler, 500, generator())
    assert torch.equal(again.inputs.latents, batch.inputs.latents) and torch.equal(
        again.inputs.timesteps, batch.inputs.timesteps
    )


def test_denoising_loss_is_the_one_of_a_plain_diffusers_loop(unet, sets, noise_scheduler):
    batch = draw_minibatch(sets[0], noise_scheduler, 8, generator(1))
    alpha = noise_scheduler.alphas_cumprod[batch.inputs.timesteps].view(-1, 1, 1, 1)
    latents = (batch.inputs.latents - (1 - alpha).sqrt() * batch.noise) / alpha.sqrt()
    noisy = noise_scheduler.add_noise(latents, batch.noise, batch.inputs.timesteps)
    expected = torch.nn.functional.mse_loss(
        unet(
            noisy,
            batch.inputs.timesteps,
            encoder_hidden_states=batch.inputs.conditioning["encoder_hidden_states"],
        ).sample,
        batch.noise,
    )
    (found,) = squared_errors(unet, [denoising(batch)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    exact = torch.nn.functional.mse_loss(
        unet(
            batch.inputs.latents,
            batch.inputs.timesteps,
            batch.inputs.conditioning["encoder_hidden_states"],
        ).sample,
        batch.noise,
    )
    assert torch.equal(found, exact)


def test_parts_in_one_pass_are_the_losses_of_separate_passes(unet, sets, noise_scheduler):
    parts = [
        denoising(draw_minibatch(s, noise_scheduler, n, generator(n)))
        for s, n in zip(sets, (5, 2, 3), strict=False)
    ]
    passes = []
    unet.register_forward_hook(lambda *_: passes.append(1))
    together = squared_errors(unet, parts)
    assert len(passes) == 1 and len(together) == 3
    apart = [squared_errors(unet, [part])[0] for part in parts]
    torch.testing.assert_close(torch.stack(together), torch.stack(apart), rtol=1e-5, atol=0)
    assert len({round(x.item(), 4) for x in apart}) == 3  # in this order and no other


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_esd_target_is_the_equation(unet, unet_frozen, sets, noise_scheduler, eta):
    forget, unconditional = sets[0], sets[3]
    batch = draw_minibatch(forget, noise_scheduler, 4, generator())
    z, t, c = batch.inputs.latents, batch.inputs.timesteps, batch.inputs.conditioning
    nothing = select(unconditional, torch.zeros(4, dtype=torch.long))
    asked = {"no concept": Inputs(z, t, nothing), "concept": Inputs(z, t, c)}
    frozen = dict(zip(asked, predictions(unet_frozen, list(asked.values())), strict=True))
    target = ESD(eta).target(frozen, unet, None, None)
    with torch.no_grad():
        conditional = unet_frozen(z, t, c["encoder_hidden_states"]).sample
        empty = unet_frozen(z, t, unconditional["encoder_hidden_states"].expand(4, -1, -1)).sample
    expected = empty - eta * (conditional - empty)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
    assert (conditional - empty).abs().max() > 1e-3 and not target.requires_grad
    both = (Term("target", 1.0, batch.inputs, target), Term("0", 1.0, batch.inputs, 0 * z))
    loss, to_zero = squared_errors(unet, both)
    assert to_zero.item() == pytest.approx(
        unet(z, t, c["encoder_hidden_states"]).sample.pow(2).mean().item(), rel=1e-4
    )
    torch.testing.assert_close(
        loss,
        (unet(z, t, c["encoder_hidden_states"]).sample - expected).pow(2).mean(),
        rtol=1e-4,
        atol=1e-9,
    )


@pytest.mark.parametrize("points", [1, 2])
def test_each_row_of_a_trajectory_is_a_guided_ddim_loop_stopped_there(
    unet, sets, noise_scheduler, points
):
    forget, unconditional = sets[0], sets[3]
    conditioning = select(forget.conditioning, torch.tensor([0, 1, 1]))
    seed = 5
    z, t = sample_trajectory(
        unet,
        noise_scheduler,
        conditioning,
        unconditional,
        generator(seed),
        Trajectory(3.0, 50, points),
        (4, 8, 8),
    )
    assert z.shape == (3 * points, 4, 8, 8) and t.shape == (3 * points,) and not z.requires_grad

    start = generator(seed)
    stops = torch.randint(50, (points, 3), generator=start)
    noise = torch.randn(3, 4, 8, 8, generator=start)
    assert len(set(stops.flatten().tolist())) == 3 * points
    for row in range(3):
        scheduler = tiny.make_scheduler()
        scheduler.set_timesteps(50)
        latents, on_the_way = noise[row : row + 1], []
        for step in scheduler.timesteps[: stops[:, row].max() + 1]:
            on_the_way.append(latents)
            with torch.no_grad():
                empty = unet(latents, step, unconditional["encoder_hidden_states"]).sample
                full = unet(
                    latents, step, conditioning["encoder_hidden_states"][row : row + 1]
                ).sample
            latents = scheduler.step(empty + 3.0 * (full - empty), step, latents).prev_sample
        for point, stop in enumerate(stops[:, row].tolist()):  # all rows' first points first
            i = point * 3 + row
            torch.testing.assert_close(z[i : i + 1], on_the_way[stop], rtol=1e-4, atol=1e-5)
            first = scheduler.timesteps[stop].item()
            assert first <= t[i] < first + 20


@pytest.mark.parametrize("points", [1, 4])
def test_timesteps_lie_in_the_bin_of_the_noise_level_that_the_latents_have(noise_scheduler, points):
    """A network that predicts no noise: DDIM then only rescales, so that the latents tell how far they came."""
    n, seed, passes = 4000 // points, 0, []

    def nothing(latents, *_, **__):
        passes.append(1)
        return SimpleNamespace(sample=torch.zeros_like(latents))

    conditioning = {"encoder_hidden_states": torch.zeros(n, 1, 1)}
    z, t = sample_trajectory(
        nothing,
        noise_scheduler,
        conditioning,
        select(conditioning, slice(1)),
        generator(seed),
        Trajectory(3.0, 50, points),
        (1, 2, 2),
    )
    start = generator(seed)
    torch.randint(50, (points, n), generator=start)
    noise = torch.randn(n, 1, 2, 2, generator=start).repeat(points, 1, 1, 1)

    grid = torch.arange(981, 0, -20)
    scales = (noise_scheduler.alphas_cumprod[grid] / noise_scheduler.alphas_cumprod[981]).sqrt()
    ratio = (z / noise).flatten(1).median(1).values
    step = (ratio[:, None] / scales - 1).abs().argmin(1)
    torch.testing.assert_close(
        ratio, scales[step], rtol=1e-4, atol=0
    )  # no row is between levels, none is fully denoised
    within = t - grid[step]
    assert within.min() == 0 and within.max() == 19 and t.max() == 999 and t.min() >= 1
    counts = torch.bincount(step, minlength=50)
    assert len(counts) == 50 and counts.min() > 40 and counts.max() < 130  # 80 each
    for i in range(50):  # t is uniform in each bin (the first one is cut at 999)
        assert within[step == i].unique().numel() >= 15
    assert len(passes) == 49


def test_subsets_are_exactly_the_named_parameters():
    unet = tiny.make_unet(mid_block_type="UNetMidBlock2DCrossAttn")
    everything = dict(unet.named_parameters())
    names = {id(p): name for name, p in everything.items()}

    def of(*modules):
        return {names[id(p)] for m in modules for p in m.parameters()}

    cross = of(*(m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention))
    ends = of(unet.time_embedding, unet.conv_out, unet.conv_norm_out)
    assert cross and ends
    for subset, expected in {
        "x": cross,
        "u": everything.keys() - cross - ends,
        "f": everything.keys(),
    }.items():
        chosen = trainable(unet, subset)
        assert chosen.keys() == set(expected)
        assert all(everything[name] is p for name, p in chosen.items())
        assert {name for name, p in everything.items() if p.requires_grad} == set(expected)
    with pytest.raises(ValueError, match="'attention'.*x, u, f"):
        trainable(unet, "attention")


def test_rows_and_stack_take_every_tensor_of_a_conditioning():
    c = {
        "encoder_hidden_states": torch.arange(12.0).view(3, 2, 2),
        "text_embeds": torch.arange(3.0)[:, None],
        "time_ids": torch.ones(3, 6),
    }
    both = stack(select(c, torch.tensor([2, 0])), c)
    assert both["text_embeds"][:, 0].tolist() == [2, 0, 0, 1, 2] and both["time_ids"].shape == (
        5,
        6,
    )
    assert torch.equal(both["encoder_hidden_states"][0], c["encoder_hidden_states"][2])


def test_added_conditions_reach_the_unet():
    unet = tiny.make_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    g = generator()
    z, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 700])
    c = {
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=g),
        "text_embeds": torch.randn(2, 16, generator=g),
        "time_ids": torch.ones(2, 6),
    }
    found = predict_noise(unet, z, t, c)
    expected = unet(
        z,
        t,
        c["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": c["text_embeds"], "time_ids": c["time_ids"]},
    ).sample
    assert torch.equal(found, expected)
    assert not torch.equal(
        found, predict_noise(unet, z, t, c | {"text_embeds": c["text_embeds"] * 2})
    )
