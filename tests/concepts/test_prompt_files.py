"""Prompts from a CSV, I2P and COCO. A generated file of I2P's size replaces the hub's."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mu.concepts import prompts as prompt_files
from mu.concepts.prompts import DATA, read_prompts, to_rows


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "p.csv").write_text(text)
        return tmp_path / "p.csv"

    return write


def test_csv_files_are_read(write):
    table = read_prompts(write('prompt,label\n"a cat, asleep", cat\na tiger,tiger\n'))
    assert table.prompt.tolist() == ["a cat, asleep", "a tiger"]
    assert table.seed.tolist() == [0, 1] == table.row.tolist()
    assert "guidance" not in table
    table = read_prompts(
        write(
            "case,prompt,evaluation_seed,evaluation_guidance\n7,a cat,4294967295,7.5\n8,null,3,7\n"
        )
    )
    assert table.seed.tolist() == [4294967295, 3]
    assert table.guidance.tolist() == [7.5, 7]
    assert table.prompt[1] == "null", "a word, not a gap"
    assert read_prompts(write("prompt\na\nb\nc\n"), rows=[2, 0]).prompt.tolist() == [
        "c",
        "a",
    ]
    assert read_prompts(write("prompt\na\nb\n"), limit=1).prompt.tolist() == ["a"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("text,seed\na cat,1\n", "no column `prompt`: rename one of text, seed"),
        ("prompt,seed\na cat,1\n  ,2\n", "an empty prompt in row 1"),
        ("", "is not a CSV file .No columns.*with a header"),
        ("prompt\na cat, asleep\n", "more cells in a line than columns.*double quotes"),
        ("prompt\na\na, b\n", "is not a CSV file .*double quotes"),
        ("prompt,guidance\na cat,7\nb,high\n", "no finite guidance in row 1"),
        ("prompt,guidance\na,inf\n", "no finite guidance in row 0"),
        ("prompt,guidance\n", "holds no prompt"),
        ("prompt,seed\na cat,1\nb,x\n", "no integer seed in row 1"),
        ("prompt,seed\na cat,1.5\n", "no integer seed in row 0"),
        ("prompt\n", "holds no prompt"),
    ],
)
def test_invalid_csv_files_are_explained(write, text, words):
    with pytest.raises(ValueError, match=words):
        read_prompts(write(text))


def test_the_default_seed_is_the_row_number(write):
    file = write("prompt\na\nb\nc\n")
    assert read_prompts(file).seed.tolist() == [0, 1, 2]
    assert read_prompts(file, rows=[2, 0]).seed.tolist() == [2, 0]
    assert read_prompts(write("prompt,row\na,x\nb,y\n")).seed.tolist() == [0, 1], (
        "whatever a file of one's own calls its rows"
    )


def test_blank_guidance_is_left_out(write):
    table = read_prompts(write("prompt,guidance\na,7.5\nb,\nc, \n"))
    assert to_rows(table) == [
        {"prompt": "a", "seed": 0, "guidance": 7.5},
        {"prompt": "b", "seed": 1},
        {"prompt": "c", "seed": 2},
    ]
    assert (
        to_rows(read_prompts(write("prompt,guidance\na,\n")))
        == to_rows(read_prompts(write("prompt,label\na,x\n")))
        == [{"prompt": "a", "seed": 0}]
    )


def test_encodings_other_than_utf_8_are_named(tmp_path):
    (tmp_path / "p.csv").write_bytes("prompt\na café\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"p.csv is not a CSV file .*: save it as UTF-8"):
        read_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize("prompts", [["007", "1e5"], ["1984.0"], ["007"], ["null"], ["True"]])
def test_prompts_are_text(write, prompts):
    table = read_prompts(write("\n".join(["prompt,seed", *(f"{p},3" for p in prompts)])))
    assert table.prompt.tolist() == prompts
    assert table.seed.tolist() == [3] * len(prompts)


@pytest.mark.parametrize("name", ["guidance_scale", "cfg", "CFG scale", "cfg_scale", "Guidance"])
def test_guidance_has_many_names(write, name):
    assert read_prompts(write(f"Prompt,{name}\na cat,7.5\n")).guidance.tolist() == [7.5]


def test_columns_that_would_change_the_images_are_refused(write):
    with pytest.raises(ValueError, match="a column 'negative_prompt', which is not read: delete"):
        read_prompts(write("prompt,Negative Prompt\na cat,blurry\n"))
    assert len(read_prompts(write("prompt,negative_prompt\na cat,\n"))) == 1


def test_other_formats_have_short_messages(tmp_path):
    captions = [{"caption": f"A cat number {i}, on a mat"} for i in range(3000)]
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"annotations": captions}))
    with pytest.raises(ValueError, match="is JSON, allowed is CSV") as error:
        read_prompts(file)
    assert len(str(error.value)) < 500
    wide = tmp_path / "wide.csv"
    wide.write_text(",".join(f"column{i}" for i in range(3000)) + "\n")
    with pytest.raises(ValueError, match="no column `prompt`") as error:
        read_prompts(wide)
    assert len(str(error.value)) < 500
    for encoding in ("utf-16", "utf-16-be"):
        text = "\ufeffprompt,seed\na cat,1\n" if encoding.endswith("be") else "prompt\na cat\n"
        (tmp_path / "p.csv").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match="is in UTF-16: save it as UTF-8"):
            read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("prompt\na cat\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.csv").prompt.tolist() == ["a cat"]


def test_missing_files_and_rows_are_named(write):
    with pytest.raises(
        FileNotFoundError, match="no file of prompts 'nothing.csv': .*i2p-nudity, i2p, coco"
    ):
        read_prompts("nothing.csv")
    with pytest.raises(ValueError, match="has no rows 5: choose from 0 to 1"):
        read_prompts(write("prompt\na\nb\n"), rows=[0, 5])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_prompts(write("prompt\na\n"), limit=0)


def test_an_unreachable_hub_names_the_download_command():
    with pytest.raises(
        FileNotFoundError,
        match="(?s)AIML-TUDA/i2p is out of reach.*"
        "hf download AIML-TUDA/i2p i2p_benchmark.csv --repo-type dataset.*name a CSV",
    ):
        read_prompts("i2p-nudity")


# --- I2P


@pytest.fixture
def i2p(tmp_path, monkeypatch):
    """Fake I2P with the real rows' seeds; returns a function that saves a table, and the table."""
    chosen = pd.read_csv(DATA / "i2p_nudity_142.csv")
    table = pd.DataFrame(
        {
            "prompt": [f"prompt {i}" for i in range(4703)],
            "categories": "sexual",
            "sd_seed": 1,
            "sd_guidance_scale": 8.0,
        }
    )
    table.loc[chosen.i2p_row, "sd_seed"] = chosen.evaluation_seed.to_numpy()

    def save(t):
        return t.to_csv(tmp_path / "i2p_benchmark.csv", index=False)

    save(table)
    monkeypatch.setattr(
        prompt_files, "hf_hub_download", lambda repo, file, repo_type: str(tmp_path / file)
    )
    return save, table


def test_the_nudity_file_has_142_rows_and_seeds():
    table = pd.read_csv(DATA / "i2p_nudity_142.csv")
    assert len(table) == 142 == table.i2p_row.nunique()
    assert table.i2p_row.between(0, 4702).all()
    assert table.evaluation_seed.between(0, 2**32 - 1).all()


def test_nudity_prompts_have_the_rows_and_seeds_of_the_file(i2p):
    chosen, table = pd.read_csv(DATA / "i2p_nudity_142.csv"), read_prompts("i2p-nudity")
    assert table.prompt.tolist() == [f"prompt {i}" for i in chosen.i2p_row]
    assert table.row.tolist() == chosen.i2p_row.tolist()
    assert table.seed.tolist() == chosen.evaluation_seed.tolist()
    assert table.guidance.tolist() == chosen.evaluation_guidance.tolist()
    assert len(read_prompts("i2p-nudity", limit=5)) == 5
    assert len(read_prompts("i2p")) == 4703
    assert read_prompts("i2p", rows=[3]).guidance.tolist() == [8.0]


def test_another_version_of_i2p_is_refused(i2p):
    save, table = i2p
    save(table.drop(index=0))
    with pytest.raises(ValueError, match="has 4702 rows, not 4703 .another version"):
        read_prompts("i2p-nudity")
    save(table.assign(sd_seed=1))
    with pytest.raises(ValueError, match="AIML-TUDA/i2p has another seed in row 21 "):
        read_prompts("i2p-nudity")
    save(table.drop(columns="sd_seed"))
    assert len(read_prompts("i2p-nudity")) == 142, (
        "a set without seeds cannot be checked, and is taken"
    )


# --- COCO


def test_captions_come_with_their_images(monkeypatch):
    picture, asked = Image.fromarray(np.zeros((4, 4, 3), np.uint8)), []

    class Stream(list):
        def take(self, n):
            return Stream(self[:n])

    lines = Stream(
        {"caption": c, "image": picture} for c in ("a dog", ["a bus", "a red bus"], "a cup")
    )
    monkeypatch.setattr(
        prompt_files,
        "extra",
        lambda *_: SimpleNamespace(
            load_dataset=lambda repo, split, streaming: (
                asked.append((repo, split, streaming)) or lines
            )
        ),
    )
    table = read_prompts("coco", limit=2)
    assert table.prompt.tolist() == ["a dog", "a bus"]
    assert table.image[0] is picture
    assert table.seed.tolist() == [0, 1]
    assert asked == [("sayakpaul/coco-30-val-2014", "train", True)]
    assert len(read_prompts("coco")) == 3
    assert asked[-1][2] is False


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_prompts("coco", limit=2)
