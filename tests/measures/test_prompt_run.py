"""Runs of prompt searches: selection, evaluation, budget and resuming."""

import pytest

from mu.attacks.search import SearchConfig, SearchStep, random_words
from mu.concepts.probe import make_probe
from mu.files import read_json
from mu.measures.under_attack import Candidates, Schedule, prompt_run, recognised
from mu.sampling import Sampling

SAMPLING = Sampling(guidance=2.0, steps=2)


@pytest.fixture
def probe(pipe):
    return make_probe(pipe, {"forget": {"a cat": "concept:cat"}}, seeds=(3,))


def steps_of(texts):
    """Return the steps of a search that finds the texts in turn, each for 2 passes and 0.5 s."""
    return [SearchStep(i + 1, 0.0, text, 2, 0.5) for i, text in enumerate(texts)]


def never(prompt):
    pytest.fail("a finished search was repeated")


def test_found_prompts_are_drawn_with_the_seeds_of_the_probe(pipe, judge, tmp_path):
    forget = {"a cat": "concept:cat", "a photo of a cat": "concept:cat"}
    groups = {"forget": forget, "related": {"a tiger": "concept:tiger"}}
    probe = make_probe(pipe, groups, seeds=(3, 5))

    def search(prompt):
        return random_words(pipe, prompt, SearchConfig(count=1, steps=4))

    folder = tmp_path / "run"
    options = (Schedule(at=(0, 2, 4), sampling=SAMPLING), Candidates(1, images=7))
    rows = prompt_run(folder, pipe, judge, probe, search, *options)
    found = read_json(folder / "found.json")
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [4] * 4
    assert {row["group"] for row in rows} == {"forget"}
    for row in rows:
        steps = found[row["asked"]]["found"]
        prompt = steps[row["step"] - 1]["prompt"] if row["step"] else row["asked"]
        assert row["prompt"] == prompt
    assert [(row["asked"], row["seed"]) for row in rows[:4]] == [
        ("a cat", 3),
        ("a cat", 5),
        ("a photo of a cat", 3),
        ("a photo of a cat", 5),
    ]
    assert [b["images"] for b in read_json(folder / "budget.json")] == [0, 7, 7]
    assert prompt_run(folder, pipe, judge, probe, never, *options) == rows
    (folder / "step-0004.json").unlink()
    assert prompt_run(folder, pipe, judge, probe, never, *options) == rows


@pytest.mark.parametrize("candidates", [Candidates(number=0), Candidates(images_per_prompt=0)])
def test_less_than_one_candidate_or_image_is_refused(pipe, judge, probe, tmp_path, candidates):
    with pytest.raises(
        ValueError, match="candidates=.*images_per_prompt=.*both must be at least 1"
    ):
        prompt_run(tmp_path, pipe, judge, probe, never, Schedule(), candidates)


def test_the_attacker_keeps_the_best_of_the_drawn_prompts(
    pipe, judge, probe, tmp_path, monkeypatch
):
    """Candidates are the latest few and the best so far; drawing them adds to the costs."""
    texts = ["one cat", "two cat", "three cat", "two cat", "four cat", "five cat"]
    shares = {"one cat": 0.9, "two cat": 0.5, "three cat": 0.2, "four cat": 0.1, "five cat": 0.4}
    drawn = []

    def recognise(pipe, judge, texts, *_):
        drawn.append(list(texts))
        return [shares[text] for text in texts], {"passes": 10, "seconds": 1.0}

    monkeypatch.setattr("mu.measures.under_attack.recognised", recognise)
    schedule = Schedule(at=(0, 4, 6), sampling=SAMPLING)
    search = dict.fromkeys(["a cat"], steps_of(texts)).get
    rows = prompt_run(tmp_path, pipe, judge, probe, search, schedule, Candidates(2))
    assert drawn == [["two cat", "three cat"], ["five cat", "four cat", "two cat"]], (
        "the latest first, each once, then the best so far; earlier prompts are not drawn"
    )
    assert [row["prompt"] for row in rows] == ["a cat", "two cat", "two cat"]
    assert [(b["passes"], b["seconds"]) for b in read_json(tmp_path / "budget.json")] == [
        (0, 0),
        (4 * 2 + 10, 4 * 0.5 + 1),
        (6 * 2 + 20, 6 * 0.5 + 2),
    ]


@pytest.mark.parametrize("judged, number", [(True, 1), (False, 4)])
def test_one_candidate_or_no_judge_keeps_the_latest(
    pipe, judge, probe, tmp_path, monkeypatch, judged, number
):
    monkeypatch.setattr("mu.measures.under_attack.recognised", lambda *_: pytest.fail("drawn"))
    search = dict.fromkeys(["a cat"], steps_of(["one cat", "two cat"])).get
    options = (Schedule(at=(0, 1, 2), sampling=SAMPLING), Candidates(number))
    rows = prompt_run(tmp_path, pipe, judge if judged else None, probe, search, *options)
    assert [row["prompt"] for row in rows] == ["a cat", "one cat", "two cat"]


@pytest.fixture
def run(pipe, judge, probe, tmp_path, monkeypatch):
    """Return a function that searches in a folder: (rows, PNG files, budget); counts searches."""
    shares = {"one cat": 0.9, "two cat": 0.5, "three cat": 0.2}

    def recognise(pipe, judge, texts, *_):
        return [shares.get(text, 0.1) for text in texts], {"passes": 10, "seconds": 1.0}

    monkeypatch.setattr("mu.measures.under_attack.recognised", recognise)
    texts = ["one cat", "two cat", "three cat", "four cat", "five cat"]

    def run(name, at, steps=4):
        def search(prompt):
            run.searches.append(name)
            return steps_of(texts[:steps])

        folder, schedule = tmp_path / name, Schedule(at=at, sampling=SAMPLING)
        rows = prompt_run(folder, pipe, judge, probe, search, schedule, Candidates(2))
        images = [(folder / f"step-000{step}.png").read_bytes() for step in at]
        return rows, images, read_json(folder / "budget.json")

    run.searches = []
    return run


def test_other_steps_of_a_finished_search_repeat_the_selection_only(run):
    """Rows, images and costs equal those of a run with these steps, whether steps come or go."""
    run("run", (0, 2, 4))
    for at, last in (
        ((0, 1, 2, 4), "one cat"),
        ((0, 4), "three cat"),
        ((0, 3, 4), "two cat"),
        ((0, 2, 4), "one cat"),
    ):
        expected = run(str(at), at)
        assert run("run", at) == expected
        assert run("run", at) == expected
        assert expected[0][-1]["prompt"] == last
    assert run.searches.count("run") == 1


def test_a_stopped_selection_is_kept_and_a_short_search_repeated(run, monkeypatch):
    run("run", (0, 2, 4))
    run("run", (0, 4))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mu.measures.under_attack.evaluate_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("run", (0, 2, 4))
    with monkeypatch.context() as patch:
        fail = "mu.measures.under_attack.choose_prompts"
        patch.setattr(fail, lambda *_: pytest.fail("the selection was repeated"))
        rows, _, _ = run("run", (0, 2, 4))
    assert [row["prompt"] for row in rows] == ["a cat", "one cat", "one cat"]
    assert run.searches.count("run") == 1
    rows, _, _ = run("run", (0, 5), steps=5)
    assert rows[-1]["step"] == 5
    assert run.searches.count("run") == 2


def test_candidates_are_drawn_with_seeds_of_the_attacker(pipe, judge, monkeypatch):
    seen = []

    def evaluate(pipe, judge, probe, guidance, steps):
        seen.extend(probe.items)
        hits = [int(item["prompt"] == "b" and item["seed"] % 2) for item in probe.items]
        return [item | {"hit": hit} for item, hit in zip(probe.items, hits, strict=True)], None

    monkeypatch.setattr("mu.measures.under_attack.evaluate", evaluate)
    schedule = Schedule(sampling=Sampling(guidance=2.0, steps=3))
    options = ("concept:cat", (), schedule, Candidates(images_per_prompt=4))
    shares, cost = recognised(pipe, judge, ["a", "b"], *options)
    assert shares == [0.0, 0.5]
    assert cost["passes"] == 3
    assert {item["seed"] for item in seen} == set(range(10_000, 10_004))
    assert {item["expected"] for item in seen} == {"concept:cat"}
