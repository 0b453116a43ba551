"""Attacks by training: losses match the equations, and other weights stay unchanged."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from mu.attacks.finetune import (
    AttackConfig,
    attackers_set,
    choose,
    dreambooth,
    fine_tuning,
    inversion,
    merge_back,
)
from mu.attacks.tokens import words
from mu.concepts.probe import make_probe
from mu.concepts.sets import drawn_set, encode_images, with_prompts
from mu.files import read_json
from mu.losses import draw_minibatch
from mu.models import encode_prompts, load_pipeline, text_encoders
from mu.sampling import Sampling
from mu.train import finetune
from mu.trainable import trainable


def losses(pipe, attack, steps):
    options = dict(mixed_set=attack.mixed_set, mixed_weight=attack.mixed_weight)
    loop = finetune(
        attack.state, pipe.scheduler, attack.concept_set, steps=steps, batch_size=4, **options
    )
    return [record.losses for record in loop]


def cat_to(word):
    return lambda text: text.replace("cat", word)


def test_mixed_in_images_add_their_weighted_loss(pipe, sets, probe):
    """One step minimises L(concept) + w · L(mixed), on minibatches drawn one after the other."""
    config = AttackConfig(lr=1e-2, optimizer="sgd", mixed_weight=0.5)
    attack = fine_tuning(pipe, sets[0], probe, config, seed=3, mixed_set=sets[1])
    before = [p.detach().clone() for p in attack.state.parameters]
    g = torch.Generator().manual_seed(3 * 1000 + 3)

    def error(concept_set):
        inputs, noise = draw_minibatch(concept_set, pipe.scheduler, 4, g)
        latents, timesteps, conditioning = inputs
        states = conditioning["encoder_hidden_states"]
        predicted = pipe.unet(latents, timesteps, encoder_hidden_states=states).sample
        return (predicted - noise).pow(2).mean()

    concept, mixed = error(sets[0]), error(sets[1])
    expected = torch.autograd.grad(concept + 0.5 * mixed, attack.state.parameters)
    wanted = {"finetune": concept.item(), "mixed": mixed.item()}
    assert losses(pipe, attack, 1) == [pytest.approx(wanted, rel=1e-5)]
    for p, old, gradient in zip(attack.state.parameters, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - 1e-2 * gradient, rtol=1e-4, atol=1e-6)
    assert attack.images == len(sets[0]) + len(sets[1])


def test_sets_without_a_weight_or_steps_change_nothing(pipe, sets, probe):
    before, weights = tiny.weights(pipe.unet), []
    for options, used in (
        ({}, {}),
        ({"mixed_weight": 0.0}, {"mixed_set": sets[1]}),
        ({"warmup_steps": 0}, {"warmup_set": sets[1]}),
    ):
        config = AttackConfig(lr=1e-2, **options)
        attack = fine_tuning(pipe, sets[0], probe, config, seed=3, **used)
        losses(pipe, attack, 2)
        weights.append(tiny.weights(pipe.unet))
        assert attack.images == len(sets[0])
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(before.clone(), pipe.unet.parameters())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_the_warmup_precedes_the_concept(pipe, sets, probe):
    config = AttackConfig(warmup_steps=3)
    attack = fine_tuning(pipe, sets[0], probe, config, warmup_set=sets[1])
    phases = [attack.concept_set(step) for step in range(5)]
    assert [phase is sets[1] for phase in phases] == [True, True, True, False, False]
    assert phases[3] is sets[0]
    assert attack.images == len(sets[0]) + len(sets[1])


def test_dreambooth_preserves_class_images_of_the_attacked_model(pipe, sets, cat_groups):
    cat_groups["related"]["a cup"] = "concept:cup"
    probe = make_probe(pipe, cat_groups, seeds=(0,))
    drawn = drawn_set(pipe, ["a cup", "a tiger"], 3, seed=2002, guidance=2.0, steps=2)
    config = AttackConfig("dreambooth", lr=1e-3, class_images=3, mixed_weight=0.7)
    attack = dreambooth(pipe, sets[0], probe, config, seed=2, sampling=Sampling(2.0, 2))
    assert torch.equal(attack.mixed_set.mean, drawn.mean)
    assert attack.mixed_weight == 0.7
    assert attack.images == len(sets[0]) + 3
    assert [drawn.prompts[i] for i in drawn.prompt] == ["a cup", "a tiger", "a cup"]
    assert len({tuple(m.flatten().tolist()) for m in drawn.mean}) == 3


def test_dreambooth_needs_related_prompts(pipe, sets):
    probe = make_probe(pipe, {"forget": {"a cat": "concept:cat"}}, seeds=(0,))
    with pytest.raises(ValueError, match="the probe has no related prompts"):
        dreambooth(pipe, sets[0], probe, AttackConfig("dreambooth"))


def test_hrm_s_is_one_prompt_and_hrm_m_several(sets):
    prompt = torch.tensor([1, 0, 1, 1, 0, 2])
    whole = replace(sets[0], prompt=prompt, prompts=["a", "b", "c"])
    assert with_prompts(whole, 1).prompt.tolist() == [1, 1, 1]
    assert torch.equal(with_prompts(whole, 1).mean, whole.mean[[0, 2, 3]])
    assert with_prompts(whole, 2).prompt.tolist() == [1, 0, 1, 1, 0]
    assert len(with_prompts(whole, 0)) == len(whole) == len(with_prompts(whole, 9))


@pytest.mark.parametrize("subset", ["x", "f"])
def test_merging_back_restores_the_weights_of_a_subset(pipe, subset):
    original = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    with torch.no_grad():
        for p in trainable(pipe.unet, "f").values():
            p.add_(torch.randn_like(p))
    changed = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    merge_back(pipe.unet, original, subset)
    inside = set(trainable(pipe.unet, subset))
    for name, t in pipe.unet.state_dict().items():
        torch.testing.assert_close(t, original[name] if name in inside else changed[name])
    pipe.unet.load_state_dict(changed)
    merge_back(pipe.unet, original, subset, amount=0.25)
    name = sorted(inside)[0]
    expected = 0.75 * changed[name] + 0.25 * original[name]
    torch.testing.assert_close(pipe.unet.state_dict()[name], expected)
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_an_inversion_changes_no_weight_and_lowers_the_loss(either, cat_groups):
    probe = make_probe(either, cat_groups, seeds=(0,))
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a cat", "a photo of a cat", "a cat", "a cat"]
    images = encode_images(either, pixels, captions)
    parts = [either.unet, *text_encoders(either)]
    before = [tiny.weights(part) for part in parts]
    config = AttackConfig("textual-inversion", lr=0.3, word="cup", init_word="banana")
    attack = inversion(either, images, probe, config, cat_to("cup"), seed=1)
    start = [p.detach().clone() for p in attack.state.parameters]
    drawn = attack.probe().conditioning
    assert len(start) == len(parts) - 1
    assert attack.concept_set(0).prompts == ["a cup", "a photo of a cup"]
    as_banana = encode_prompts(either, ["a banana", "a tiger"])  # the initial embedding
    for name, value in drawn.items():
        torch.testing.assert_close(value, as_banana[name])
    found = [record["finetune"] for record in losses(either, attack, 60)]
    assert sum(found[-20:]) < sum(found[:20])
    for part, weights in zip(parts, before, strict=True):
        assert torch.equal(tiny.weights(part), weights), "a weight has changed"
    for p, old in zip(attack.state.parameters, start, strict=True):
        assert (p - old).abs().max() > 0.1
    later = attack.probe()
    (cat, tiger), (old_cat, old_tiger) = (
        conditioning["encoder_hidden_states"] for conditioning in (later.conditioning, drawn)
    )
    assert not torch.allclose(cat, old_cat)
    assert torch.allclose(tiger, old_tiger)
    assert [item["prompt"] for item in later.items] == ["a cat", "a tiger"]


def test_words_that_cannot_be_learned_are_refused(pipe, sets, probe):
    def attack(word, images, new="cup"):
        config = AttackConfig("textual-inversion", word=word, init_word="banana")
        return inversion(pipe, images, probe, config, cat_to(new))

    match = f"'zebra crossing' is not one token.*{words(pipe)[0]}"
    with pytest.raises(ValueError, match=match):
        attack("zebra crossing", sets[0])
    with pytest.raises(ValueError, match="'p0' does not contain the word 'cup'"):
        attack("cup", sets[0])
    match = "the prompt 'a tiger' contains the word 'tiger': choose another word"
    with pytest.raises(ValueError, match=match):
        attack("tiger", replace(sets[0], prompts=["a cat", "cat"]), new="tiger")


def test_no_profile_learns_a_word_of_its_evaluation_prompts():
    def words_of(sets):
        groups = read_json(f"{sets}/probe.json").values()
        return " ".join(text for group in groups for text in group).replace(",", " ").split()

    files = sorted(Path("notebooks/profiles").glob("*/3[01]_*.yaml"))
    assert len(files) >= 8
    for file in files:
        parameters = yaml.safe_load(file.read_text())
        word = parameters.get("word", "alien")
        assert word not in words_of(parameters["sets"]), (
            f"{file}: learning {word} changes an evaluation image"
        )


def test_the_concept_token_is_replaced_in_captions_and_prompts(pipe, tmp_path):
    """Captions may name the concept otherwise than the judge; whole words only, in any case."""
    captions = ["A Kitten.", "a kitten, kittens", "a kitten"]
    tiny.make_images(tmp_path / "attacker" / "forget", captions)
    groups = {"forget": {"a kitten": "concept:cat"}, "related": {"a tiger": "concept:tiger"}}
    probe = make_probe(pipe, groups, seeds=(0,))
    images = attackers_set(pipe, tmp_path, sampling=Sampling(), cache=None)
    config = AttackConfig("textual-inversion", lr=0.1, word="cup", init_word="banana")
    match = "'A Kitten.' does not contain the word 'cup': set concept_token"
    with pytest.raises(ValueError, match=match):
        choose(pipe, tmp_path, probe, images, config)(0)
    attack = choose(pipe, tmp_path, probe, images, replace(config, concept_token="kitten"))(0)
    assert attack.concept_set(0).prompts == ["A cup.", "a cup", "a cup, kittens"]
    as_banana = encode_prompts(pipe, ["a banana"])["encoder_hidden_states"][0]
    first = attack.probe().conditioning["encoder_hidden_states"][0]
    torch.testing.assert_close(first, as_banana)


def test_a_concept_may_have_a_colon(tmp_path):
    """As Star Wars: R2-D2; the whole name is replaced."""
    name = "star wars: r2"
    captions = [f"a {name}", "a tiger", "a cup"]
    pipe = load_pipeline(str(tiny.make_pipeline(tmp_path / "model", captions)), precision="no")
    tiny.make_images(tmp_path / "attacker" / "forget", captions[:1] * 2)
    groups = {"forget": {f"a {name}": f"concept:{name}"}, "related": {"a tiger": "concept:tiger"}}
    probe = make_probe(pipe, groups, seeds=(0,))
    images = attackers_set(pipe, tmp_path, sampling=Sampling(), cache=None)
    config = AttackConfig("textual-inversion", lr=0.1, word="cup", init_word="tiger")
    assert choose(pipe, tmp_path, probe, images, config)(0).concept_set(0).prompts == ["a cup"]


def test_concept_inversion_puts_the_word_in_front(pipe, probe, tmp_path):
    tiny.make_images(tmp_path / "attacker" / "forget", ["a cat", "a photo of a cat"])
    images = attackers_set(pipe, tmp_path, sampling=Sampling(), cache=None)
    config = AttackConfig("concept-inversion", word="cup", init_word="banana")
    attack = choose(pipe, tmp_path, probe, images, config)(0)
    assert attack.concept_set(0).prompts == ["cup a cat", "cup a photo of a cat"]


def test_an_inversion_of_several_concepts_is_refused(pipe, sets, tmp_path):
    groups = {"forget": {"a cat": "concept:cat", "a cup": "concept:cup"}}
    probe = make_probe(pipe, groups, seeds=(0,))
    with pytest.raises(ValueError, match="forget prompts expect cat, cup: choose another kind"):
        choose(pipe, tmp_path, probe, sets[0], AttackConfig("textual-inversion"))


def test_the_sets_of_a_config_are_read_below_the_concept_folder(pipe, probe, tmp_path):
    for name, captions in (("forget", ["a cat"] * 2), ("clean", ["a cup"] * 3)):
        tiny.make_images(tmp_path / "attacker" / name, captions)
    images = attackers_set(pipe, tmp_path, sampling=Sampling(), cache=None)
    clean = "attacker/clean"
    config = AttackConfig(mixed_set=clean, warmup_set=clean, warmup_steps=1)
    attack = choose(pipe, tmp_path, probe, images, config)(0)
    assert attack.mixed_set.prompts == attack.concept_set(0).prompts == ["a cup"]
    assert attack.concept_set(1) is images
    assert attack.images == 2 + 3 + 3
    with pytest.raises(FileNotFoundError, match="nowhere has no metadata.jsonl"):
        choose(pipe, tmp_path, probe, images, replace(config, mixed_set="nowhere"))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"kind": "lora"}, "unknown kind of attack 'lora': choose fine-tuning, dreambooth"),
        ({"warmup_steps": 3}, "warmup_set='' with warmup_steps=3: give both, or neither"),
        ({"warmup_set": "s"}, "warmup_set='s' with warmup_steps=0: give both, or neither"),
        ({"kind": "dreambooth", "mixed_set": "s"}, "kind 'dreambooth' has no mixed_set='s'"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        AttackConfig(**options).check()
