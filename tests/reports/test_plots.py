"""Figures of attacks and of validation, and confusion matrices."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from attack_files import SCORES, write_attacks

from mu.measures.attack_results import read_attacks
from mu.measures.comparison import attack_table
from mu.reports.plots import confusion, curve_figure, peak_figure, validation_figure


@pytest.fixture
def found(tmp_path):
    return read_attacks(write_attacks(tmp_path))


def test_the_figure_has_a_dot_for_every_attack_and_model(found):
    table = attack_table(*found[:2])
    fig = peak_figure(table)
    (ax,) = fig.axes
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert set(labels) == set(SCORES)
    assert labels[-1] == "sly", "the strongest against the defended model is on top"
    offsets = [c.get_offsets().data for c in ax.collections if len(c.get_offsets()) == 3]
    drawn = np.concatenate([points[:, 0] for points in offsets])
    assert set(np.round(table.peak, 6)) <= set(np.round(drawn, 6))
    plt.close(fig)


def test_every_attack_has_its_curves(found):
    fig = curve_figure(found[0], ["full", "sly", "words"], columns=2)
    titles = [ax.get_title() for ax in fig.axes if ax.axison]
    assert titles == ["full", "sly", "words"]
    assert len(fig.axes) == 4
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["unlearned", "meta-unlearned"]
    heights = {round(y, 6) for line in fig.axes[0].lines for y in line.get_ydata()}
    assert {0.9, 0.6, 0.1, 0.2} <= heights
    plt.close(fig)


def test_a_confusion_matrix_has_shares_per_expected_label():
    expected = ["concept:a", "concept:a", "concept:b", "concept:b"]
    seen = ["concept:a", "concept:b", "concept:c", "concept:b"]
    table = confusion(expected, seen, "title")
    assert table.loc["concept:a"].tolist() == [0.5, 0.5, 0]
    assert table.loc["concept:b"].tolist() == [0, 0.5, 0.5]
    assert list(table.columns) == ["concept:a", "concept:b", "other"]


def test_the_validation_figure_shows_losses_share_and_cosines():
    sets = ("related", "unrelated", "forget")
    losses = {f"validation {name}": [0.05, 0.06] for name in sets}
    losses |= {f"validation {name} after": [0.1, 0.5] for name in sets}
    losses |= {
        "validation related lost": [0.0, 0.7],
        "validation unrelated lost": [0.0, 0.1],
        "validation related harmed before": [0.0, 0.1],
        "validation unrelated harmed before": [0.0, 0.0],
        "validation cosine forget 0": [0.6, np.nan],
    }
    losses |= {
        "validation phase": [0, 1],
        "validation score": [0.0, 0.6],
        "validation lost, one prompt, 50": [0.0, 0.5],
    }
    history = pd.DataFrame(losses, index=[30, 60]).reindex(range(1, 61))
    fig = validation_figure(history)
    assert [len(ax.lines) for ax in fig.axes] == [7, 7, 2]  # the end of one phase in each
    assert fig.axes[0].lines[-1].get_xdata() == [30, 30]
    assert fig.axes[1].lines[0].get_ydata().tolist() == [0.0, 0.7]


def test_without_validation_there_is_no_figure():
    with pytest.raises(ValueError, match="validated"):
        validation_figure(pd.DataFrame({"related": [0.1]}, index=[1]))
