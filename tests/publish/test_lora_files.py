"""Import of LoRA: the names of all programs are read completely, other adapters are refused."""

import copy
import json

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from published import CARD, assert_near, assert_refused, load, predictions, with_adapter
from safetensors.torch import load_file, save_file

from mu.publish.export import fused, save_lora
from mu.publish.weights import load_weights

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def old_names(unet, style):
    """Return the adapter's tensors as kohya's scripts or diffusers before PEFT name them."""
    state = {}
    for name, p in unet.named_parameters():
        if "lora_" not in name:
            continue
        layer, matrix = name.split(".lora_")
        which = {"A": "down", "B": "up"}[matrix[0]]
        if style == "kohya":
            scale = unet.get_submodule(layer).scaling["default"]
            layer = f"lora_unet_{layer.replace('.', '_')}"
            state[f"{layer}.lora_{which}.weight"] = p.detach()
            state[f"{layer}.alpha"] = torch.tensor(4 * scale)
        else:
            attention, part = layer.rsplit(".to_", 1)
            processor = f"unet.{attention}.processor.to_{part.removesuffix('.0')}"
            state[f"{processor}_lora.{which}.weight"] = p.detach()
    return state


def save_peft_names(unet, file, prefix="", alpha=None):
    """Save an adapter with PEFT's names below a prefix, and one alpha for all layers."""
    state = get_peft_model_state_dict(unet)
    tensors = {prefix + name: t.contiguous() for name, t in state.items()}
    if alpha is not None:
        layers = {name.split(".lora_")[0] for name in tensors}
        tensors |= {f"{layer}.alpha": torch.tensor(float(alpha)) for layer in layers}
    save_file(tensors, file)


def save_as(style, unet, folder):
    """Save the UNet's adapter as other programs do; returns the path to read."""
    file = folder / "lora.safetensors"
    if style == "unet alone":
        unet.save_lora_adapter(folder, weight_name=file.name)
    elif style == "training scripts of diffusers":
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        assert f"{LAYER}.lora.down.weight" in layers
        StableDiffusionPipeline.save_lora_weights(folder / "scripts", unet_lora_layers=layers)
        return folder / "scripts"
    elif style == "ComfyUI":
        save_peft_names(unet, file, "diffusion_model.", alpha=2)
    elif style == "PEFT with alpha":
        save_peft_names(unet, file, "unet.", alpha=2)
    else:
        save_file(old_names(unet, style), file)
    return file


CONFIGS = {
    "diffusers before PEFT": dict(lora_alpha=4),  # has no alpha: it is the rank
    "training scripts of diffusers": dict(lora_alpha=4),
    "kohya": dict(lora_alpha=2, alpha_pattern={"to_k": 3, "to_out.0": 1}),
    "unet alone": dict(lora_alpha=2, alpha_pattern={"to_k": 3, "to_out.0": 1}),
    "ComfyUI": dict(lora_alpha=2),
    "PEFT with alpha": dict(lora_alpha=2),
}


@pytest.mark.parametrize("style", CONFIGS)
def test_lora_of_others_is_read(base, tmp_path, style):
    pipe, original = load(base), load(base)
    with_adapter(pipe.unet, target_modules=ATTENTION, **CONFIGS[style])
    found = load_weights(original.unet, save_as(style, pipe.unet, tmp_path))
    layers = sum("lora_A" in name for name, _ in pipe.unet.named_parameters())
    assert found[:2] == ("lora", layers)
    assert f"{layers} of {len(original.unet.state_dict())} tensors, rank 4, alpha" in str(found)
    assert_near(predictions(original), predictions(pipe))


def make_peft(unet, folder, **config):
    """Save an adapter by PEFT itself; returns the UNet with the adapter merged."""
    options = dict(r=4, lora_alpha=16, target_modules=["to_q", "to_k"]) | config
    model = get_peft_model(copy.deepcopy(unet), LoraConfig(**options))
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2
    model.save_pretrained(folder)
    return model.merge_and_unload()


PEFT = {
    "alpha": {},
    "stabilised": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3}),
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_an_adapter_of_peft_has_the_scale_of_its_configuration(unet, tmp_path, name, prefix):
    expected = make_peft(unet, tmp_path, **PEFT[name])
    file = tmp_path / "adapter_model.safetensors"
    state = {n.removeprefix("base_model.model."): t for n, t in load_file(file).items()}
    save_file({prefix + n: t for n, t in state.items()}, file)
    for path in (tmp_path, file):
        read = copy.deepcopy(unet)
        found = load_weights(read, path)
        torch.testing.assert_close(tiny.weights(read), tiny.weights(expected), rtol=1e-5, atol=1e-6)
    assert "alpha 3 and 16" in found.scales if name == "patterns" else "alpha 16" in found.scales


def test_biases_of_a_lora_are_read(unet, tmp_path):
    """Ours, and PEFT's."""
    config = dict(lora_bias=True, target_modules=["to_out.0", "proj_in"])
    adapted = with_adapter(copy.deepcopy(unet), lora_alpha=4, **config)
    save_lora(adapted, tmp_path / "own", CARD)
    merged = make_peft(unet, tmp_path / "peft", **config)
    for path, expected in ((tmp_path / "own", fused(adapted)), (tmp_path / "peft", merged)):
        read = copy.deepcopy(unet)
        load_weights(read, path)
        torch.testing.assert_close(tiny.weights(read), tiny.weights(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(peft_type="LOHA"), "peft_type of its adapter is LOHA, allowed is LORA"),
        (dict(use_dora=True), "use_dora of its adapter is True, allowed is False: fuse it"),
        (dict(bias="all"), "bias of its adapter is all, allowed is none"),
        (dict(modules_to_save=["conv_in"]), "modules_to_save of its adapter"),
    ],
)
def test_settings_of_peft_that_are_not_read_are_refused(unet, tmp_path, changes, message):
    make_peft(unet, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert_refused(unet, tmp_path, message)


def test_two_alphas_are_refused(unet, tmp_path):
    make_peft(unet, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    layer = f"base_model.model.{LAYER}"
    save_file(load_file(file) | {f"{layer}.alpha": torch.tensor(2.0)}, file)
    assert_refused(unet, tmp_path, "alpha both in its tensors and in its configuration")


KOHYA = "lora_unet_" + LAYER.replace(".", "_")
OTHERS = {
    "LoHa": {f"{KOHYA}.hada_w1_a": (32, 2), f"{KOHYA}.hada_w1_b": (2, 16)},
    "LoKr": {f"{KOHYA}.lokr_w1": (2, 2), f"{KOHYA}.lokr_w2": (16, 8)},
    "DoRA": {f"unet.{LAYER}.lora_magnitude_vector": (32,)},
    "OFT": {f"{KOHYA}.oft_blocks": (4, 8, 8)},
    "(IA)³": {f"{KOHYA}.on_input": (1,)},
    "LoCon with a Tucker decomposition": {f"{KOHYA}.lora_mid.weight": (2, 2, 3, 3)},
    "Custom Diffusion": {f"{LAYER}.processor.to_k_custom_diffusion.weight": (32, 16)},
    "ControlNet": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "IP-Adapter": {"image_proj.proj.weight": (16, 16)},
    "textual inversion": {"emb_params": (1, 16)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_by_their_name(unet, tmp_path, kind):
    pair = {f"unet.{LAYER}.lora_A.weight": (2, 16), f"unet.{LAYER}.lora_B.weight": (32, 2)}
    file = tmp_path / "adapter.safetensors"
    for shapes in (OTHERS[kind], pair | OTHERS[kind]):
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
        escaped = kind.replace("(", r"\(").replace(")", r"\)")
        assert_refused(unet, file, f"is of {escaped} .*allowed is plain LoRA of the UNet: fuse it")


def test_a_delta_of_custom_diffusion_is_refused(unet, tmp_path):
    name = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    torch.save({"state_dict": {name: torch.ones(32, 16)}}, tmp_path / "delta.ckpt")
    assert_refused(unet, tmp_path / "delta.ckpt", "cross attention only.*Custom Diffusion")


def test_lora_that_does_not_fit_is_refused(unet, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_lora(with_adapter(tiny.make_unet(cross_attention_dim=24)), tmp_path / "lora", CARD)
    match = r"another architecture: down\S+attn2.to_k.lora_A.weight is \(4, 24\), and down\S+ "
    assert_refused(unet, tmp_path / "lora", match + r"of this UNet is \(32, 16\)")
    first, second = f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"
    pair = {first: torch.ones(2, 16), second: torch.ones(32, 2)}
    mid = {f"unet.mid.lora_{matrix}.weight": torch.ones(2, 2) for matrix in "AB"}
    save_file(pair | mid, file)
    assert_refused(unet, file, r"mid.lora_A.weight is \(2, 2\), and mid.weight of this UNet is abs")
    save_file({first: torch.ones(2, 16)}, file)
    assert_refused(unet, file, r"is incomplete: it has \S+to_k.lora_A.weight, and no \S+lora_B")
    save_file(pair | {first: torch.full((2, 16), torch.inf)}, file)
    assert_refused(unet, file, "to_k.weight has NaN or infinite values")


@pytest.mark.parametrize("name", ["text_encoder.x.lora_A.weight", "lora_te_x.lora_down.weight"])
def test_lora_of_a_text_encoder_is_refused(unet, tmp_path, name):
    file = tmp_path / "lora.safetensors"
    pair = {f"unet.{LAYER}.lora_A.weight": (2, 16), f"unet.{LAYER}.lora_B.weight": (32, 2)}
    save_file({n: torch.ones(shape) for n, shape in (pair | {name: (2, 2)}).items()}, file)
    match = f"has {name}, allowed is plain LoRA of the UNet.*folder as `model`, which then has the"
    assert_refused(unet, file, match)
