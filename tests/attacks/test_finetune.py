"""Attacks by training: each does what its equation says, leaves the model as it was, and says what it cost."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import mu.attacks.finetune
import mu.concepts.sets
import mu.measures.evaluate
from mu.attacks.finetune import (
    attackers_set,
    choose,
    dreambooth,
    fine_tuning,
    learned_word,
    merge_back,
)
from mu.attacks.tokens import words
from mu.concepts.probe import make_probe
from mu.concepts.sets import drawn_set, encode_images, with_prompts
from mu.files import read_json
from mu.measures.under_attack import attack_run
from mu.models import encode_prompts, load_pipeline, trainable
from mu.objectives import denoising, draw_minibatch
from mu.train import finetune


@pytest.fixture
def attacked(pipe, judge, sets):
    probe = make_probe(
        pipe,
        {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}},
        seeds=(0, 1),
    )
    options = dict(at=(0, 2, 3), lr=1e-2, seed=5, guidance=2.0, sampling_steps=2)

    def attacked(folder, **other):
        asked, how = options | other, {}
        how = {
            name: asked.pop(name)
            for name in ("at", "guidance", "sampling_steps", "before")
            if name in asked
        }
        return attack_run(
            folder, pipe, judge, partial(fine_tuning, pipe, sets[0], probe, **asked), **how
        )

    return attacked


def test_an_attack_is_plain_fine_tuning_and_gives_the_weights_back(
    pipe, judge, sets, attacked, tmp_path, monkeypatch
):
    before, seen = tiny.weights(pipe.unet), []
    real = mu.measures.evaluate.evaluate
    monkeypatch.setattr(
        mu.measures.evaluate,
        "evaluate",
        lambda pipe, *a: seen.append(tiny.weights(pipe.unet)) or real(pipe, *a),
    )
    rows = attacked(tmp_path / "run")
    assert torch.equal(tiny.weights(pipe.unet), before) and torch.equal(seen[0], before)
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4 and {
        "group",
        "hit",
        "seen",
        "seed",
    } <= rows[0].keys()

    from mu.train import State, finetune

    unet = tiny.frozen(pipe.unet)
    state = State(unet, "f", lr=1e-2, optimizer="adam", seed=5)
    for record in finetune(state, pipe.scheduler, sets[0], steps=3):
        if record.step in (2, 3):
            assert torch.equal(tiny.weights(unet), seen[record.step - 1])
    assert not torch.equal(seen[1], seen[2]) and len(seen) == 3
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "budget.json",
        "records.json",
    ] + [f"step-000{i}.{end}" for i in (0, 2, 3) for end in ("json", "png")]

    monkeypatch.setattr(
        mu.attacks.finetune,
        "finetune",
        lambda *_, **__: pytest.fail("a finished attack was run again"),
    )
    assert attacked(tmp_path / "run") == rows


def test_what_was_judged_at_the_start_is_not_drawn_again(attacked, tmp_path, monkeypatch):
    whole = attacked(tmp_path / "whole")
    real, calls = mu.measures.evaluate.evaluate, []
    monkeypatch.setattr(mu.measures.evaluate, "evaluate", lambda *a: calls.append(1) or real(*a))
    known = [
        {key: value for key, value in row.items() if key != "step"}
        for row in whole
        if row["step"] == 0
    ]
    assert (
        attacked(tmp_path / "again", before=(known, tmp_path / "whole" / "step-0000.png")) == whole
        and len(calls) == 2
    )
    for step in (0, 2, 3):
        assert (tmp_path / "again" / f"step-000{step}.png").read_bytes() == (
            tmp_path / "whole" / f"step-000{step}.png"
        ).read_bytes()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_killed_attack_goes_on_with_the_same_numbers(pipe, attacked, tmp_path, monkeypatch, stop):
    """Killed at the first, second or third evaluation, or before it."""
    expected, before = attacked(tmp_path / "whole"), tiny.weights(pipe.unet)
    real, calls = mu.measures.evaluate.evaluate, []

    def evaluate(*a):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(mu.measures.evaluate, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        attacked(tmp_path / "killed")
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert (
        attacked(tmp_path / "killed") == expected and len(calls) == 4
    )  # every evaluation once, the interrupted one twice
    for step in (0, 2, 3):
        name = f"step-000{step}.png"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(tiny.weights(pipe.unet), before)


@pytest.mark.parametrize("killed", [True, False])
def test_an_earlier_step_asked_for_later_is_that_of_the_same_attack(
    attacked, tmp_path, monkeypatch, killed
):
    """Of one that was killed further on, and of a finished one: rows, pictures and passes are those of an attack that was looked at there from the first."""
    expected, real, calls = (
        attacked(tmp_path / "whole", at=(0, 1, 2, 3)),
        mu.measures.evaluate.evaluate,
        [],
    )

    def evaluate(*a):
        calls.append(1)
        if killed and len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(mu.measures.evaluate, "evaluate", evaluate)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            attacked(tmp_path / "again", at=(0, 2, 3))
    else:
        attacked(tmp_path / "again", at=(0, 2, 3))
        (tmp_path / "again" / "budget.json").unlink()
    assert attacked(tmp_path / "again", at=(0, 1, 2, 3)) == expected
    assert (tmp_path / "again" / "step-0001.png").read_bytes() == (
        tmp_path / "whole" / "step-0001.png"
    ).read_bytes()
    assert [b["passes"] for b in read_json(tmp_path / "again" / "budget.json")] == [0, 1, 2, 3]


def test_a_model_that_diverges_under_attack_is_said_so(pipe, attacked, tmp_path):
    before = tiny.weights(pipe.unet)
    with pytest.raises((FloatingPointError, ValueError), match="not finite|diverged"):
        attacked(tmp_path / "run", lr=1e25, optimizer="sgd")
    assert torch.equal(tiny.weights(pipe.unet), before)
    assert (tmp_path / "run" / "step-0000.json").exists() and not (
        tmp_path / "run" / "step-0003.json"
    ).exists()


def test_the_budget_says_what_each_step_had_cost(attacked, sets, tmp_path):
    attacked(tmp_path / "run")
    budget = read_json(tmp_path / "run" / "budget.json")
    assert [b["step"] for b in budget] == [0, 2, 3] and [b["images"] for b in budget] == [
        0,
        len(sets[0]),
        len(sets[0]),
    ]
    assert [b["passes"] for b in budget] == [0, 2, 3] and 0 == budget[0]["seconds"] < budget[1][
        "seconds"
    ] < budget[2]["seconds"]


# --- the kinds of attack ---------------------------------------------------------------------------------------------


@pytest.fixture
def probe(pipe):
    return make_probe(
        pipe,
        {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}},
        seeds=(0,),
    )


def losses(pipe, attack, steps):
    return [
        r.losses
        for r in finetune(
            attack.state,
            pipe.scheduler,
            attack.concept_set,
            steps=steps,
            batch_size=4,
            others=attack.others,
            others_weight=attack.others_weight,
        )
    ]


def test_mixed_in_images_add_their_loss_with_their_weight(pipe, sets, probe):
    """The step is that of L(concept) + w · L(others), both on their own minibatches, drawn one after the other."""
    attack = fine_tuning(
        pipe, sets[0], probe, lr=1e-2, optimizer="sgd", seed=3, others=sets[1], others_weight=0.5
    )
    before, g = (
        [p.detach().clone() for p in attack.state.parameters],
        torch.Generator().manual_seed(3 * 1000 + 3),
    )
    parts = [denoising(draw_minibatch(s, pipe.scheduler, 4, g)) for s in (sets[0], sets[1])]

    def error(part):
        return (
            (
                pipe.unet(
                    part[0], part[1], encoder_hidden_states=part[2]["encoder_hidden_states"]
                ).sample
                - part[3]
            )
            .pow(2)
            .mean()
        )

    asked = [error(part) for part in parts]
    expected = torch.autograd.grad(asked[0] + 0.5 * asked[1], attack.state.parameters)
    assert losses(pipe, attack, 1) == [
        pytest.approx({"finetune": asked[0].item(), "others": asked[1].item()}, rel=1e-5)
    ]
    for p, old, gradient in zip(attack.state.parameters, before, expected, strict=False):
        torch.testing.assert_close(p.detach(), old - 1e-2 * gradient, rtol=1e-4, atol=1e-6)
    assert attack.images == len(sets[0]) + len(sets[1])


def test_others_without_a_weight_are_not_there(pipe, sets, probe):
    weights = []
    for options in (
        {},
        {"others": sets[1], "others_weight": 0.0},
        {"first": sets[1], "first_steps": 0},
    ):
        attack, before = (
            fine_tuning(pipe, sets[0], probe, lr=1e-2, seed=3, **options),
            tiny.weights(pipe.unet),
        )
        losses(pipe, attack, 2)
        weights.append(tiny.weights(pipe.unet))
        assert attack.images == len(sets[0])
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(before, pipe.unet.parameters())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_the_first_phase_is_benign_and_the_second_is_the_concept(pipe, sets, probe):
    attack = fine_tuning(pipe, sets[0], probe, first=sets[1], first_steps=3)
    assert [attack.concept_set(step) is sets[1] for step in range(5)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert attack.concept_set(3) is sets[0] and attack.images == len(sets[0]) + len(sets[1])


def test_dreambooth_keeps_what_the_attacked_model_draws_of_the_class(pipe, sets, probe):
    drawn = drawn_set(pipe, ["a tiger", "a cup"], 3, seed=2002, guidance=2.0, steps=2)
    attack = dreambooth(
        pipe,
        sets[0],
        probe,
        ["a tiger", "a cup"],
        class_images=3,
        seed=2,
        guidance=2.0,
        sampling_steps=2,
        lr=1e-3,
        others_weight=0.7,
    )
    assert (
        torch.equal(attack.others.mean, drawn.mean)
        and attack.others_weight == 0.7
        and attack.images == len(sets[0]) + 3
    )
    assert [drawn.prompts[i] for i in drawn.prompt] == ["a tiger", "a cup", "a tiger"] and len(
        {tuple(m.flatten().tolist()) for m in drawn.mean}
    ) == 3
    with pytest.raises(ValueError, match="class_prompts is empty"):
        dreambooth(pipe, sets[0], probe, [])


def test_class_pictures_are_no_pictures_of_the_probe_and_cost_passes(
    pipe, judge, sets, probe, tmp_path, monkeypatch
):
    seeds, passes, real = [], [], mu.concepts.sets.draw_images
    monkeypatch.setattr(
        mu.concepts.sets,
        "draw_images",
        lambda pipe, c, u, seeds_, *a: seeds.extend(seeds_) or real(pipe, c, u, seeds_, *a),
    )
    monkeypatch.setattr(mu.attacks.finetune, "at_once", lambda pipe: 2)
    monkeypatch.setattr(mu.concepts.sets, "at_once", lambda pipe: 2)
    hook = pipe.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    attack = partial(
        dreambooth,
        pipe,
        sets[0],
        probe,
        ["a tiger"],
        class_images=5,
        guidance=2.0,
        sampling_steps=3,
        lr=1e-3,
    )
    assert attack(seed=0).passes == len(passes) == 3 * 3 and len(seeds) == 5
    hook.remove()
    attack(seed=1)
    assert len(set(seeds)) == 10 and min(seeds) >= 1000, "a probe's seeds begin at 0"
    attack_run(tmp_path / "run", pipe, judge, attack, at=(0, 1), guidance=2.0, sampling_steps=2)
    assert [b["passes"] for b in read_json(tmp_path / "run" / "budget.json")] == [0, 9 + 1]


def test_hrm_s_is_one_prompt_and_hrm_m_several(sets):
    whole = dataclasses.replace(
        sets[0], prompt=torch.tensor([1, 0, 1, 1, 0, 2]), prompts=["a", "b", "c"]
    )
    assert with_prompts(whole, 1).prompt.tolist() == [1, 1, 1] and torch.equal(
        with_prompts(whole, 1).mean, whole.mean[[0, 2, 3]]
    )
    assert with_prompts(whole, 2).prompt.tolist() == [1, 0, 1, 1, 0] and len(
        with_prompts(whole, 0)
    ) == len(whole) == len(with_prompts(whole, 9))


@pytest.mark.parametrize("subset", ["x", "f"])
def test_merging_back_undoes_what_was_done_to_a_subset(pipe, subset):
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
    torch.testing.assert_close(
        pipe.unet.state_dict()[name], 0.75 * changed[name] + 0.25 * original[name]
    )
    assert not any(p.requires_grad for p in pipe.unet.parameters())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_learned_word_changes_no_weight_and_lowers_the_loss(family, sd_folder, sdxl_folder):
    pipe = load_pipeline(str(sd_folder if family == "sd" else sdxl_folder))
    probe = make_probe(
        pipe,
        {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}},
        seeds=(0,),
    )
    images = encode_images(
        pipe,
        torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        ["a cat", "a photo of a cat", "a cat", "a cat"],
    )
    parts = [
        pipe.unet,
        *(
            getattr(pipe, name)
            for name in ("text_encoder", "text_encoder_2")
            if getattr(pipe, name, None)
        ),
    ]
    before = [tiny.weights(part) for part in parts]
    attack = learned_word(
        pipe,
        images,
        probe,
        "cup",
        "banana",
        lambda text: text.replace("cat", "cup"),
        lr=0.3,
        seed=1,
    )
    start, drawn = [p.detach().clone() for p in attack.state.parameters], attack.probe()
    assert len(start) == len(parts) - 1 and attack.concept_set(0).prompts == [
        "a cup",
        "a photo of a cup",
    ]
    as_banana = encode_prompts(
        pipe, ["a banana", "a tiger"]
    )  # the word is read as the one whose vector it starts from
    for name, value in drawn.conditioning.items():
        torch.testing.assert_close(value, as_banana[name])
    found = losses(pipe, attack, 60)
    assert sum(r["finetune"] for r in found[-20:]) < sum(r["finetune"] for r in found[:20])
    assert all(
        torch.equal(tiny.weights(part), old) for part, old in zip(parts, before, strict=False)
    ), "a weight has changed"
    assert all(
        (p - old).abs().max() > 0.1 for p, old in zip(attack.state.parameters, start, strict=False)
    )
    later = attack.probe().conditioning["encoder_hidden_states"]
    assert not torch.allclose(
        later[0], drawn.conditioning["encoder_hidden_states"][0]
    ) and torch.allclose(later[1], drawn.conditioning["encoder_hidden_states"][1])
    assert [item["prompt"] for item in attack.probe().items] == ["a cat", "a tiger"]


def test_a_learned_word_goes_on_after_a_kill(pipe, judge, probe, tmp_path, monkeypatch):
    images = encode_images(pipe, torch.rand(4, 3, 16, 16) * 2 - 1, ["a cat"] * 4)
    attack = partial(
        learned_word,
        pipe,
        images,
        probe,
        "cup",
        "banana",
        lambda text: text.replace("cat", "cup"),
        lr=0.1,
    )
    options = dict(at=(0, 2, 4), guidance=2.0, sampling_steps=2)
    expected, real, calls = (
        attack_run(tmp_path / "whole", pipe, judge, attack, **options),
        mu.measures.evaluate.evaluate,
        [],
    )

    def evaluate(*a):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(mu.measures.evaluate, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        attack_run(tmp_path / "killed", pipe, judge, attack, **options)
    assert attack_run(tmp_path / "killed", pipe, judge, attack, **options) == expected
    for step in (0, 2, 4):
        assert (tmp_path / "killed" / f"step-000{step}.png").read_bytes() == (
            tmp_path / "whole" / f"step-000{step}.png"
        ).read_bytes()


def test_words_that_cannot_be_learned_are_refused(pipe, sets, probe):
    def said(text):
        return text.replace("cat", "cup")

    with pytest.raises(ValueError, match=f"'zebra crossing' is no word.*{words(pipe)[0]}"):
        learned_word(pipe, sets[0], probe, "zebra crossing", "banana", said)
    with pytest.raises(ValueError, match="'p0' does not hold the word 'cup'"):
        learned_word(pipe, sets[0], probe, "cup", "banana", said)
    with pytest.raises(
        ValueError,
        match="'a tiger', a prompt of the probe, holds the word 'tiger'.*choose another word",
    ):
        learned_word(
            pipe,
            dataclasses.replace(sets[0], prompts=["a cat", "cat"]),
            probe,
            "tiger",
            "banana",
            lambda text: text.replace("cat", "tiger"),
        )


def test_no_profile_learns_a_word_of_its_probe():
    def words_of(sets):
        return (
            " ".join(text for group in read_json(f"{sets}/probe.json").values() for text in group)
            .replace(",", " ")
            .split()
        )

    files = sorted(Path("notebooks/profiles").glob("*/3[01]_*.yaml"))
    found = {file: yaml.safe_load(file.read_text()) for file in files}
    assert len(found) >= 8
    for file, asked in found.items():
        assert asked.get("word", "alien") not in words_of(asked["sets"]), (
            f"{file}: a picture of the probe would change with the learned word"
        )


def test_the_captions_may_call_the_concept_otherwise(pipe, tmp_path):
    """Another word than what the judge calls it; whole words only, in any case and beside any mark."""
    tiny.make_images(
        tmp_path / "attacker" / "forget", ["A Kitten.", "a kitten, kittens", "a kitten"]
    )
    probe = make_probe(
        pipe,
        {"forget": {"a kitten": "concept:cat"}, "related": {"a tiger": "concept:tiger"}},
        seeds=(0,),
    )
    how, found = (
        dict(kind="textual-inversion", word="cup", start="banana", lr=0.1),
        attackers_set(pipe, tmp_path),
    )
    with pytest.raises(
        ValueError, match="'A Kitten.' does not hold the word 'cup'.*as its captions do"
    ):
        choose(pipe, tmp_path, probe, found, **how)(0)
    attack = choose(pipe, tmp_path, probe, found, **how, called="kitten")(0)
    assert attack.concept_set(0).prompts == ["A cup.", "a cup", "a cup, kittens"]
    as_banana = encode_prompts(pipe, ["a banana"])["encoder_hidden_states"][0]
    torch.testing.assert_close(attack.probe().conditioning["encoder_hidden_states"][0], as_banana)


def test_lora_leaves_nothing_behind(pipe, judge, probe, sets, tmp_path):
    before = tiny.weights(pipe.unet)
    found = attack_run(
        tmp_path / "run",
        pipe,
        judge,
        partial(fine_tuning, pipe, sets[0], probe, subset="lora", rank=64, lr=1e-2),
        at=(0, 2),
        guidance=2.0,
        sampling_steps=2,
    )
    assert (
        torch.equal(tiny.weights(pipe.unet), before)
        and not hasattr(pipe.unet, "peft_config")
        and len(found) == 4
    )
