"""Protocol cards, and tables of numbers that share one."""

import json

import pytest

from mu.measures.card import MAY_DIFFER, add_numbers, card_text, one_table, same_protocol
from mu.params import protocol


def card(**other):
    facts = {
        "model": "pocket (abc)",
        "judge": "data/pocket-judge (def)",
        "sampling_steps": 25,
        "sampling_guidance": 5.0,
        "run": {"lr": 1e-5},
    }
    return protocol(**facts | other)


def test_numbers_of_one_protocol_share_a_table_with_its_card():
    unlearned = {"score": 0.1, "jfd": 2.0}, card(run={"lr": 1e-5}, commit="a")
    meta = {"score": 0.0, "jfd": 3.0}, card(run={"lr": 2e-5}, commit="b")
    table = one_table({"unlearned": unlearned, "meta": meta})
    assert table.loc["meta"].to_dict() == {"score": 0, "jfd": 3}
    assert list(table.index) == ["unlearned", "meta"]
    shared = table.attrs["protocol"]
    assert shared["sampling_steps"] == 25
    assert not set(shared) & set(MAY_DIFFER)
    assert one_table({"one": (0.5, card())}).value.one == 0.5


@pytest.mark.parametrize(
    "fact, other",
    [
        ("judge", "another"),
        ("sampling_steps", 50),
        ("sampling_guidance", 7.5),
        ("model", "pocket (xyz)"),
        ("detector", "nudenet 3.4.2"),
    ],
)
def test_numbers_of_two_protocols_do_not_share_a_table(fact, other):
    cards = {"unlearned": card(), "meta": card(**{fact: other}), "ascent": card()}
    with pytest.raises(ValueError, match="the protocols differ") as caught:
        one_table({name: (0.5, c) for name, c in cards.items()})
    value = cards["unlearned"].get(fact, "missing")
    assert f"{fact} is {value} for unlearned, ascent; {other} for meta" in str(caught.value)
    assert same_protocol(cards, (*MAY_DIFFER, fact)), "the fact may be ignored explicitly"


def test_a_fact_on_a_later_card_only_is_a_difference():
    with pytest.raises(ValueError, match="fid_images is missing for a; 1000 for b"):
        same_protocol({"a": card(), "b": card(fid_images=1000)})


def test_a_number_without_a_card_is_refused():
    for bare in ({}, None):
        with pytest.raises(ValueError, match="no card for meta"):
            one_table({"unlearned": (1, card()), "meta": (1, bare)})
    with pytest.raises(ValueError, match="no cards"):
        same_protocol({})


def test_a_card_survives_json():
    made = card(steps=[0, 25])
    assert same_protocol({"a": made, "b": json.loads(json.dumps(made))})


def test_a_card_as_text():
    lines = card_text(card(steps=[0, 25], note="", clip_scale="100 · cosine")).splitlines()
    assert "model: pocket (abc)" in lines
    assert "sampling guidance: 5" in lines
    assert "steps: 0, 25" in lines
    assert any(line.startswith("versions: torch 2") for line in lines)
    assert not any(line.startswith(("note", "commit", "machine", "run")) for line in lines)


def test_a_sheet_collects_numbers_and_their_facts():
    sheet = {}
    add_numbers(sheet, "meta", {"a": 1}, {"x": 1})
    add_numbers(sheet, "meta", {"b": 2}, {"y": 2})
    assert sheet == {"meta": ({"a": 1, "b": 2}, {"x": 1, "y": 2})}


def test_numbers_that_differ_in_what_auto_chose_share_a_table():
    cards = {
        name: {"precision": "auto", "computed_in": chosen, "images": 4}
        for name, chosen in (("a", "bf16"), ("b", "no"))
    }
    assert same_protocol(cards) == {"precision": "auto", "images": 4}
    cards["b"]["precision"] = "no"
    with pytest.raises(ValueError, match="precision is auto for a; no for b"):
        same_protocol(cards)
