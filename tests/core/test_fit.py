"""What makes a training fit (micro-batches, checkpointing, snapshot, LoRA, half precision, eight bits) changes memory, not numbers."""

import copy
import math

import pytest
import tiny
import torch
from flat import unlearn
from safetensors.torch import load, save

from mu.files import read_json
from mu.frozen import frozen_copy, reference
from mu.losses import Inputs, denoising, draw_minibatch, predictions, squared_errors
from mu.meta import meta_gradient
from mu.models import load_pipeline, predict_noise
from mu.optimizers import make_optimizer
from mu.parallel import Runtime, shard
from mu.params import open_run
from mu.runs.folder import run_loop
from mu.state import State
from mu.train import Record, finetune
from mu.trainable import trainable, without_lora

FULL = dict(
    batch_size=2,
    trajectory_steps=4,
    trajectory_reuse=2,
    retain=1.0,
    retain_batch_size=4,
    ascent=0.2,
    relearn=0.5,
    self_destruct=1.0,
    clean=1.0,
    clean_every=2,
    inner_steps=2,
    inner_lr=1e-2,
    inner_batch_size=2,
    bound=0.9,
)


def train(
    sets,
    steps=2,
    frozen="same",
    subset="f",
    checkpointing=False,
    state=None,
    seed=5,
    lr=0.5,
    optimizer="sgd",
    **options,
):
    """(weights moved, records) of a full meta-unlearning from fresh components."""
    unet = tiny.make_unet()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet_frozen = frozen_copy(unet, frozen)
    state = state or State(unet, subset, lr=lr, optimizer=optimizer, seed=seed, rank=2)
    start = [p.detach().clone() for p in state.parameters]
    records = list(
        unlearn(state, unet_frozen, tiny.make_scheduler(), *sets, steps=steps, **FULL | options)
    )
    return torch.cat(
        [(p.detach() - q).flatten() for p, q in zip(state.parameters, start, strict=False)]
    ), records


def close(one, two, to):
    return (one[0] - two[0]).norm() < to * one[0].norm() and one[0].norm() > 1e-3


@pytest.mark.parametrize("order", ["first", "second"])
def test_micro_batches_change_nothing_but_passes(sets, order):
    whole = train(sets, order=order)
    parted = train(sets, order=order, accumulation=2)
    assert close(whole, parted, 1e-4)
    assert all(
        a.losses == pytest.approx(b.losses, rel=1e-4) and b.passes > a.passes
        for a, b in zip(whole[1], parted[1], strict=False)
    )
    if order == "first":
        grown = [
            b.passes - a.passes for a, b in zip(*(x[1] for x in (whole, parted)), strict=False)
        ]
        assert (
            grown == [3 * 4 + 1, 3 * 4 + 1]
        )  # with gradient (at θ, two inner ones, the outer one) 4 passes for 1, the frozen UNet's 2 for 1


def test_a_micro_batch_keeps_no_activations(sets, noise_scheduler, monkeypatch):
    """What is kept for the backward pass of eight micro-batches is a fraction of what one batch keeps."""
    unet = tiny.make_unet()
    part = denoising(draw_minibatch(sets[0], noise_scheduler, 8, torch.Generator().manual_seed(0)))

    def kept(accumulation):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (
                sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t
            ),
            lambda t: t,
        ):
            loss = squared_errors(unet, [part], accumulation)[0]
        return sum(sizes.values()), loss

    (whole, loss), (parted, same) = kept(1), kept(8)
    assert parted < whole / 5 and same.item() == pytest.approx(loss.item(), rel=1e-5)


def test_shares_are_all_rows_once_and_even():
    index = torch.arange(12)
    part = Inputs(index, index, {"encoder_hidden_states": index * 2})
    shares = [shard(part, i, 3) for i in range(3)]
    assert sorted(torch.cat([x for x, _, _ in shares]).tolist()) == list(range(12))
    assert all(torch.equal(c["encoder_hidden_states"], 2 * x) and len(x) == 4 for x, _, c in shares)
    assert shares[0][0].tolist() == [0, 3, 6, 9], "spread: each share has small and large timesteps"
    with pytest.raises(
        ValueError,
        match="12 rows do not divide into 5 equal shards: choose batch sizes that are multiples",
    ):
        shard(part, 0, 5)


def test_predictions_in_micro_batches_are_in_order(sets, noise_scheduler):
    unet = tiny.make_unet()
    parts = [
        draw_minibatch(s, noise_scheduler, n, torch.Generator().manual_seed(n)).inputs
        for s, n in zip(sets[:2], (4, 6), strict=True)
    ]
    for whole, parted in zip(
        predictions(unet, parts), predictions(unet, parts, accumulation=2), strict=True
    ):
        torch.testing.assert_close(whole, parted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [dict(snapshot="cpu"), dict(checkpointing=True), dict(loss_scale=1024.0)],
    ids=lambda o: next(iter(o)),
)
def test_these_are_the_same_to_the_last_bits(sets, options):
    whole, other = train(sets), train(sets, **options)
    assert close(whole, other, 1e-5) and [r.losses for r in whole[1]] == [
        pytest.approx(r.losses, rel=1e-5) for r in other[1]
    ]


def test_checkpointing_keeps_less(sets, noise_scheduler):
    part = denoising(draw_minibatch(sets[0], noise_scheduler, 4, torch.Generator().manual_seed(0)))

    def kept(checkpointing):
        unet, sizes = tiny.make_unet(), {}
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (
                sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t
            ),
            lambda t: t,
        ):
            squared_errors(unet, [part])
        return sum(sizes.values())

    assert kept(True) < 0.8 * kept(False)


def test_the_snapshot_lies_where_it_is_asked_for(sets, monkeypatch):
    seen = []
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: seen.append(a) or real(self, *a, **k)
    )
    p = torch.nn.Parameter(torch.ones(3))
    meta_gradient(
        [p],
        [lambda: (p**2).sum()],
        lambda: (p**2).sum(),
        make_optimizer("sgd", [p], lr=0.0),
        0.1,
        runtime=Runtime(snapshot="cpu"),
    )
    assert ("cpu",) in seen and p.tolist() == [1, 1, 1]


# --- LoRA --------------------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_alone_and_its_reference_is_itself_switched_off(sets):
    unet, original = tiny.make_unet(), tiny.frozen(tiny.make_unet())
    state = State(unet, "lora", lr=0.5, optimizer="sgd", rank=2)
    assert (
        state.named
        and all("lora_" in name for name in state.named)
        and sum(p.numel() for p in state.parameters)
        < 0.2 * sum(p.numel() for p in unet.parameters())
    )
    base = {name: p.clone() for name, p in unet.named_parameters() if "lora_" not in name}
    moved, _ = train(sets, state=state, frozen="none")
    batch = draw_minibatch(sets[0], tiny.make_scheduler(), 4, torch.Generator().manual_seed(0))

    def look(net):
        return predict_noise(
            net, batch.inputs.latents, batch.inputs.timesteps, batch.inputs.conditioning
        ).detach()

    assert moved.norm() > 0 and all(
        torch.equal(p, base[name]) for name, p in unet.named_parameters() if name in base
    )
    assert (look(unet) - look(original)).abs().max() > 1e-3
    with reference(unet, None) as frozen:
        torch.testing.assert_close(look(frozen), look(original), rtol=0, atol=1e-6)
    trained = look(unet)
    fused = without_lora(copy.deepcopy(unet), fuse=True)
    torch.testing.assert_close(look(fused), trained, rtol=0, atol=1e-5)
    assert {n for n, _ in fused.named_parameters()} == {
        n for n, _ in original.named_parameters()
    }, "a plain network again"
    torch.testing.assert_close(look(without_lora(unet)), look(original), rtol=0, atol=1e-6)


def test_lora_needs_no_second_unet(sets):
    """With the adapters switched off instead of a frozen copy the numbers are the same."""
    with_copy, without = train(sets, subset="lora"), train(sets, subset="lora", frozen="none")
    assert close(with_copy, without, 1e-4) and [r.passes for r in with_copy[1]] == [
        r.passes for r in without[1]
    ]


def test_adapters_are_drawn_from_the_seed(sets):
    one, same, other = (
        State(tiny.make_unet(), "lora", seed=seed, rank=2).parameters for seed in (1, 1, 2)
    )
    unet = tiny.make_unet(seed=0)
    before = torch.random.get_rng_state()
    State(unet, "lora", seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=False)) and any(
        not torch.equal(p, q) for p, q in zip(one, other, strict=False)
    )
    torch.manual_seed(0)
    tiny.make_unet()
    drawn = torch.random.get_rng_state()
    torch.manual_seed(0)
    State(tiny.make_unet(), "lora", seed=9)
    assert torch.equal(torch.random.get_rng_state(), drawn), "nobody else's draws are touched"


def test_half_precision_weights_are_for_adapters_only(sd_folder):
    unet = load_pipeline(str(sd_folder), dtype="half").unet
    assert unet.dtype == torch.bfloat16
    with pytest.raises(
        ValueError,
        match="subset 'f' would train weights in torch.bfloat16: load them in float32",
    ):
        trainable(unet, "f")
    assert {p.dtype for p in trainable(unet, "lora", 2).values()} == {torch.float32}
    for how, error, words in (
        (dict(dtype="quarter"), ValueError, "'quarter': choose full"),
        (dict(precision="fp16"), ValueError, "'fp16' needs a GPU.*no, bf16"),
        (dict(family="sdxl"), ValueError, "for a model of the family 'sdxl'.*is of 'sd'"),
    ):
        with pytest.raises(error, match=words):
            load_pipeline(str(sd_folder), **how)


def test_without_a_reference_it_stops(sets):
    with pytest.raises(ValueError, match="unet_frozen=None needs adapters: train subset 'lora'"):
        train(sets, frozen="none")
    with pytest.raises(ValueError, match="'some': choose same, half, or none"):
        frozen_copy(tiny.make_unet(), "some")


def test_a_frozen_unet_of_half_the_size_is_nearly_the_same(sets):
    whole, other = train(sets), train(sets, frozen="half")

    def size(unet):
        return sum(p.numel() * p.element_size() for p in unet.parameters())

    unet = tiny.make_unet()
    assert size(frozen_copy(unet, "half")) == size(unet) / 2 and not any(
        p.requires_grad for p in frozen_copy(unet).parameters()
    )
    assert close(whole, other, 0.05) and not close(whole, other, 1e-6)


# --- eight bits, overflow, out of memory -----------------------------------------------------------------------------------


def test_adam_in_eight_bits_is_near_adam_and_goes_on_where_it_stopped(sets, noise_scheduler):
    def run(optimizer, steps, tensors=None):
        state = State(
            tiny.make_unet(block_out_channels=(32, 64)), "f", lr=1e-3, optimizer=optimizer, seed=2
        )
        if tensors:
            state.load(tensors)
        start = tiny.weights(tiny.make_unet(block_out_channels=(32, 64)))
        for _ in finetune(state, noise_scheduler, sets[0], steps=steps, batch_size=2):
            pass
        return tiny.weights(state.unet) - start, load(
            save({k: v.contiguous() for k, v in state.tensors().items()})
        )

    (full, tensors), (eight, small) = run("adamw", 4), run("adamw8bit", 4)
    assert (full - eight).norm() < 0.3 * full.norm()

    def moments(t):
        return sum(v.numel() * v.element_size() for k, v in t.items() if k.startswith("optimizer/"))

    assert moments(small) < 0.5 * moments(tensors) and any(
        v.dtype == torch.uint8 for k, v in small.items() if k.startswith("optimizer/")
    )
    assert torch.equal(run("adamw8bit", 4, run("adamw8bit", 2)[1])[0], eight)


def test_without_bitsandbytes_the_command_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        State(tiny.make_unet(), optimizer="adamw8bit")


def test_an_overflow_of_half_precision_says_what_to_do(sets, noise_scheduler):
    state = State(tiny.make_unet(), "f", lr=1e-3)
    start = tiny.weights(state.unet)
    with pytest.raises(
        FloatingPointError,
        match=r"gradient norm is \w+ in step 1.*lower .* loss_scale \(1e\+39\), or choose precision bf16 or no",
    ):
        list(
            finetune(
                state,
                noise_scheduler,
                sets[0],
                steps=1,
                batch_size=2,
                runtime=Runtime(loss_scale=1e39),
            )
        )
    assert torch.equal(tiny.weights(state.unet), start) and state.step == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
    ],
)
def test_out_of_memory_says_what_to_change_and_leaves_the_run_resumable(tmp_path, error):
    state = State(tiny.make_unet(), "f")

    def loop():
        for step in (1, 2):
            state.step = step
            yield Record(step, {"finetune": 1.0}, 1, 0.1)
        raise error

    with pytest.raises(
        MemoryError,
        match="out of memory in step 3; the state after step 2 is saved in .*"
        "gradient_checkpointing = True.*snapshot = 'cpu' and run again",
    ):
        list(run_loop(tmp_path, state, loop()))
    again = State(tiny.make_unet(), "f")
    again.load(load((tmp_path / "checkpoint.safetensors").read_bytes()))
    assert again.step == 2 and [r["step"] for r in read_json(tmp_path / "records.json")] == [1, 2]

    def other():
        raise RuntimeError("something else")
        yield

    with pytest.raises(RuntimeError, match="something else"):
        list(run_loop(tmp_path, state, other()))


def test_what_it_is_computed_by_may_change_in_a_run(tmp_path):
    folder = open_run(tmp_path / "run", {"lr": 1.0}, {"accumulation": 1})
    assert open_run(folder, {"lr": 1.0}, {"accumulation": 4}) == folder and read_json(
        folder / "params.json"
    ) == {"lr": 1.0, "runtime": {"accumulation": 4}}
    with pytest.raises(ValueError, match="lr=1.0, not the requested 2.0"):
        open_run(folder, {"lr": 2.0}, {"accumulation": 4})


# --- SDD -------------------------------------------------------------------------------------------------------------------


def test_sdd_is_a_plain_loop(sets):
    """Three steps against diffusers alone: z_t by the average's own guided DDIM, target by the student, average of the weights as result."""
    forget, unconditional = sets[0], sets[3]["encoder_hidden_states"]
    n, grid, decay, lr, guidance = 2, 4, 0.9, 1.0, 3.0
    state = State(tiny.make_unet(), "x", lr=lr, optimizer="sgd", seed=6, ema=decay)
    records = list(
        unlearn(
            state,
            tiny.frozen(tiny.make_unet()),
            tiny.make_scheduler(),
            *sets,
            steps=3,
            method="sdd",
            batch_size=n,
            trajectory_steps=grid,
            guidance=guidance,
            clip=math.inf,
        )
    )
    student, teacher, scheduler = (
        tiny.make_unet(),
        tiny.frozen(tiny.make_unet()),
        tiny.make_scheduler(),
    )
    trained = {name: p for name, p in student.named_parameters() if "attn2" in name}
    g = torch.Generator().manual_seed(6000)
    for record in records:
        c = forget.conditioning["encoder_hidden_states"][
            forget_rows := torch.randint(2, (n,), generator=g)
        ]
        scheduler.set_timesteps(grid)
        stop, z = torch.randint(grid, (1, n), generator=g)[0], torch.randn(n, 4, 8, 8, generator=g)
        t = scheduler.timesteps[stop] + torch.randint(1000 // grid, (n,), generator=g)
        for row in range(n):
            latent = z[row : row + 1]
            for i in range(int(stop[row])):
                with torch.no_grad():
                    empty, full = (
                        teacher(latent, scheduler.timesteps[i], e).sample
                        for e in (unconditional, c[row : row + 1])
                    )
                latent = scheduler.step(
                    empty + guidance * (full - empty), scheduler.timesteps[i], latent
                ).prev_sample
            z[row] = latent[0]
        with torch.no_grad():
            target = student(z, t, unconditional.expand(n, -1, -1)).sample
        loss = (student(z, t, c).sample - target).pow(2).mean()
        assert (
            record.losses["unlearn"] == pytest.approx(loss.item(), rel=1e-4)
            and len(forget_rows) == n
        )
        for p, gradient in zip(
            trained.values(), torch.autograd.grad(loss, list(trained.values())), strict=False
        ):
            p.data -= lr * gradient
        for name, average in teacher.named_parameters():
            average.data.lerp_(dict(student.named_parameters())[name].data, 1 - decay)
    for name, p in state.named.items():
        torch.testing.assert_close(p.detach(), trained[name].detach(), rtol=0, atol=1e-5)
    released = dict(state.release().named_parameters())
    for name, average in teacher.named_parameters():
        torch.testing.assert_close(released[name].detach(), average, rtol=0, atol=1e-5)
    assert max((released[name] - p).abs().max() for name, p in trained.items()) > 1e-4, (
        "the average is not the student"
    )


def test_sdd_wants_its_average_and_methods_are_named(sets):
    with pytest.raises(ValueError, match="set ema, e.g. 0.999"):
        train(sets, method="sdd")
    with pytest.raises(ValueError, match="unknown loss 'uce': choose esd, sdd"):
        train(sets, method="uce")


def test_a_text_in_place_of_nothing(sets):
    """`replace` is the anchor of both methods: with the empty prompt it is what it is without, with another text it is something else."""
    same, named, other = (
        train(sets),
        train(sets, replace=sets[3]),
        train(sets, replace={k: v + 1 for k, v in sets[3].items()}),
    )
    assert torch.equal(same[0], named[0]) and not close(same, other, 1e-3)
