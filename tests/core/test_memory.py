"""Settings that save memory change no numbers: micro-batches, checkpointing, snapshot, scale."""

import pytest
import tiny
import torch
from flat import assert_close, train_short
from plain import generator

from mu.files import read_json
from mu.losses import Inputs, denoising, draw_minibatch, predictions, squared_errors
from mu.meta import meta_gradients
from mu.optimizers import make_optimizer
from mu.parallel import Runtime, shard
from mu.params import open_run


@pytest.mark.parametrize("order", ["first", "second"])
def test_micro_batches_change_only_the_number_of_passes(sets, order):
    whole = train_short(sets, order=order)
    parted = train_short(sets, order=order, accumulation=2)
    assert_close(whole, parted, 1e-4)
    pairs = list(zip(whole[1], parted[1], strict=True))
    for a, b in pairs:
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
        assert b.passes > a.passes
    if order == "first":
        # 4 for 1 with gradient: at θ, two inner steps, at θ_FT; 2 for 1 of the frozen UNet
        assert [b.passes - a.passes for a, b in pairs] == [3 * 4 + 1, 3 * 4 + 1]


def saved_for_backward(unet, term, accumulation=1):
    """Return the loss and the bytes that autograd saves for its backward pass."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (loss,) = squared_errors(unet, [term], accumulation)
    return loss, sum(sizes.values())


def test_micro_batches_save_no_activations(sets, noise_scheduler):
    """Eight micro-batches save a fraction of what one batch saves for the backward pass."""
    unet = tiny.make_unet()
    term = denoising(draw_minibatch(sets[0], noise_scheduler, 8, generator()))
    loss, whole = saved_for_backward(unet, term)
    same, parted = saved_for_backward(unet, term, accumulation=8)
    assert parted < whole / 5
    assert same.item() == pytest.approx(loss.item(), rel=1e-5)


def test_checkpointing_saves_fewer_activations(sets, noise_scheduler):
    term = denoising(draw_minibatch(sets[0], noise_scheduler, 4, generator()))
    unet, checkpointed = tiny.make_unet(), tiny.make_unet()
    checkpointed.enable_gradient_checkpointing()
    _, whole = saved_for_backward(unet, term)
    _, fewer = saved_for_backward(checkpointed, term)
    assert fewer < 0.8 * whole


def test_shards_hold_every_row_once_and_are_equal_in_size():
    index = torch.arange(12)
    rows = Inputs(index, index, {"encoder_hidden_states": index * 2})
    shards = [shard(rows, i, 3) for i in range(3)]
    assert sorted(torch.cat([x for x, _, _ in shards]).tolist()) == list(range(12))
    for x, _, c in shards:
        assert torch.equal(c["encoder_hidden_states"], 2 * x)
        assert len(x) == 4
    assert shards[0][0].tolist() == [0, 3, 6, 9], "each shard needs small and large timesteps"
    message = "12 rows do not divide into 5 equal shards: choose batch sizes that are multiples"
    with pytest.raises(ValueError, match=message):
        shard(rows, 0, 5)


def test_predictions_in_micro_batches_are_in_order(sets, noise_scheduler):
    unet = tiny.make_unet()
    blocks = [
        draw_minibatch(concept_set, noise_scheduler, n, generator(n)).inputs
        for concept_set, n in zip(sets[:2], (4, 6), strict=True)
    ]
    found = predictions(unet, blocks), predictions(unet, blocks, accumulation=2)
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(whole, parted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [dict(snapshot="cpu"), dict(checkpointing=True), dict(loss_scale=1024.0)],
    ids=lambda o: next(iter(o)),
)
def test_these_settings_change_only_rounding(sets, options):
    whole, other = train_short(sets), train_short(sets, **options)
    assert_close(whole, other, 1e-5)
    expected = [pytest.approx(r.losses, rel=1e-5) for r in other[1]]
    assert [r.losses for r in whole[1]] == expected


def test_the_snapshot_is_on_the_requested_device(monkeypatch):
    devices, real = [], torch.Tensor.to

    def record(self, *args, **kwargs):
        devices.append(args)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", record)
    p = torch.nn.Parameter(torch.ones(3))

    def loss():
        return (p**2).sum()

    optimizer, runtime = make_optimizer("sgd", [p], lr=0.0), Runtime(snapshot="cpu")
    meta_gradients([p], [loss], [loss], optimizer, 0.1, runtime=runtime)
    assert ("cpu",) in devices
    assert p.tolist() == [1, 1, 1]


def test_the_runtime_of_a_run_may_change(tmp_path):
    folder = open_run(tmp_path / "run", {"lr": 1.0}, {"accumulation": 1})
    assert open_run(folder, {"lr": 1.0}, {"accumulation": 4}) == folder
    assert read_json(folder / "params.json") == {"lr": 1.0, "runtime": {"accumulation": 4}}
    with pytest.raises(ValueError, match="lr=1.0, not the requested 2.0"):
        open_run(folder, {"lr": 2.0}, {"accumulation": 4})
