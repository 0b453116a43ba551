import pytest

from mu.concepts.probe import make_probe
from mu.models import load_pipeline


@pytest.fixture
def pipe(sd_folder):
    """A pipeline in float32, on every CPU: losses are compared with the equations."""
    return load_pipeline(str(sd_folder), precision="no")


@pytest.fixture(params=["sd", "sdxl"])
def either(request, sd_folder, sdxl_folder):
    """A pipeline of each family."""
    folder = sd_folder if request.param == "sd" else sdxl_folder
    return load_pipeline(str(folder), precision="no")


@pytest.fixture
def cat_groups():
    return {"forget": {"a cat": "concept:cat"}, "related": {"a tiger": "concept:tiger"}}


@pytest.fixture
def probe(pipe, cat_groups):
    return make_probe(pipe, cat_groups, seeds=(0,))
