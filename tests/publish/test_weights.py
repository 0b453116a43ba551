"""Formats: what is written is read by plain diffusers with the same predictions; what others have written is read whole, or refused whole."""

import copy
import os
from importlib.metadata import version

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mu.publish.weights
from mu.models import LORA, encode_prompts, load_pipeline, predict_noise, trainable
from mu.publish.weights import (
    extract_lora,
    fused,
    load_weights,
    save_difference,
    save_lora,
    save_pipeline,
)
from mu.reports.model_card import model_card
from mu.runs.folder import finish

CARD = "---\nlicense: mit\n---\n"
ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(params=["sd", "sdxl"])
def base(request):
    """A folder of each family."""
    return request.getfixturevalue(f"{request.param}_folder")


def load(folder):
    return load_pipeline(str(folder), device="cpu")


def plain(folder):
    """As someone without mu loads it."""
    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)


@torch.no_grad()
def predictions(pipe, unet=None):
    """Noise predictions for three latents and prompts, the conditioning encoded by the pipeline's own text encoders."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return predict_noise(
        unet or pipe.unet,
        latents,
        torch.tensor([10, 400, 900]),
        encode_prompts(pipe, ["a cat", "a tiger", ""]),
    )


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def far(a, b):
    assert (a - b).abs().max() > 1e-3


@torch.no_grad()
def move(unet, inside=lambda name: True, size=0.02, seed=3):
    """Change the weights whose name is `inside`, as a training would."""
    g = torch.Generator().manual_seed(seed)
    for name, p in unet.named_parameters():
        if inside(name):
            p += size * torch.randn(p.shape, generator=g)
    return unet


def with_adapter(unet, **config):
    """A UNet with an adapter that does something."""
    unet.add_adapter(
        LoraConfig(
            **dict(r=4, lora_alpha=2, target_modules=[*LORA, "conv1", "time_emb_proj"]) | config
        )
    )
    return move(unet, lambda name: "lora_" in name, 0.2)


def tree(unet):
    """What must not change by reading: modules, names, shapes, precisions, what is trained."""
    return [(n, type(m)) for n, m in unet.named_modules()], [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in unet.named_parameters()
    ]


def refused(unet, path, match, error=ValueError):
    """Reading fails, and nothing of it is in the UNet."""
    before, shape = tiny.weights(unet), tree(unet)
    with pytest.raises(error, match=match):
        load_weights(unet, path)
    assert torch.equal(tiny.weights(unet), before) and tree(unet) == shape


# --- round trips ---------------------------------------------------------------------------------------------------


def test_a_pipeline_is_one_of_diffusers(base, tmp_path):
    pipe = load(base)
    move(pipe.unet)
    save_pipeline(pipe, tmp_path / "result", CARD)
    near(predictions(plain(tmp_path / "result")), predictions(pipe))
    far(predictions(pipe), predictions(load(base)))
    assert (tmp_path / "result" / "README.md").read_text() == CARD and [
        f.name for f in tmp_path.iterdir()
    ] == ["result"]
    assert not [f for f in (tmp_path / "result").rglob("*") if f.suffix in (".bin", ".pt")]
    other = load(base)
    assert load_weights(other.unet, tmp_path / "result") == {
        "kind": "unet",
        "tensors": len(pipe.unet.state_dict()),
    }
    assert torch.equal(tiny.weights(other.unet), tiny.weights(pipe.unet))


def test_a_pipeline_with_an_adapter_is_saved_with_plain_weights(base, tmp_path):
    pipe = load(base)
    unet = with_adapter(pipe.unet)
    expected, shape = predictions(pipe), tree(unet)
    save_pipeline(pipe, tmp_path / "result", CARD)
    assert pipe.unet is unet and tree(unet) == shape
    assert (
        load_file(tmp_path / "result" / "unet" / "diffusion_pytorch_model.safetensors").keys()
        == load(base).unet.state_dict().keys()
    )
    near(predictions(plain(tmp_path / "result")), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-7), (torch.float16, 1e-4)])
def test_a_difference_comes_back(base, tmp_path, dtype, tolerance):
    pipe, original = load(base), load(base)
    move(pipe.unet, lambda name: "attn2" in name)
    save_difference(
        pipe.unet, original.unet, tmp_path / "result", CARD, base_model="owner/base", dtype=dtype
    )
    file = tmp_path / "result" / "difference.safetensors"
    with safe_open(file, "pt") as f:
        facts = {
            "mu_format": "mu-difference-1",
            "base_model": "owner/base",
            "class": "UNet2DConditionModel",
            "mu": version("mu"),
        }
        assert facts.items() <= f.metadata().items()
        assert (
            sorted(f.keys()) == sorted(n for n in pipe.unet.state_dict() if "attn2" in n)
            and f.get_tensor(ATTN2).dtype == dtype
        )
    for path in (tmp_path / "result", file):
        other = load(base)
        assert load_weights(other.unet, path) == {
            "kind": "difference",
            "tensors": len(load_file(file)),
        }
        assert (tiny.weights(other.unet) - tiny.weights(pipe.unet)).abs().max() < tolerance
    refused(
        other.unet,
        file,
        "is a difference to owner/base, and this UNet has other weights .or has it already",
    )
    half = load(base).unet.half()  # the same base in another precision
    load_weights(half, file)
    assert (
        half.dtype == torch.float16
        and (tiny.weights(half).float() - tiny.weights(pipe.unet)).abs().max() < 2e-3
    )


def test_no_difference_is_said_so(unet, tmp_path):
    with pytest.raises(ValueError, match="equal to its base"):
        save_difference(unet, copy.deepcopy(unet), tmp_path / "result", CARD, base_model="base")
    with pytest.raises(ValueError, match=r"float32, its base in torch.bfloat16: load both alike"):
        save_difference(
            unet, copy.deepcopy(unet).bfloat16(), tmp_path / "result", CARD, base_model="base"
        )
    with pytest.raises(
        ValueError,
        match=r"the UNet is of another architecture: \S+ is \(32, 24\) there and \(32, 16\) here",
    ):
        save_difference(
            tiny.make_unet(cross_attention_dim=24),
            unet,
            tmp_path / "result",
            CARD,
            base_model="base",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 3}}],
)
def test_an_adapter_is_loaded_by_plain_diffusers(base, tmp_path, config):
    """The scale survives: alpha is not the rank here."""
    pipe, original = load(base), load(base)
    with_adapter(pipe.unet, **config)
    save_lora(pipe, tmp_path / "result", CARD)
    far(predictions(pipe), predictions(original))
    published = plain(base)
    published.load_lora_weights(tmp_path / "result")
    near(predictions(published), predictions(pipe))
    published.unload_lora_weights()
    near(predictions(published), predictions(original))
    for path in (tmp_path / "result", tmp_path / "result" / "pytorch_lora_weights.safetensors"):
        other = load(base)
        shape = tree(other.unet)
        layers = len(load_file(tmp_path / "result" / "pytorch_lora_weights.safetensors")) // 2
        assert (
            load_weights(other.unet, path) == {"kind": "lora", "tensors": layers}
            and tree(other.unet) == shape
        )
        near(predictions(other), predictions(pipe))


def test_the_adapter_of_training_is_saved(pipe, tmp_path):
    move(pipe.unet, lambda name: name in trainable(pipe.unet, "lora", rank=2), 0.2)
    save_lora(pipe.unet, tmp_path / "result")
    assert [f.name for f in (tmp_path / "result").iterdir()] == ["pytorch_lora_weights.safetensors"]
    near(predictions(pipe, load_unet_from_lora(pipe, tmp_path)), predictions(pipe))


def load_unet_from_lora(pipe, tmp_path):
    other = copy.deepcopy(pipe.unet)
    other.unload_lora()
    load_weights(other, tmp_path / "result")
    return other


def test_lora_of_a_plain_or_twice_adapted_unet(unet, tmp_path):
    with pytest.raises(
        ValueError,
        match="carries 0 LoRA adapters, one is allowed: of trained weights `extract_lora`",
    ):
        save_lora(unet, tmp_path / "result", CARD)
    with_adapter(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "second")
    with pytest.raises(ValueError, match="carries 2 LoRA adapters"):
        save_lora(unet, tmp_path / "result", CARD)
    refused(unet, tmp_path, "the UNet carries LoRA adapters: load into a plain one")
    assert not list(tmp_path.iterdir())


def test_a_fully_trained_unet_as_lora(base, tmp_path):
    """At the full rank all of the layers' change is kept; norms and biases are named; a small rank keeps less, and tells how much."""
    pipe, original = load(base), load(base)
    move(pipe.unet, lambda name: name.endswith("weight") and "norm" not in name)
    tensors, kept, left_out = extract_lora(pipe.unet, original.unet, rank=512)
    assert kept == pytest.approx(1, abs=1e-5) and left_out == []
    save_lora(tensors, tmp_path / "result", CARD)
    published = plain(base)
    published.load_lora_weights(tmp_path / "result")
    torch.testing.assert_close(predictions(published), predictions(pipe), rtol=1e-4, atol=1e-4)

    for rank in (4, 1):
        tensors, less, _ = extract_lora(pipe.unet, original.unet, rank=rank)
        assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {rank}
        save_lora(tensors, tmp_path / "result", CARD)
        other = load(base).unet
        assert load_weights(other, tmp_path / "result")["tensors"] == len(tensors) // 2
        before, after, read = (tiny.weights(u) for u in (original.unet, pipe.unet, other))
        assert 1 - (
            (after - read).square().sum() / (after - before).square().sum()
        ).item() == pytest.approx(less, abs=1e-4)
        assert less < kept
        kept = less

    move(pipe.unet, lambda name: name == "conv_norm_out.bias")
    assert extract_lora(pipe.unet, original.unet, rank=1)[2] == ["conv_norm_out.bias"]


def test_low_rank_changes_are_found_again(unet):
    changed = fused(with_adapter(copy.deepcopy(unet), r=3))
    assert not hasattr(changed, "peft_config") and [n for n, _ in changed.named_parameters()] == [
        n for n, _ in unet.named_parameters()
    ]
    tensors, kept, left_out = extract_lora(changed, unet, rank=3)
    assert kept == pytest.approx(1, abs=1e-6) and not left_out


# --- reading others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "model.diffusion.unet."])
def test_a_part_touches_only_its_tensors(base, tmp_path, prefix):
    """As ESD and UCE publish: some tensors, here of half precision."""
    pipe, original = load(base), load(base)
    changed = {
        n: t.half() for n, t in move(copy.deepcopy(pipe.unet)).state_dict().items() if "attn2" in n
    }
    file = tmp_path / "esd-a_cat-1.0.safetensors"
    save_file({prefix + n: t for n, t in changed.items()}, file)
    assert load_weights(pipe.unet, file) == {"kind": "partial", "tensors": len(changed)}
    own = pipe.unet.state_dict()
    for name, t in original.unet.state_dict().items():
        assert own[name].dtype == torch.float32 and torch.equal(
            own[name], changed[name].float() if name in changed else t
        )


@pytest.mark.parametrize(
    "suffix, nest",
    [
        (".pt", lambda s: s),
        (".ckpt", lambda s: {"state_dict": s, "epoch": 3}),
        (".bin", lambda s: {"unet": s, "optimizer": {"0": torch.ones(2)}}),
        (".pth", lambda s: {"model": {"state_dict": {f"module.{n}": t for n, t in s.items()}}}),
        (
            ".pt",
            lambda s: {
                f"unet.{n.rsplit('.', 1)[0]}": {n.rsplit(".", 1)[1]: t} for n, t in s.items()
            },
        ),
    ],
)  # a dict a module, as ESD's .pt
def test_pickles_of_tensors_are_read(unet, tmp_path, suffix, nest):
    changed = {
        n: t
        for n, t in move(copy.deepcopy(unet)).state_dict().items()
        if n.endswith("attn2.to_k.weight")
    }
    torch.save(nest(changed), tmp_path / f"unet{suffix}")
    assert load_weights(unet, tmp_path / f"unet{suffix}") == {"kind": "partial", "tensors": 3}
    assert all(torch.equal(unet.state_dict()[n], t) for n, t in changed.items())


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_never_runs_code(unet, tmp_path, suffix):
    file, trace = tmp_path / f"unet{suffix}", tmp_path / "was here"
    torch.save({"state_dict": unet.state_dict(), "callbacks": Malice(trace)}, file)
    refused(unet, file, r"is refused: to read it would run its code.*convert it to safetensors")
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # so it was malice
    torch.save(unet, file)  # a whole module is code as well
    refused(unet, file, "is refused: to read it would run its code")


def test_run_unet_and_sharded_folders(unet, tmp_path):
    changed = move(tiny.make_unet())
    finish(tmp_path / "run", changed)
    changed.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    changed.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    move(tiny.make_unet(), seed=9).save_pretrained(
        tmp_path / "run" / "unet", variant="fp16"
    )  # of the two the plain one is read
    for path in (
        "run",
        "run/unet",
        "sharded",
        "pickled",
        "run/unet/diffusion_pytorch_model.safetensors",
    ):
        other = copy.deepcopy(unet)
        assert load_weights(other, str(tmp_path / path)) == {
            "kind": "unet",
            "tensors": len(unet.state_dict()),
        }
        assert torch.equal(tiny.weights(other), tiny.weights(changed)) and not torch.equal(
            tiny.weights(other), tiny.weights(unet)
        )


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


@pytest.mark.parametrize(
    "suffix, prefix",
    [
        (".safetensors", "model.diffusion_model."),
        (".pt", "model.diffusion_model."),
        (".safetensors", ""),
    ],
)
def test_checkpoints_with_the_names_of_ldm(base, tmp_path, suffix, prefix):
    pipe = load(base)
    changed = move(copy.deepcopy(pipe.unet))
    state = {
        n.replace("model.diffusion_model.", prefix): t
        for n, t in ldm_names(changed.state_dict()).items()
    }
    rest = (
        dict.fromkeys(
            ("first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.x", "betas"),
            torch.ones(2),
        )
        if prefix
        else {}
    )
    if suffix == ".safetensors":
        save_file({n: t.clone() for n, t in (state | rest).items()}, tmp_path / "model.safetensors")
    else:
        torch.save({"state_dict": state | rest, "global_step": 7}, tmp_path / "model.pt")
    assert load_weights(pipe.unet, tmp_path / f"model{suffix}") == {
        "kind": "ldm",
        "tensors": len(state),
    }
    assert torch.equal(tiny.weights(pipe.unet), tiny.weights(changed))


def test_ldm_with_a_middle_block_and_of_another_architecture(unet, sdxl_folder, tmp_path):
    deep = tiny.make_unet(mid_block_type="UNetMidBlock2DCrossAttn")
    changed = move(copy.deepcopy(deep))
    state = ldm_names(changed.state_dict())
    save_file(state, tmp_path / "deep.safetensors")
    assert load_weights(deep, tmp_path / "deep.safetensors")["kind"] == "ldm" and torch.equal(
        tiny.weights(deep), tiny.weights(changed)
    )
    refused(
        unet,
        tmp_path / "deep.safetensors",
        r"another architecture: mid_block\S+ is .* there and absent here",
    )
    refused(
        load(sdxl_folder).unet,
        tmp_path / "deep.safetensors",
        "LDM checkpoint of another architecture.*label_emb.0.0.weight",
    )
    save_file(
        {n: t for n, t in state.items() if "output_blocks" not in n}, tmp_path / "part.safetensors"
    )
    refused(
        deep,
        tmp_path / "part.safetensors",
        r"another architecture: up_blocks\S+ is absent there and \(",
    )


@pytest.mark.parametrize("style", ["diffusers before peft", "kohya", "unet alone"])
def test_lora_of_others(base, tmp_path, style):
    pipe, original = load(base), load(base)
    alpha = {"diffusers before peft": 4}.get(
        style, 2
    )  # that style has no word for alpha: there it is the rank
    mixed = {"to_k": 3, "to_out.0": 1} if alpha == 2 else {}
    with_adapter(
        pipe.unet,
        lora_alpha=alpha,
        alpha_pattern=mixed,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )
    file = tmp_path / "lora.safetensors"
    if style == "unet alone":
        pipe.unet.save_lora_adapter(tmp_path, weight_name=file.name)
    else:
        state = {}
        for name, p in pipe.unet.named_parameters():
            if "lora_" in name:
                layer, which = name.split(".lora_")
                which = {"A": "down", "B": "up"}[which[0]]
                if style == "kohya":
                    scale = pipe.unet.get_submodule(layer).scaling["default"]
                    layer = f"lora_unet_{layer.replace('.', '_')}"
                    state |= {
                        f"{layer}.lora_{which}.weight": p.detach(),
                        f"{layer}.alpha": torch.tensor(4 * scale),
                    }
                else:
                    attention, part = layer.rsplit(".to_", 1)
                    state[
                        f"unet.{attention}.processor.to_{part.removesuffix('.0')}_lora.{which}.weight"
                    ] = p.detach()
        save_file(state, file)
    assert load_weights(original.unet, file)["kind"] == "lora"
    near(predictions(original), predictions(pipe))


def test_lora_that_does_not_fit(unet, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_lora(with_adapter(tiny.make_unet(cross_attention_dim=24)), tmp_path / "lora", CARD)
    refused(
        unet,
        tmp_path / "lora",
        r"another architecture: unet.down\S+attn2.to_k.lora_A.weight is \(4, 24\) there, down\S+ is \(32, 16\) here",
    )
    layer = "unet." + ATTN2.removesuffix(".weight")
    pair = {
        f"{layer}.lora_A.weight": torch.ones(2, 16),
        f"{layer}.lora_B.weight": torch.ones(32, 2),
    }
    save_file(pair | {"unet.mid.lora_A.weight": torch.ones(2, 2)}, file)
    refused(unet, file, r"unet.mid.lora_A.weight is \(2, 2\) there, mid.weight is absent here")
    save_file(pair | {f"{layer}.lora_A.weight": torch.full((2, 16), torch.inf)}, file)
    refused(unet, file, "to_k.weight holds NaN or infinite values")
    save_file(pair | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)}, file)
    refused(unet, file, r"holds text_encoder.x.lora_A.weight, and only plain LoRA of the UNet")


# --- refusing ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named_and_nothing_is_applied(unet, tmp_path):
    file = tmp_path / "weights.safetensors"
    refused(
        unet,
        tmp_path / "nowhere",
        "nowhere is neither a file nor a folder.*hf download",
        FileNotFoundError,
    )
    (tmp_path / "run").mkdir()
    save_file({"weights/a": torch.ones(1)}, tmp_path / "run" / "checkpoint.safetensors")
    refused(unet, tmp_path / "run", "run holds no weights.*was the run finished", FileNotFoundError)

    changed = move(copy.deepcopy(unet)).state_dict()
    wide = tiny.make_unet(cross_attention_dim=24)
    save_file(wide.state_dict(), file)
    refused(unet, file, rf"another architecture: {ATTN2} is \(32, 24\) there and \(32, 16\) here")
    wide.save_pretrained(tmp_path / "wide")
    refused(
        unet,
        tmp_path / "wide",
        rf"wide is of another architecture: {ATTN2} is \(32, 24\) there and \(32, 16\) here",
    )
    save_file(changed | {"zero.weight": torch.ones(2)}, file)  # sorted last: all others fit
    refused(unet, file, r"zero.weight is \(2,\) there and absent here")
    save_file(
        {
            "conv_in.weight": changed["conv_in.weight"],
            "unet.conv_out.weight": changed["conv_out.weight"],
        },
        file,
    )
    refused(unet, file, "unet.conv_out.weight is .* there and absent here")
    last = max(changed)
    for bad in (torch.nan, torch.inf):
        broken = changed[last].clone()
        broken.view(-1)[-1] = bad
        save_file(changed | {last: broken}, file)
        refused(unet, file, f"is refused: {last} holds NaN or infinite values")
    save_file({last: torch.full_like(changed[last], 1e6)}, file)
    refused(copy.deepcopy(unet).half(), file, "holds NaN or infinite values, in torch.float16")

    unet.save_pretrained(tmp_path / "whole")  # a folder of diffusers holds all of it
    whole = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in changed.items() if n != last}, whole)
    refused(unet, tmp_path / "whole", f"{last} is absent there and")
    save_file({last: changed[last]}, tmp_path / "whole" / "more.safetensors")
    save_file(changed, whole)
    refused(
        unet,
        tmp_path / "whole",
        f"holds {last} in several files, more.safetensors among them: name one file",
    )


def test_files_that_are_no_weights_of_a_unet(unet, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"text_model.embeddings.x": torch.ones(2)}, file)
    refused(unet, file, "holds no tensor of this UNet: its first is text_model.embeddings.x")
    save_file({}, file)
    refused(unet, file, "holds no tensor of this UNet$")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    refused(unet, tmp_path / "list.pt", "holds no tensor of this UNet$")
    save_file(unet.state_dict(), file)
    file.write_bytes(file.read_bytes()[:2000])
    refused(unet, file, "weights.safetensors is damaged or no file of weights.*fetch it again")
    for name in ("a.safetensors", "a.pt", "empty.bin"):
        (tmp_path / name).write_bytes(
            b""
            if "empty" in name
            else b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
        refused(unet, tmp_path / name, "is damaged|would run its code")
    torch.save(unet.state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    refused(unet, tmp_path / "cut.pt", "damaged")


# --- whole or absent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["pipeline", "lora", "difference"])
@pytest.mark.parametrize("where", ["in its files", "between the renames"])
def test_an_interrupted_write_leaves_the_earlier_result(
    pipe, tmp_path, monkeypatch, kind, error, where
):
    original = copy.deepcopy(pipe.unet)
    move(pipe.unet, lambda name: "attn2" in name)
    result, came = tmp_path / "result", []
    save, owner, name = {
        "pipeline": (lambda: save_pipeline(pipe, result, CARD), type(pipe.vae), "save_pretrained"),
        "lora": (
            lambda: save_lora(extract_lora(pipe.unet, original, 1)[0], result, CARD),
            mu.publish.weights.StableDiffusionLoraLoaderMixin,
            "save_lora_weights",
        ),
        "difference": (
            lambda: save_difference(pipe.unet, original, result, CARD, base_model="base"),
            mu.publish.weights,
            "save_file",
        ),
    }[kind]
    rename = os.replace

    def stop(*arguments, **_):
        if where == "between the renames" and not str(arguments[0]).endswith(".tmp"):
            return rename(*arguments)
        came.append(1)
        raise error("stop")

    for earlier in (False, True):
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        with monkeypatch.context() as patch, pytest.raises(error, match="stop"):
            patch.setattr(*((owner, name) if where == "in its files" else (os, "replace")), stop)
            save()
        assert (
            came.pop() and {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
        )
        assert list(tmp_path.iterdir()) == ([result] if earlier else [])
        save()
        assert (result / "README.md").read_text() == CARD and list(tmp_path.iterdir()) == [result]
        move(pipe.unet, lambda name: "attn2" in name)


def test_a_result_takes_the_place_of_its_like_only(unet, tmp_path):
    changed = move(copy.deepcopy(unet))

    def save(folder):
        return save_difference(changed, unet, folder, CARD, base_model="base")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "params.json").write_text("{}")
    with pytest.raises(
        FileExistsError,
        match="run holds params.json, which would be lost: name a new or empty folder",
    ):
        save(tmp_path / "run")
    assert [f.name for f in tmp_path.rglob("*")] == ["run", "params.json"]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        for _ in range(2):
            save(folder)
        assert sorted(f.name for f in folder.iterdir()) == ["README.md", "difference.safetensors"]
        assert len(list(folder.parent.iterdir())) == (1 if folder.name == "deep" else 2)


# --- card ----------------------------------------------------------------------------------------------------------

METRICS = {
    "rows": [
        {"group": g, "prompt": "p", "seed": s, "hit": int(s < k)}
        for g, k, n in (("forget", 1, 8), ("related", 6, 7))
        for s in range(n)
    ],
    "protocol": {"judge": "j", "sampling_steps": 23, "run": {"steps": 1}},
}


@pytest.mark.parametrize("kind", ["pipeline", "difference", "lora"])
def test_a_card_tells_what_was_done_and_measured(kind):
    import yaml

    facts = dict(
        base_model="owner/base",
        license="creativeml-openrail-m",
        method="meta-unlearning",
        concept='a cat: "tabby"',
    )
    text = model_card(
        kind,
        params={"steps": 777, "inner_lr": [1e-5, 2e-4], "sets": "a|b"},
        metrics=METRICS,
        **facts,
    )
    head = yaml.safe_load(text.split("---\n")[1])
    assert (
        head["license"] == "creativeml-openrail-m"
        and head["base_model"] == "owner/base"
        and head["library_name"] == "diffusers"
    )
    assert head["pipeline_tag"] == "text-to-image" and {"unlearning", "meta-unlearning"} <= set(
        head["tags"]
    )
    assert (
        ("lora" in head["tags"]) == (kind == "lora") == (head["base_model_relation"] == "adapter")
    )
    for line in (
        "| steps | 777 |",
        "| inner_lr | [1e-05, 0.0002] |",
        '| sets | "a\\|b" |',
        "| forget | 12.5 % | 2.2 % to 47.1 % | 8 |",
        "| related | 85.7 % |",
        '"sampling_steps": 23',
    ):
        assert line in text
    assert (
        'a cat: "tabby"' in text
        and "An attacker" in text.replace("an attacker", "An attacker")
        and '"run"' not in text
    )
    assert ("has the base model, concept and all" in text) == (kind != "pipeline")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len(code.splitlines()) in (2, 3, 4) and ("owner/base" in code) == (kind != "pipeline")
    text = model_card(kind, params={}, **facts)
    assert "Nothing: this card makes no claim" in text and "%" not in text
    text = model_card(
        kind, params={}, kept=0.625, left_out=[f"norm{i}.bias" for i in range(5)], **facts
    )
    assert (
        "keeps 62.5 % of their squared difference" in text
        and "are 5 tensors" in text
        and ": norm0.bias, norm1.bias, norm2.bias, ..." in text
    )
    with pytest.raises(KeyError):
        model_card("gguf", params={}, **facts)


def test_scores_of_different_steps_are_not_mixed():
    rows = [
        {"group": "forget", "step": step, "hit": int(step > 0)}
        for step in (0, 50)
        for _ in range(4)
    ]
    text = model_card("lora", "b", "mit", "esd", "cat", {}, {"rows": rows, "protocol": {}})
    assert "| forget, step 0 | 0.0 % |" in text and "| forget, step 50 | 100.0 % |" in text


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_the_code_in_the_card_runs(sd_folder, tmp_path, monkeypatch, kind):
    pipe = load(sd_folder)
    with_adapter(pipe.unet)
    expected = predictions(pipe)
    card = model_card(kind, str(sd_folder), "mit", "esd", "cat", {})
    (save_pipeline if kind == "pipeline" else save_lora)(pipe, tmp_path / "this folder", card)
    monkeypatch.chdir(tmp_path)
    code = (
        (tmp_path / "this folder" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    )
    space = {}
    exec(code, space)
    near(predictions(space["pipe"]), expected)
