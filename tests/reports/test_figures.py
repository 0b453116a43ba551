"""Figures show the models, attacks and steps that the results contain."""

from dataclasses import replace

import pytest

from mu.reports import figures
from mu.reports.explorer import read_sprite_sheet


def test_figures_show_the_methods_that_were_run(results):
    fig = figures.score_figure(results.rows, ["HRM-m", "CLEAN"], "related")
    assert [ax.get_title() for ax in fig.axes[:2]] == ["ESD-u-3", "UCE"]
    assert fig.axes[0].get_lines()[1].get_ydata().tolist() == [1.0, 0.5, 0.5]
    fig, table = figures.angle_figure(results.records)
    assert len(fig.axes) == 4
    assert len(table) == 4


@pytest.fixture
def sheets(results, collected):
    """The images of UCE under HRM-m and under CLEAN."""
    facts = {(c["method"], c["attack"]): c for c in results.courses if not c["panel"]}
    return [read_sprite_sheet(facts["uce", attack], collected) for attack in ("HRM-m", "CLEAN")]


def test_the_claim_is_one_row_per_model_and_fine_tuning(sheets):
    attack, clean = sheets
    counts = [sum(x["group"] == g for x in attack.items) for g in ("forget", "related")]
    fig = figures.claim_images(attack, clean, counts=(*counts, 1))
    columns = sum(counts) + 1
    rows = [fig.axes[i : i + columns] for i in range(0, len(fig.axes), columns)]
    assert [row[0].get_ylabel() for row in rows] == [
        "original",
        "unlearned",
        "unlearned\n+ 100 steps",
        "meta-unlearned",
        "meta-unlearned\n+ 100 steps",
        "meta-unlearned\n+ 100 steps of CLEAN",
    ]
    assert rows[0][0].get_title() == attack.items[0]["prompt"].removeprefix("a ")
    at = [(attack, 0, 0), (attack, 1, 0), (attack, 1, 100), (attack, 2, 0), (attack, 2, 100)]
    for row, (progress, model, step) in zip(rows, [*at, (clean, 2, 100)], strict=True):
        n = progress.steps.index(step)
        assert (row[0].get_images()[0].get_array() == progress.pictures[model, n, 0]).all()
        framed = [ax.spines["left"].get_visible() for ax in row]
        assert framed == [hit == 0 for hit in progress.hits[model, n, :columns]]
    assert any(ax.spines["left"].get_visible() for ax in fig.axes), "some are not recognised"
    assert len(figures.claim_images(attack, counts=(1, 1, 1)).axes) == 5 * 3


def test_images_of_other_steps_are_not_compared(sheets):
    attack, clean = sheets
    with pytest.raises(ValueError, match="share no images of the same models after 0 steps"):
        figures.claim_images(attack, replace(clean, steps=[0, 51, 101]))
    with pytest.raises(ValueError, match="after 77 steps: run both"):
        figures.claim_images(attack, clean, step=77)
