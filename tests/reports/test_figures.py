"""Figures show the models, attacks and steps that the results contain."""

from dataclasses import replace

import numpy as np
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


def test_related_concepts_under_attack_and_clean_are_side_by_side(sheets):
    attack, clean = sheets
    fig = figures.destruction_images(attack, clean)
    related = [i for i, item in enumerate(attack.items) if item["group"] == "related"]
    assert len(fig.axes) == 7 * len(related)
    titles = [ax.get_title().split("\n") for ax in fig.axes[:7]]
    assert titles[0] == ["original"]
    for start, model in ((1, "unlearned"), (4, "meta-unlearned")):
        assert titles[start : start + 3] == [
            [model],
            [model, "+ 100 steps", "HRM"],
            [model, "+ 100 steps", "CLEAN"],
        ]
    first = related[0]
    same = clean.items.index(attack.items[first])
    images = [np.asarray(ax.get_images()[0].get_array()) for ax in fig.axes[:7]]
    assert (images[5] == attack.pictures[2, attack.steps.index(100), first]).all()
    assert (images[6] == clean.pictures[2, clean.steps.index(100), same]).all()


def test_images_of_other_steps_are_not_compared(sheets):
    attack, clean = sheets
    message = "share no related image of the same models and step"
    with pytest.raises(ValueError, match=message):
        figures.destruction_images(attack, replace(clean, steps=[0, 51, 101]))
