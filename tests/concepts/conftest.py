"""Models that the tests of concepts share."""

import pytest
import tiny
from concepts.builds import NAMES

from mu.concepts.presets import read_preset
from mu.models import load_pipeline


@pytest.fixture(scope="session")
def pocket():
    return {name: load_pipeline(name) for name in ("pocket", "pocket-sdxl")}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Save a tiny pipeline that knows the words of all presets; returns its folder."""
    texts = sorted({text for name in NAMES for text in read_preset(name).texts()})
    return str(tiny.make_pipeline(tmp_path_factory.mktemp("words"), texts))
