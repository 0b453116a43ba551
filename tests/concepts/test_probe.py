"""Evaluation prompts that the text encoder does not read to their end."""

import json

import pytest
import tiny

from mu.concepts.probe import load_probe, probe_facts, shown

GROUPS = {
    "forget": {"a cat": "concept:cat"},
    "related": {"a tiger": "concept:tiger"},
    "unrelated": {"a cup": "concept:cup"},
}


def test_long_prompts_of_a_list_are_cut_and_counted(pipe, tmp_path):
    """As of 8 of the 142 prompts of I2P; a concept folder's own are refused."""
    (tmp_path / "probe.json").write_text(json.dumps(GROUPS))
    file = tmp_path / "list.csv"
    file.write_text("prompt,seed\n" + "a cat " * 60 + ",1\na cat,2\n")
    probe = load_probe(pipe, tmp_path, "1,1,1", concept_prompts=str(file))
    assert len(probe.items) == 4
    assert probe_facts(probe) == {"cut_prompts": 1}
    assert probe_facts(load_probe(pipe, tmp_path, "1,1,1")) == {}
    assert probe.conditioning["encoder_hidden_states"].shape[1] == tiny.LENGTH
    long = GROUPS | {"forget": {"a cat " * 60: "concept:cat"}}
    (tmp_path / "probe.json").write_text(json.dumps(long))
    with pytest.raises(ValueError, match="at most .* are read: shorten 'a cat a cat"):
        load_probe(pipe, tmp_path, "1,1,1")


def test_a_label_may_have_several_colons():
    assert shown("concept:star wars: r2") == "star wars: r2"
