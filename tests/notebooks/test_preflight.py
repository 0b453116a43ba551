"""The preflight's numbers: against hand counts, against what the real loop takes, and its advice carried out."""

import json

import pytest
import tiny
import torch

from mu import train
from mu.models import encode_prompts, load_pipeline
from mu.notebooks import preflight as pf
from mu.notebooks.measure import rehearse, union
from mu.notebooks.preflight import GIB, RESERVE, Tracker, estimate, preflight
from mu.notebooks.sizes import SIZES, random_pipeline
from mu.sampling import draw_images
from mu.trainable import trainable

META = dict(
    batch_size=4,
    trajectory_steps=4,
    trajectory_reuse=2,
    retain=1.0,
    retain_batch_size=8,
    ascent=0.1,
    relearn=0.1,
    self_destruct=0.1,
    inner_batch_size=8,
    inner_steps=2,
)


def small(part, **other):
    """A full-size configuration, narrowed."""
    narrow = {
        "unet": dict(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            attention_head_dim=2,
            transformer_layers_per_block=1,
            mid_block_type=None,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": dict(
            sample_size=16,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    }
    return (
        narrow.get(
            part,
            dict(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=16,
            ),
        )
        | other
    )


@pytest.mark.parametrize(
    "name, counts",
    [
        ("sd-v1-4", dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480)),
        (
            "sdxl",
            dict(
                unet=2_567_463_684,
                vae=83_653_863,
                text_encoder=123_060_480,
                text_encoder_2=694_659_840,
            ),
        ),
    ],
)
def test_full_sizes_are_the_published_ones(name, counts):
    pipe = random_pipeline(name, device="meta")
    parts = {
        key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)
    }
    assert {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()} == counts
    assert all(
        p.device.type == "meta" and not p.requires_grad
        for part in parts.values()
        for p in part.parameters()
    )
    assert (
        pipe.vae_scale_factor * pipe.unet.config.sample_size == {"sd-v1-4": 512, "sdxl": 1024}[name]
    )
    assert (
        pipe.vae.config.scaling_factor == {"sd-v1-4": 0.18215, "sdxl": 0.13025}[name]
        and pipe.vae.config.force_upcast
    )
    ids = pipe.tokenizer(
        "a photo of a cat, by nobody in particular", padding="max_length"
    ).input_ids
    assert len(ids) == 77 and max(ids) < pipe.text_encoder.config.vocab_size == 49408


@pytest.mark.parametrize("name, width", [("sd-v1-4", 16), ("sdxl", 32)])
def test_a_random_pipeline_runs(name, width, monkeypatch):
    extra = (
        dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16)
        if name == "sdxl"
        else {}
    )
    monkeypatch.setitem(
        SIZES,
        name,
        {
            part: config
            | small(part, **(dict(cross_attention_dim=width) | extra if part == "unet" else {}))
            for part, config in SIZES[name].items()
        },
    )
    before = torch.random.get_rng_state()
    pipe, again = (
        random_pipeline(name, device="cpu", seed=3),
        random_pipeline(name, device="cpu", seed=3),
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(p, q)
        for p, q in zip(pipe.unet.parameters(), again.unet.parameters(), strict=False)
    )
    conditioning = encode_prompts(pipe, ["a cat", "a dog on a tree"])
    assert conditioning["encoder_hidden_states"].shape == (2, 77, width)
    images = draw_images(pipe, conditioning, encode_prompts(pipe, [""]), seeds=[0, 0], steps=3)
    assert (
        images.isfinite().all()
        and images.std() > 0.01
        and (images[0] - images[1]).abs().max() > 1e-4
    )  # the prompt matters
    assert random_pipeline(name, device="cpu", dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="sd-v1-4"):
        random_pipeline("sd-v9", device="cpu")


def test_tracker_counts_by_hand():
    there = torch.zeros(1000)
    with Tracker() as t:
        a = there + 1  # 4000
        b = a.view(10, 100).t()  # a view of it
        c = b @ a.view(10, 100)  # 100 × 100 more
        d = a * 2
        del a, b, d
        e = there + 2
    assert max(t.timeline) == 4000 + 40_000 + 4000 and t.bytes == 40_000 + 4000
    assert t.flops == 2 * 100 * 10 * 100
    del c, e
    assert t.bytes == 0


def test_union_of_stretches():
    assert union([(8, 12), (0, 10), (20, 21), (2, 5)]) == 13 and union([]) == 0


def test_rehearsing_profiles_later_steps_and_trains_nothing_else(pipe):
    text = [p.clone() for p in pipe.text_encoder.parameters()]
    before, measured = (
        next(pipe.unet.parameters()).clone(),
        rehearse(
            pipe,
            META | dict(inner_optimizer="sgd,adam", inner_steps=[1, 2]),
            steps=1,
            profiled_steps=2,
        ),
    )
    assert (
        0 < measured.share < 1
        and [r.step for r in measured.records] == [1]
        and not torch.equal(before, next(pipe.unet.parameters()))
    )
    assert all(
        torch.equal(p, q) for p, q in zip(text, pipe.text_encoder.parameters(), strict=False)
    )


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adamw8bit"])
def test_optimiser_bytes_are_the_real_ones(name):
    unet = tiny.make_unet(
        block_out_channels=(32, 64)
    )  # some tensors on either side of 4,096 elements
    state = train.State(unet, "f", optimizer=name)
    if "8bit" not in name:
        assert pf._moments(name, state.parameters) == (
            0 if name == "sgd" else 8 * sum(p.numel() for p in state.parameters)
        )
    for p in state.parameters:
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    shared = {
        id(v): v
        for s in state.optimizer.state.values()
        for k, v in s.items()
        if torch.is_tensor(v) and v.ndim and "qmap" not in k
    }
    assert pf._moments(name, state.parameters) == sum(
        v.numel() * v.element_size() for v in shared.values()
    )


CASES = {
    "plain": dict(trajectory_steps=8, trajectory_reuse=4),
    "meta": META,
    "clean": META
    | dict(clean=0.1, clean_every=2, self_destruct=0.0, retain=0.0, inner_optimizer="adam"),
    "micro-batches": META | dict(accumulation=4, retain_prompts=4),
    "checkpointing": META | dict(gradient_checkpointing=True, frozen="half"),
    "bf16": META | dict(precision="bf16", method="esd-x"),
    "lora": META
    | dict(subset="lora", rank=4, frozen="none", weights="half", precision="bf16", accumulation=2),
    "sdd": META | dict(method="sdd"),
    "closed form": META | dict(method="rece"),
    "second order": META | dict(order="second", inner_batch_size=32, ascent=0.0),
}


@pytest.mark.parametrize(
    "folder, name",
    [("sd_folder", name) for name in CASES]
    + [("sdxl_folder", "meta"), ("sdxl_folder", "micro-batches")],
)
def test_the_real_loop_takes_what_was_predicted(folder, name, request):
    p = CASES[name]
    pipe = load_pipeline(
        str(request.getfixturevalue(folder)),
        device="cpu",
        dtype=p.get("weights", "full"),
        precision=p.get("precision", "no"),
        gradient_checkpointing=p.get("gradient_checkpointing", False),
    )
    found = estimate(pipe, p | dict(offload=True), gpu=False)
    others = sum(
        q.numel() * q.element_size()
        for name in ("vae", "text_encoder", "text_encoder_2")
        if hasattr(pipe, name)
        for q in getattr(pipe, name).parameters()
    )
    predicted = max(gib for phase, gib in found.phases.items() if phase != "start") * GIB
    measured = rehearse(
        pipe, p | dict(offload=True), steps=2
    )  # on a CPU there is no other memory: they stay
    assert (
        predicted - others == pytest.approx(measured.gib * GIB - others, rel=0.06)
        and len(measured.records) == 2
    )
    if name not in (
        "clean",
        "plain",
    ):  # where chance, how far a trajectory goes, is a small part of it
        assert found.flops == pytest.approx(measured.flops, rel=0.05)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="compares CUDA's own peak with the preflight: no such allocator here; the test above does so with a CPU's tensors",
)
@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {}),
        ("micro-batches", dict(accumulation=2)),
        ("lora", dict(subset="lora", frozen="none", weights="half")),
        ("full", dict(method="esd-f", snapshot="cpu")),
    ],
)
def test_on_a_gpu_sd_takes_what_was_predicted(name, change):
    p = (
        META
        | dict(
            method="esd-x",
            precision="fp16",
            gradient_checkpointing=True,
            frozen="half",
            trajectory_steps=2,
            offload=True,
        )
        | change
    )
    pipe = random_pipeline(
        "sd-v1-4",
        dtype=torch.float16 if p.get("weights") == "half" else torch.float32,
        precision="fp16",
        gradient_checkpointing=True,
    )
    assert estimate("sd-v1-4", p).gib == pytest.approx(rehearse(pipe, p, steps=2).gib, rel=0.15)


def test_two_traces_tell_all_rows(pipe):
    """Peak and FLOPs for other rows and micro-batches than the two that were traced, against a trace of them."""
    network = (
        json.dumps(dict(pipe.unet.config)),
        "f",
        16,
        torch.float32,
        "bf16",
        True,
        "same",
        True,
        False,
    )
    for rows, accumulation in ((1, 1), (7, 1), (21, 3), (12, 3)):
        bytes_, flops = pf._trace("train", rows, 8, 20, accumulation, *network)
        assert pf._pass("train", rows, accumulation, 8, 20, *network) == pytest.approx(
            (max(bytes_), flops), rel=2e-2
        )
    assert pf._pass("train", 0, 3, 8, 20, *network) == (0, 0)


def test_what_is_kept_by_hand(pipe):
    n = sum(p.numel() for p in pipe.unet.parameters())
    trained = sum(p.numel() for p in trainable(pipe.unet, "x").values())
    p = META | dict(
        method="esd-x",
        optimizer="adamw",
        frozen="half",
        offload=True,
        weights="full",
        inner_optimizer="sgd",
    )

    def kept(**change):
        return {name: round(gib * GIB) for name, gib in estimate(pipe, p | change).kept.items()}

    assert kept() == {"UNet": 4 * n, "frozen UNet": 2 * n, "optimiser": 8 * trained}
    assert kept(optimizer="sgd", frozen="same", retain_prompts=5) == {
        "UNet": 4 * n,
        "frozen UNet": 4 * n,
        "random prompts": 4 * 5 * 20 * 16,
    }
    assert (
        kept(method="sdd")["average"] == 4 * trained
        and kept(method="sdd")["optimiser"] == 8 * trained
    )
    adapters = sum(q.numel() for q in trainable(tiny.make_unet(), "lora", 3).values())
    assert kept(subset="lora", rank=3, frozen="none", weights="half") == {
        "UNet": 2 * n + 4 * adapters,
        "optimiser": 8 * adapters,
    }
    others = sum(4 * q.numel() for part in (pipe.vae, pipe.text_encoder) for q in part.parameters())
    assert kept(offload=False)["VAE, text encoders"] == others

    def attacked(**change):
        return estimate(pipe, p | change).phases["simulated fine-tuning"] * GIB

    assert attacked() - attacked(snapshot="cpu") == pytest.approx(4 * trained)  # the copy of θ
    assert attacked(inner_optimizer="sgd,adam") - attacked() == pytest.approx(8 * trained)
    assert (
        estimate(pipe, p, gpu=False).phases
        == estimate(pipe, p | dict(snapshot="cpu"), gpu=False).phases
    )  # a CPU has no other memory
    assert estimate(pipe, p).phases["update"] * GIB == pytest.approx(
        4 * n + 2 * n + 8 * trained + 2 * 4 * trained
    )


def test_more_needs_more(pipe):
    p = META | dict(offload=True)
    gib, flops = (
        lambda **change: estimate(pipe, p | change).gib,
        lambda **change: estimate(pipe, p | change).flops,
    )
    assert (
        gib() < gib(retain_batch_size=16) < gib(retain_batch_size=16, resolution=32)
        and gib(resolution=16) == gib()
    )
    assert gib(accumulation=4) < gib(accumulation=2) < gib() and flops(accumulation=2) > flops()
    assert gib(gradient_checkpointing=True) < gib() and flops(gradient_checkpointing=True) > flops()
    assert (
        gib(subset="x") < gib()
        and flops(subset="x") < flops()
        and gib(processes=2) < gib()
        and flops(processes=2) == pytest.approx(flops() / 2)
    )
    assert (
        flops(inner_steps=[3, 5])
        == pytest.approx((flops(inner_steps=3) + flops(inner_steps=5)) / 2)
        and flops(order="second") > flops()
    )
    assert gib(precision="fp16", frozen="half") < gib() == gib(steps=7)


def test_norms_under_autocast_take_float32_on_a_gpu(pipe):
    def network(gpu):
        return (
            json.dumps(dict(pipe.unet.config)),
            "f",
            16,
            torch.float32,
            "bf16",
            False,
            "same",
            gpu,
            False,
        )

    on_gpu, on_cpu = (pf._pass("train", 8, 1, 8, 20, *network(gpu))[0] for gpu in (True, False))
    assert on_gpu > 1.1 * on_cpu


def test_advice_makes_it_fit(pipe, monkeypatch):
    whole = estimate(pipe, META).gib
    for share, possible in ((2.0, True), (0.6, True), (0.3, True), (1e-3, False)):
        monkeypatch.setitem(pf.GPUS, "nano", (RESERVE + share * whole, 1, 0.5, True))
        found = preflight(pipe, META, "nano")
        assert (
            found.fits == (share > 1)
            and found.needs[0][:2] == ({}, whole)
            and (found.needs[-1][1] <= found.usable) == possible
        )
        assert (len(found.needs) == 1) == found.fits and all(
            b[1] < a[1] for a, b in zip(found.needs, found.needs[1:], strict=False)
        )
        changed = META
        for change, gib, minutes in found.needs:
            changed = changed | change
            assert estimate(pipe, changed).gib == gib
            speed = (1e12 if changed.get("precision", "no") != "no" else 0.5e12) * pf.UTILISATION
            assert minutes == pytest.approx(estimate(pipe, changed).flops * 100 / speed / 60)
        text = str(found)
        assert (
            ("does not fit" in text) != found.fits
            and ("still too much" in text) != possible
            and f"{whole:.1f} GiB" in text
            and "guess" in text
        )


def test_on_the_cpu_at_hand_a_pass_is_timed(pipe, monkeypatch):
    found = preflight(pipe, META | dict(steps=10))
    assert (
        found.fits == (found.needs[0][1] <= found.usable)
        and found.timed
        and 0 < found.needs[0][2] < 60
    )
    monkeypatch.setattr(
        "mu.notebooks.preflight.speed", lambda *_: 1e9
    )  # what else runs just now is no matter: at one speed, twice the steps take twice the time
    assert preflight(pipe, META | dict(steps=20)).needs[0][2] == pytest.approx(
        2 * preflight(pipe, META | dict(steps=10)).needs[0][2]
    )
    assert found.device == "this CPU" or torch.cuda.is_available()


def test_sd_fits_a_t4():
    p = META | dict(
        method="esd-x",
        precision="fp16",
        gradient_checkpointing=True,
        frozen="half",
        offload=True,
        inner_optimizer="adam",
    )
    found = preflight("sd-v1-4", p, "T4")
    assert (
        found.fits
        and 5 < found.estimate.gib < 14.5 - RESERVE
        and not found.timed
        and found.needs[0][2] > 1
    )


@pytest.mark.parametrize(
    "model, parameters, gpu, match",
    [
        ("sd-v1-4", dict(batchsize=1), None, "batchsize.*batch_size"),
        ("sd-v9", {}, None, "sd-v9.*sdxl"),
        (None, {}, "V2", "V2.*T4"),
        (None, dict(method="esd"), None, "esd-x"),
        (None, META | dict(accumulation=3), None, "batch_size.*3 micro-batches"),
        (None, dict(subset="x", weights="half"), None, "lora"),
        (None, dict(frozen="none"), None, "lora"),
        (None, dict(weights="quarter"), None, "quarter.*half"),
        (None, dict(precision="fp8"), None, "fp8.*bf16"),
    ],
)
def test_what_cannot_be_is_said(model, parameters, gpu, match, pipe):
    with pytest.raises(ValueError, match=match):
        preflight(model or pipe, parameters, gpu)
