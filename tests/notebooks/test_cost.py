"""The estimate of memory and FLOPs: against hand counts, and against the real loop."""

import json

import pytest
import tiny
import torch
from test_preflight import META

from mu.models import load_pipeline
from mu.notebooks.cost import GIB, encoder_bytes, estimate, moment_bytes
from mu.notebooks.measure import rehearse, union
from mu.notebooks.sizes import random_pipeline
from mu.notebooks.trace import Network, Tracker, pass_cost, trace
from mu.state import State
from mu.trainable import trainable


def test_tracker_counts_by_hand():
    there = torch.zeros(1000)
    with Tracker() as t:
        a = there + 1  # 4000
        b = a.view(10, 100).t()  # a view of it
        c = b @ a.view(10, 100)  # 100 × 100 more
        d = a * 2
        del a, b, d
        e = there + 2
    assert max(t.timeline) == 4000 + 40_000 + 4000
    assert t.bytes == 40_000 + 4000
    assert t.flops == 2 * 100 * 10 * 100
    del c, e
    assert t.bytes == 0


def test_union_of_intervals():
    assert union([(8, 12), (0, 10), (20, 21), (2, 5)]) == 13
    assert union([]) == 0


def test_rehearsing_profiles_later_steps_and_trains_nothing_else(pipe):
    text = [p.clone() for p in pipe.text_encoder.parameters()]
    before = next(pipe.unet.parameters()).clone()
    p = META | dict(inner_optimizer="sgd,adam", inner_steps=[1, 2])
    measured = rehearse(pipe, p, steps=1, profiled_steps=2)
    assert 0 < measured.share < 1
    assert [r.step for r in measured.records] == [1]
    assert not torch.equal(before, next(pipe.unet.parameters()))
    pairs = zip(text, pipe.text_encoder.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adamw8bit"])
def test_optimizer_bytes_are_the_real_ones(name):
    unet = tiny.make_unet(block_out_channels=(32, 64))  # tensors on both sides of 4,096 elements
    state = State(unet, "f", optimizer=name)
    predicted = moment_bytes(name, state.parameters)
    if "8bit" not in name:
        n = sum(p.numel() for p in state.parameters)
        assert predicted == (0 if name == "sgd" else 8 * n)
    for p in state.parameters:
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    real = {}
    for moments in state.optimizer.state.values():
        for key, value in moments.items():
            if torch.is_tensor(value) and value.ndim and "qmap" not in key:
                real[id(value)] = value.numel() * value.element_size()
    assert predicted == sum(real.values())


CLEAN = dict(clean=0.1, clean_every=2, self_destruct=0.0, retain=0.0, inner_optimizer="adam")
LORA = dict(subset="lora", rank=4, frozen_dtype="none", weights_dtype="half", precision="bf16")
PLAIN = dict(precision="no", retain_batch_size=8, inner_batch_size=8)
CASES = {
    "plain": PLAIN | dict(trajectory_steps=8, trajectory_reuse=4),
    "meta": META,
    "clean": META | CLEAN,
    "micro-batches": META | dict(accumulation=4, retain_prompts=4),
    "fewer drift terms": META | dict(drift_terms="related,any", retain_prompts=4),
    "own samples": META | dict(drift_terms="related,sampled", trajectory_reuse=2),
    "keep": META | dict(drift_terms="related,sampled", trajectory_reuse=2, keep=5.0, clean=0.0),
    "checkpointing": META | dict(gradient_checkpointing=True, frozen_dtype="half"),
    "bf16": META | dict(precision="bf16", method="esd-x"),
    "lora": META | LORA | dict(accumulation=2),
    "sdd": META | dict(method="sdd"),
    "persistent": META | dict(horizon=(40, 80), pool=1, clean=0.0, ema=0.9),
    "validation": META | dict(validation={"every": 2, "depths": [2], "batch_size": 48}),
    "closed form": META | dict(method="rece"),
    "second order": META | dict(order="second", inner_batch_size=32, ascent=0.0),
}


@pytest.mark.parametrize(
    "folder, name",
    [("sd_folder", name) for name in CASES]
    + [("sdxl_folder", "meta"), ("sdxl_folder", "micro-batches")],
)
def test_the_real_loop_takes_what_was_predicted(folder, name, request):
    p = CASES[name] | dict(offload=True)
    pipe = load_pipeline(
        str(request.getfixturevalue(folder)),
        device="cpu",
        dtype=p.get("weights_dtype", "full"),
        precision=p["precision"],
        gradient_checkpointing=p.get("gradient_checkpointing", False),
    )
    found = estimate(pipe, p, gpu=False)
    others = encoder_bytes(pipe)  # on a CPU they stay: there is no other memory
    predicted = max(gib for phase, gib in found.phases.items() if phase != "start") * GIB
    measured = rehearse(pipe, p, steps=2)
    assert predicted - others == pytest.approx(measured.gib * GIB - others, rel=0.06)
    assert len(measured.records) == 2
    if name == "validation":
        assert found.phases["validation"] == max(found.phases.values())
    elif name not in ("clean", "plain"):  # there the random length of a trajectory dominates
        assert found.flops == pytest.approx(measured.flops, rel=0.05)


def test_the_second_gradient_that_keep_holds_is_counted():
    """Batches are small and weights large, so that the gradients decide."""
    p = CASES["keep"] | dict(batch_size=1, retain_batch_size=1, inner_batch_size=1)
    pipe = load_pipeline("pocket", device="cpu", precision="no")
    others = encoder_bytes(pipe)
    found, measured = estimate(pipe, p, gpu=False), rehearse(pipe, p, steps=2)
    predicted = found.phases["simulated fine-tuning"] * GIB
    assert predicted - others == pytest.approx(measured.gib * GIB - others, rel=0.03)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs CUDA's allocator; the test above compares the tensors of a CPU",
)
@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {}),
        ("micro-batches", dict(accumulation=2)),
        ("lora", dict(subset="lora", frozen_dtype="none", weights_dtype="half")),
        ("full", dict(method="esd-f", snapshot="cpu")),
    ],
)
def test_on_a_gpu_sd_takes_what_was_predicted(name, change):
    p = META | dict(
        method="esd-x",
        precision="fp16",
        gradient_checkpointing=True,
        frozen_dtype="half",
        trajectory_steps=2,
        offload=True,
    )
    p |= change
    dtype = torch.float16 if p.get("weights_dtype") == "half" else torch.float32
    options = dict(precision="fp16", gradient_checkpointing=True)
    pipe = random_pipeline("sd-v1-4", dtype=dtype, **options)
    assert estimate("sd-v1-4", p).gib == pytest.approx(rehearse(pipe, p, steps=2).gib, rel=0.15)


def make_network(pipe, **changes):
    config = json.dumps(dict(pipe.unet.config))
    return Network(config, 8, 20, torch.float32, precision="bf16", **changes)


@pytest.mark.parametrize("rows, accumulation", [(1, 1), (7, 1), (21, 3), (12, 3)])
def test_two_traces_predict_all_row_counts(rows, accumulation, pipe):
    network = make_network(pipe, gradient_checkpointing=True)
    timeline, flops = trace(network, "train", rows, accumulation)
    found = pass_cost(network, "train", rows, accumulation)
    assert found == pytest.approx((max(timeline), flops), rel=2e-2)
    assert pass_cost(network, "train", 0, 3) == (0, 0)


HALF = META | dict(method="esd-x", frozen_dtype="half", offload=True)


def test_kept_memory_by_hand(pipe):
    n = sum(p.numel() for p in pipe.unet.parameters())
    trained = sum(p.numel() for p in trainable(pipe.unet, "x").values())

    def kept(**change):
        found = estimate(pipe, HALF | change).kept
        return {name: round(gib * GIB) for name, gib in found.items()}

    assert kept() == {"UNet": 4 * n, "frozen UNet": 2 * n, "optimiser": 8 * trained}
    assert kept(optimizer="sgd", frozen_dtype="same", retain_prompts=5) == {
        "UNet": 4 * n,
        "frozen UNet": 4 * n,
        "random prompts": 4 * 5 * 20 * 16,
    }
    assert kept(method="sdd")["average"] == 4 * trained
    assert kept(method="sdd")["optimiser"] == 8 * trained
    warm = dict(horizon=(40, 80), pool=3, relearn=1.0, clean=1.0, inner_optimizer=("adam",))
    assert kept(**warm)["attackers"] == 4 * 12 * trained  # δ and two moments of each
    assert kept(**warm, half_pool=True)["attackers"] == 4 * 6 * trained
    assert "attackers" not in kept(**warm, snapshot="cpu")
    adapters = sum(q.numel() for q in trainable(tiny.make_unet(), "lora", 3).values())
    lora = dict(subset="lora", rank=3, frozen_dtype="none", weights_dtype="half")
    assert kept(**lora) == {"UNet": 2 * n + 4 * adapters, "optimiser": 8 * adapters}
    others = sum(4 * q.numel() for part in (pipe.vae, pipe.text_encoder) for q in part.parameters())
    assert kept(offload=False)["VAE, text encoders"] == others


def test_phases_by_hand(pipe):
    n = sum(p.numel() for p in pipe.unet.parameters())
    trained = sum(p.numel() for p in trainable(pipe.unet, "x").values())

    def simulated(**change):
        return estimate(pipe, HALF | change).phases["simulated fine-tuning"] * GIB

    snapshot = simulated() - simulated(snapshot="cpu")
    assert snapshot == pytest.approx(4 * trained)  # the copy of θ
    assert simulated(inner_optimizer="sgd,adam") - simulated() == pytest.approx(8 * trained)
    on_cpu = estimate(pipe, HALF, gpu=False).phases
    assert on_cpu == estimate(pipe, HALF | dict(snapshot="cpu"), gpu=False).phases
    kept = 4 * n + 2 * n + 8 * trained
    update = estimate(pipe, HALF).phases["update"] * GIB
    assert update == pytest.approx(kept + 2 * 4 * trained)


def test_phases_of_the_training_add_up(pipe):
    p = META | dict(offload=True)
    quiet = dict(relearn=0.0, self_destruct=0.0, clean=0.0, ascent=1.0)
    phases = [dict(name="ascend", steps=10, **quiet), dict(name="grow", steps=30)]
    first, second = estimate(pipe, p | quiet), estimate(pipe, p)
    both = estimate(pipe, p | dict(phases=phases))
    assert both.steps == 40
    assert both.flops == pytest.approx((10 * first.flops + 30 * second.flops) / 40)
    assert (both.gib, both.kept) == (second.gib, second.kept)
    reverse = estimate(pipe, p | dict(phases=phases[::-1]))
    assert (reverse.gib, reverse.flops) == (both.gib, pytest.approx(both.flops))


def test_a_training_without_steps_takes_no_time(pipe):
    found = estimate(pipe, META | dict(steps=0))  # a model that is loaded to be attacked
    assert (found.steps, found.flops) == (0, 0.0)


def test_head_starts_take_time(pipe):
    """Two steps of head start per step of the horizon cost as twice as many further inner steps."""
    p = META | dict(offload=True, inner_steps=(2, 2), horizon=(10, 10), clean=0.0)
    without, started, longer = (
        estimate(pipe, p | change).flops
        for change in ({}, dict(head_start=(10, 30)), dict(inner_steps=(6, 6)))
    )
    assert started == pytest.approx(longer)
    assert started > without


def test_validation_takes_time(pipe):
    p = META | dict(offload=True)
    seldom, often = (estimate(pipe, p | dict(validation={"every": n})) for n in (40, 20))
    none = estimate(pipe, p)
    assert often.flops - none.flops == pytest.approx(2 * (seldom.flops - none.flops))
    assert seldom.flops > none.flops


def test_more_needs_more(pipe):
    p = META | dict(offload=True)

    def gib(**change):
        return estimate(pipe, p | change).gib

    def flops(**change):
        return estimate(pipe, p | change).flops

    assert gib() < gib(retain_batch_size=16) < gib(retain_batch_size=16, resolution=32)
    assert gib(resolution=16) == gib()
    assert gib(accumulation=4) < gib(accumulation=2) < gib()
    assert flops(accumulation=2) > flops()
    assert gib(gradient_checkpointing=True) < gib()
    assert flops(gradient_checkpointing=True) > flops()
    assert gib(subset="x") < gib()
    assert flops(subset="x") < flops()
    assert gib(processes=2) < gib()
    assert flops(processes=2) == pytest.approx(flops() / 2)
    mean = (flops(inner_steps=3) + flops(inner_steps=5)) / 2
    assert flops(inner_steps=[3, 5]) == pytest.approx(mean)
    assert flops(order="second") > flops()
    assert gib(precision="fp16", frozen_dtype="half") < gib() == gib(steps=7)
    assert flops(drift_terms="related") < flops()
    assert gib(precision="auto") == gib(precision="bf16") == gib(precision="fp16")


def test_norms_under_autocast_take_float32_on_a_gpu(pipe):
    on_gpu = pass_cost(make_network(pipe, gpu=True), "train", 8).memory
    on_cpu = pass_cost(make_network(pipe, gpu=False), "train", 8).memory
    assert on_gpu > 1.1 * on_cpu
