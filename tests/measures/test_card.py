"""The card next to a number, and which numbers may stand beside each other."""

import json

import pytest

from mu.measures.card import MAY_DIFFER, card_text, one_table, same_protocol
from mu.params import protocol


def card(**other):
    return protocol(
        **{
            "model": "pocket (abc)",
            "judge": "data/pocket-judge (def)",
            "sampling_steps": 25,
            "sampling_guidance": 5.0,
            "run": {"lr": 1e-5},
        }
        | other
    )


def test_numbers_of_one_protocol_stand_in_one_table_with_their_card():
    table = one_table(
        {
            "unlearned": ({"score": 0.1, "jfd": 2.0}, card(run={"lr": 1e-5}, commit="a")),
            "meta": ({"score": 0.0, "jfd": 3.0}, card(run={"lr": 2e-5}, commit="b")),
        }
    )
    assert table.loc["meta"].to_dict() == {"score": 0, "jfd": 3} and list(table.index) == [
        "unlearned",
        "meta",
    ]
    shared = table.attrs["protocol"]
    assert shared["sampling_steps"] == 25 and not set(shared) & set(MAY_DIFFER)
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
def test_numbers_of_two_protocols_do_not(fact, other):
    cards = {"unlearned": card(), "meta": card(**{fact: other}), "ascent": card()}
    with pytest.raises(ValueError, match="different protocols do not go into one table") as caught:
        one_table({name: (0.5, c) for name, c in cards.items()})
    assert (
        f"{fact} is {cards['unlearned'].get(fact, 'nothing')} for unlearned, ascent; {other} for meta"
        in str(caught.value)
    )
    assert same_protocol(cards, (*MAY_DIFFER, fact)), (
        "somebody may say that it does not matter here"
    )


def test_a_fact_that_only_a_later_card_has_is_a_difference():
    with pytest.raises(ValueError, match="fid_images is nothing for a; 1000 for b"):
        same_protocol({"a": card(), "b": card(fid_images=1000)})


def test_a_number_without_a_card_goes_into_no_table():
    for bare in ({}, None):
        with pytest.raises(ValueError, match="no card goes with meta"):
            one_table({"unlearned": (1, card()), "meta": (1, bare)})
    with pytest.raises(ValueError, match="no cards"):
        same_protocol({})


def test_a_card_that_was_saved_is_the_card_that_was_made(tmp_path):
    assert same_protocol(
        {"a": card(steps=[0, 25]), "b": json.loads(json.dumps(card(steps=[0, 25])))}
    )


def test_a_card_reads_well():
    words = card_text(card(steps=[0, 25], note="", clip_scale="100 · cosine")).splitlines()
    assert (
        "model: pocket (abc)" in words
        and "sampling guidance: 5" in words
        and "steps: 0, 25" in words
        and any(w.startswith("versions: torch 2") for w in words)
    )
    assert not any(w.startswith(("note", "commit", "machine", "run")) for w in words)
