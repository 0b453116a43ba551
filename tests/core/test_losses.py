"""Losses and trajectories against plain diffusers and torch calls."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention
from plain import denoising_loss, generator, guided_ddim, unet_inputs

from mu.losses import (
    Inputs,
    Term,
    denoising,
    draw_minibatch,
    mean_square,
    predictions,
    squared_errors,
)
from mu.models import predict, select, stack
from mu.sampling import Trajectory, sample_trajectory
from mu.targets import ESD
from mu.trainable import trainable


def denoised(batch, noise_scheduler):
    """Return the latents of a minibatch without its noise."""
    alpha = noise_scheduler.alphas_cumprod[batch.inputs.timesteps].view(-1, 1, 1, 1)
    return (batch.inputs.latents - (1 - alpha).sqrt() * batch.target) / alpha.sqrt()


def test_minibatch_is_scaled_noise_on_drawn_images(sets, noise_scheduler):
    forget = sets[0]
    batch = draw_minibatch(forget, noise_scheduler, 500, generator())
    latents, timesteps = denoised(batch, noise_scheduler), batch.inputs.timesteps
    early = timesteps < 500  # at later ones, rounding hides the latents
    jitter = (latents[:, None] - forget.mean[None])[early] / 0.1
    size, image = jitter.pow(2).mean((2, 3, 4)).min(1)
    # each row is one image, within the deviation of the VAE
    assert size.max() < 1.5
    assert abs(size.mean() - 1) < 0.05
    assert image.unique().tolist() == list(range(6))
    prompts = batch.inputs.conditioning["encoder_hidden_states"]
    for row in torch.nonzero(early)[:20, 0]:
        nearest = (latents[row] - forget.mean).pow(2).mean((1, 2, 3)).argmin()
        expected = forget.conditioning["encoder_hidden_states"][forget.prompt[nearest]]
        assert torch.equal(prompts[row], expected)
    again = draw_minibatch(forget, noise_scheduler, 500, generator())
    assert torch.equal(again.inputs.latents, batch.inputs.latents)
    assert torch.equal(again.inputs.timesteps, timesteps)


def test_timesteps_are_uniform_and_stratified(sets, noise_scheduler):
    timesteps = draw_minibatch(sets[0], noise_scheduler, 500, generator()).inputs.timesteps
    assert abs(timesteps.float().mean() - 499.5) < 40
    assert timesteps.min() < 30
    assert 970 < timesteps.max() < 1000
    few = draw_minibatch(sets[0], noise_scheduler, 8, generator()).inputs.timesteps
    assert (few // 125).tolist() == list(range(8))


def test_denoising_loss_is_the_one_of_a_plain_diffusers_loop(unet, sets, noise_scheduler):
    batch = draw_minibatch(sets[0], noise_scheduler, 8, generator(1))
    _, t, c = unet_inputs(batch)
    noisy = noise_scheduler.add_noise(denoised(batch, noise_scheduler), batch.target, t)
    predicted = unet(noisy, t, encoder_hidden_states=c).sample
    expected = torch.nn.functional.mse_loss(predicted, batch.target)
    (found,) = squared_errors(unet, [denoising(batch)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert torch.equal(found, denoising_loss(unet, batch))


def test_parts_in_one_pass_are_the_losses_of_separate_passes(unet, sets, noise_scheduler):
    parts = [
        denoising(draw_minibatch(s, noise_scheduler, n, generator(n)))
        for s, n in zip(sets[:3], (5, 2, 3), strict=True)
    ]
    passes = []
    unet.register_forward_hook(lambda *_: passes.append(1))
    together = squared_errors(unet, parts)
    assert len(passes) == 1
    assert len(together) == 3
    apart = [squared_errors(unet, [part])[0] for part in parts]
    torch.testing.assert_close(torch.stack(together), torch.stack(apart), rtol=1e-5, atol=0)
    assert len({round(x.item(), 4) for x in apart}) == 3  # the order matters


def test_the_gradient_of_an_image_ends_at_its_bound_and_turns_at_twice_the_bound():
    error = torch.tensor([[0.5, -0.5], [1.2, 1.0], [2.0, 1.0]], requires_grad=True)
    loss = mean_square(error, image_bound=1.0)  # the rows' own means: .25, 1.22, 2.5
    assert loss.item() == pytest.approx(error.pow(2).mean().item())
    (free,) = torch.autograd.grad(error.pow(2).mean(), error)
    (found,) = torch.autograd.grad(loss, error)
    assert torch.equal(found, free * torch.tensor([[1.0], [0.0], [-1.0]]))


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
    assert (conditional - empty).abs().max() > 1e-3
    assert not target.requires_grad
    both = (Term("target", 1.0, batch.inputs, target), Term("0", 1.0, batch.inputs, 0 * z))
    loss, to_zero = squared_errors(unet, both)
    student = unet(z, t, c["encoder_hidden_states"]).sample
    assert to_zero.item() == pytest.approx(student.pow(2).mean().item(), rel=1e-4)
    torch.testing.assert_close(loss, (student - expected).pow(2).mean(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("points", [1, 2])
def test_each_row_of_a_trajectory_is_a_guided_ddim_loop_stopped_there(
    unet, sets, noise_scheduler, points
):
    unconditional = sets[3]
    conditioning = select(sets[0].conditioning, torch.tensor([0, 1, 1]))
    options = (generator(5), Trajectory(3.0, 50, points), (4, 8, 8))
    z, t = sample_trajectory(unet, noise_scheduler, conditioning, unconditional, *options)
    assert z.shape == (3 * points, 4, 8, 8)
    assert t.shape == (3 * points,)
    assert not z.requires_grad

    g = generator(5)
    stops = torch.randint(50, (points, 3), generator=g)
    noise = torch.randn(3, 4, 8, 8, generator=g)
    assert len(set(stops.flatten().tolist())) == 3 * points
    scheduler = tiny.make_scheduler()
    scheduler.set_timesteps(50)
    for row in range(3):
        prompts = (unconditional, select(conditioning, [row]))
        prompts = [c["encoder_hidden_states"] for c in prompts]
        for point, stop in enumerate(stops[:, row].tolist()):
            i = point * 3 + row  # the first points of all rows come first
            with torch.no_grad():
                latent = guided_ddim(unet, scheduler, noise[[row]], stop, prompts, 3.0)
            torch.testing.assert_close(z[[i]], latent, rtol=1e-4, atol=1e-5)
            first = scheduler.timesteps[stop].item()
            assert first <= t[i] < first + 20


@pytest.mark.parametrize("points", [1, 4])
def test_timesteps_are_in_the_bin_of_the_noise_level_of_their_latents(noise_scheduler, points):
    """With predictions of 0, DDIM only rescales, so the scale of the latents gives their level."""
    n, passes = 4000 // points, []

    def predict_zero(latents, *_, **__):
        passes.append(1)
        return SimpleNamespace(sample=torch.zeros_like(latents))

    conditioning = {"encoder_hidden_states": torch.zeros(n, 1, 1)}
    fixed = (predict_zero, noise_scheduler, conditioning, select(conditioning, slice(1)))
    z, t = sample_trajectory(*fixed, generator(), Trajectory(3.0, 50, points), (1, 2, 2))
    g = generator()
    torch.randint(50, (points, n), generator=g)
    noise = torch.randn(n, 1, 2, 2, generator=g).repeat(points, 1, 1, 1)

    grid = torch.arange(981, 0, -20)
    scales = (noise_scheduler.alphas_cumprod[grid] / noise_scheduler.alphas_cumprod[981]).sqrt()
    ratio = (z / noise).flatten(1).median(1).values
    step = (ratio[:, None] / scales - 1).abs().argmin(1)
    # no row is between two levels, and none is fully denoised
    torch.testing.assert_close(ratio, scales[step], rtol=1e-4, atol=0)
    within = t - grid[step]
    assert within.min() == 0
    assert within.max() == 19
    assert t.max() == 999
    assert t.min() >= 1
    counts = torch.bincount(step, minlength=50)
    assert len(counts) == 50
    assert counts.min() > 40  # 80 expected
    assert counts.max() < 130
    for i in range(50):  # t is uniform in each bin; the first one ends at 999
        assert within[step == i].unique().numel() >= 15
    assert len(passes) == 49


def test_subsets_are_exactly_the_named_parameters():
    unet = tiny.make_unet(mid_block_type="UNetMidBlock2DCrossAttn")
    everything = dict(unet.named_parameters())
    names = {id(p): name for name, p in everything.items()}

    def of(*modules):
        return {names[id(p)] for m in modules for p in m.parameters()}

    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    cross = of(*(m for m in attentions if m.is_cross_attention))
    ends = of(unet.time_embedding, unet.conv_out, unet.conv_norm_out)
    assert cross
    assert ends
    u = everything.keys() - cross - ends
    for subset, expected in {"x": cross, "u": u, "f": everything.keys()}.items():
        chosen = trainable(unet, subset)
        assert chosen.keys() == set(expected)
        assert all(everything[name] is p for name, p in chosen.items())
        assert {name for name, p in everything.items() if p.requires_grad} == set(expected)
    with pytest.raises(ValueError, match="'attention'.*x, u, f"):
        trainable(unet, "attention")


def test_select_and_stack_keep_every_tensor_of_a_conditioning():
    c = {
        "encoder_hidden_states": torch.arange(12.0).view(3, 2, 2),
        "text_embeds": torch.arange(3.0)[:, None],
        "time_ids": torch.ones(3, 6),
    }
    both = stack(select(c, torch.tensor([2, 0])), c)
    assert both["text_embeds"][:, 0].tolist() == [2, 0, 0, 1, 2]
    assert both["time_ids"].shape == (5, 6)
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
    found = predict(unet, z, t, c)
    added = {name: c[name] for name in ("text_embeds", "time_ids")}
    expected = unet(z, t, c["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert torch.equal(found, expected)
    other = c | {"text_embeds": c["text_embeds"] * 2}
    assert not torch.equal(found, predict(unet, z, t, other))
