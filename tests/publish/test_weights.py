"""Import: every published format is read completely or refused completely."""

import copy
import os

import pytest
import tiny
import torch
from published import (
    assert_equal,
    assert_refused,
    load,
    move,
)
from safetensors.torch import save_file

from mu.publish.weights import load_start, load_weights
from mu.runs.folder import finish

ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


# --- parts, pickles, folders -----------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "model.diffusion.unet."])
def test_a_part_changes_only_its_tensors(base, tmp_path, prefix):
    """ESD and UCE publish some of the tensors; here in half precision."""
    pipe, original = load(base), load(base)
    moved = move(copy.deepcopy(pipe.unet)).state_dict()
    changed = {name: t.half() for name, t in moved.items() if "attn2" in name}
    file = tmp_path / "esd-a_cat-1.0.safetensors"
    save_file({prefix + name: t for name, t in changed.items()}, file)
    assert load_weights(pipe.unet, file)[:2] == ("partial", len(changed))
    own = pipe.unet.state_dict()
    for name, t in original.unet.state_dict().items():
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], changed[name].float() if name in changed else t)


def per_module(state):
    """Nest tensors as ESD's .pt does: one dict per module."""
    nested = {}
    for name, t in state.items():
        module, parameter = name.rsplit(".", 1)
        nested[f"unet.{module}"] = {parameter: t}
    return nested


@pytest.mark.parametrize(
    "suffix, nest",
    [
        (".pt", lambda s: s),
        (".ckpt", lambda s: {"state_dict": s, "epoch": 3}),
        (".bin", lambda s: {"unet": s, "optimizer": {"0": torch.ones(2)}}),
        (".pth", lambda s: {"model": {"state_dict": {f"module.{n}": t for n, t in s.items()}}}),
        (".pt", per_module),
    ],
)
def test_pickles_of_tensors_are_read(unet, tmp_path, suffix, nest):
    moved = move(copy.deepcopy(unet)).state_dict()
    changed = {name: t for name, t in moved.items() if name.endswith("attn2.to_k.weight")}
    torch.save(nest(changed), tmp_path / f"unet{suffix}")
    assert load_weights(unet, tmp_path / f"unet{suffix}")[:2] == ("partial", 3)
    assert all(torch.equal(unet.state_dict()[name], t) for name, t in changed.items())


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_never_runs_code(unet, tmp_path, suffix):
    file, trace = tmp_path / f"unet{suffix}", tmp_path / "was here"
    torch.save({"state_dict": unet.state_dict(), "callbacks": Malice(trace)}, file)
    match = "is refused: reading it would run its code"
    assert_refused(unet, file, f"{match}.*convert it to safetensors")
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # so it was malicious
    torch.save(unet, file)  # a whole module is code as well
    assert_refused(unet, file, match)


def test_run_unet_and_sharded_folders_are_read(unet, tmp_path):
    changed = move(tiny.make_unet())
    finish(tmp_path / "run", changed)
    changed.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    changed.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    # the plain file takes precedence over a variant
    move(tiny.make_unet(), seed=9).save_pretrained(tmp_path / "run" / "unet", variant="fp16")
    file = "run/unet/diffusion_pytorch_model.safetensors"
    index = "sharded/diffusion_pytorch_model.safetensors.index.json"
    for path in ("run", "run/unet", "sharded", index, "pickled", file):
        other = copy.deepcopy(unet)
        count = len(unet.state_dict())
        expected = f"unet: {count} of {count} tensors"
        assert str(load_weights(other, str(tmp_path / path))) == expected
        assert_equal(other, changed)
        assert not torch.equal(tiny.weights(other), tiny.weights(unet))


# --- LDM's names -----------------------------------------------------------------------------

LDM = {  # the blocks of the tiny UNet
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def ldm_names(state):
    """Rename the tiny UNet's tensors as in an LDM checkpoint."""
    out = {}
    for name, t in state.items():
        block = next(b for b in LDM if name.startswith(b + "."))
        rest = name.removeprefix(block + ".")
        if "resnets" in block:
            part = rest.split(".")[0]
            rest = rest.replace(part, RESNET[part])
        out[f"model.diffusion_model.{LDM[block]}.{rest}"] = t
    assert len(out) == len(state)
    return out


REST = ("first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.x", "betas")


@pytest.mark.parametrize(
    "suffix, prefix, others",
    [
        (".safetensors", "model.diffusion_model.", REST),
        (".pt", "model.diffusion_model.", REST),
        (".safetensors", "", ()),
    ],
)
def test_checkpoints_with_ldm_names_are_read(base, tmp_path, suffix, prefix, others):
    pipe = load(base)
    changed = move(copy.deepcopy(pipe.unet))
    names = ldm_names(changed.state_dict())
    state = {name.replace("model.diffusion_model.", prefix): t for name, t in names.items()}
    saved = state | {name: torch.ones(2) for name in others}
    file = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file({name: t.clone() for name, t in saved.items()}, file)
    else:
        torch.save({"state_dict": saved, "global_step": 7}, file)
    assert load_weights(pipe.unet, file)[:2] == ("ldm", len(state))
    assert_equal(pipe.unet, changed)


def test_ldm_checkpoints_need_the_same_architecture(unet, sdxl_folder, tmp_path):
    deep = tiny.make_unet(mid_block_type="UNetMidBlock2DCrossAttn")
    changed = move(copy.deepcopy(deep))
    state = ldm_names(changed.state_dict())
    whole, part = tmp_path / "deep.safetensors", tmp_path / "part.safetensors"
    save_file(state, whole)
    assert load_weights(deep, whole).kind == "ldm"
    assert_equal(deep, changed)
    assert_refused(unet, whole, r"another architecture: mid_block\S+ is .*, expected absent")
    match = "LDM checkpoint of another architecture.*label_emb.0.0.weight"
    assert_refused(load(sdxl_folder).unet, whole, match)
    save_file({name: t for name, t in state.items() if "output_blocks" not in name}, part)
    assert_refused(deep, part, r"another architecture: up_blocks\S+ is absent, expected \(")


# --- refusals --------------------------------------------------------------------------------


def test_a_path_without_weights_is_refused(unet, tmp_path):
    match = "nowhere is neither a file nor a folder.*hf download"
    assert_refused(unet, tmp_path / "nowhere", match, FileNotFoundError)
    (tmp_path / "run").mkdir()
    save_file({"weights/a": torch.ones(1)}, tmp_path / "run" / "checkpoint.safetensors")
    match = "run has no weights.*finish the run"
    assert_refused(unet, tmp_path / "run", match, FileNotFoundError)


def test_tensors_that_do_not_fit_are_named(unet, tmp_path):
    file, changed = tmp_path / "weights.safetensors", move(copy.deepcopy(unet)).state_dict()
    wide = tiny.make_unet(cross_attention_dim=24)
    match = rf"another architecture: {ATTN2} is \(32, 24\), expected \(32, 16\)"
    save_file(wide.state_dict(), file)
    assert_refused(unet, file, match)
    wide.save_pretrained(tmp_path / "wide")
    assert_refused(unet, tmp_path / "wide", f"wide has {match}")
    save_file(changed | {"zero.weight": torch.ones(2)}, file)  # sorted last: all others fit
    assert_refused(unet, file, r"zero.weight is \(2,\), expected absent")
    ends = {"conv_in.weight": changed["conv_in.weight"]}
    ends["unet.conv_out.weight"] = changed["conv_out.weight"]
    save_file(ends, file)
    assert_refused(unet, file, "unet.conv_out.weight is .*, expected absent")


def test_values_that_are_not_finite_are_refused(unet, tmp_path):
    file, changed = tmp_path / "weights.safetensors", move(copy.deepcopy(unet)).state_dict()
    last = max(changed)
    for bad in (torch.nan, torch.inf):
        broken = changed[last].clone()
        broken.view(-1)[-1] = bad
        save_file(changed | {last: broken}, file)
        assert_refused(unet, file, f"is refused: {last} has NaN or infinite values")
    save_file({last: torch.full_like(changed[last], 1e6)}, file)
    half = copy.deepcopy(unet).half()
    assert_refused(half, file, "has NaN or infinite values in torch.float16")


def test_a_diffusers_folder_must_hold_each_tensor_once(unet, tmp_path):
    changed = move(copy.deepcopy(unet)).state_dict()
    last = max(changed)
    folder = tmp_path / "whole"
    unet.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in changed.items() if name != last}, file)
    assert_refused(unet, folder, f"{last} is absent, expected")
    save_file({last: changed[last]}, folder / "more.safetensors")
    save_file(changed, file)
    match = f"has {last} in more.safetensors and in another file: choose one file"
    assert_refused(unet, folder, match)


def test_files_without_weights_of_a_unet_are_refused(unet, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"text_model.embeddings.x": torch.ones(2)}, file)
    assert_refused(unet, file, "has no tensor of this UNet: its first is text_model.embeddings.x")
    save_file({}, file)
    assert_refused(unet, file, "has no tensor of this UNet$")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    assert_refused(unet, tmp_path / "list.pt", "has no tensor of this UNet$")


def test_damaged_files_are_refused(unet, tmp_path):
    file, cut = tmp_path / "weights.safetensors", tmp_path / "cut.pt"
    save_file(unet.state_dict(), file)
    file.write_bytes(file.read_bytes()[:2000])
    match = "weights.safetensors is damaged or contains no weights.*fetch it again"
    assert_refused(unet, file, match)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for name, data in (("a.safetensors", pointer), ("a.pt", pointer), ("empty.bin", b"")):
        (tmp_path / name).write_bytes(data)
        assert_refused(unet, tmp_path / name, "is damaged|would run its code")
    torch.save(unet.state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    assert_refused(unet, cut, "damaged")


def test_one_of_several_shards_is_refused(unet, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[0]
    assert_refused(unet, shard, "is one of several shards: name its folder")
    next(tmp_path.glob("*-00002-of-*")).unlink()
    assert_refused(unet, tmp_path, "is absent, expected")


def test_a_pipeline_that_is_unlearned_in_its_text_encoder_is_refused(sd_folder, tmp_path):
    """As AdvUnlearn's: its UNet is the base."""
    pipe = load(sd_folder)
    for p in pipe.text_encoder.parameters():
        p.data.mul_(0.5)
    pipe.save_pretrained(tmp_path / "model")
    match = "same UNet as the base.*text encoder has .AdvUnlearn., name the folder as `model`"
    assert_refused(load(sd_folder).unet, tmp_path / "model", match)
    move(pipe.unet)
    pipe.save_pretrained(tmp_path / "both")
    original = load(sd_folder)
    before = tiny.weights(original.unet)
    with pytest.raises(ValueError, match="another text_encoder than the base.*name the folder as"):
        load_start(original, tmp_path / "both")
    assert torch.equal(tiny.weights(original.unet), before)


def test_a_start_whose_text_encoders_are_the_base_s_is_read(base, tmp_path):
    """In float16, too, as many are published."""
    pipe, original = load(base), load(base)
    move(pipe.unet)
    changed = copy.deepcopy(pipe.unet)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    assert load_start(original, tmp_path / "half").kind == "unet"
    torch.testing.assert_close(
        tiny.weights(original.unet), tiny.weights(changed), rtol=0, atol=1e-3
    )
