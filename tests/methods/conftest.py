"""Pipelines that the tests of closed-form edits share."""

import pytest

from mu.models import load_pipeline


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    folder = request.getfixturevalue(f"{request.param}_folder")
    return load_pipeline(str(folder), precision="no")


@pytest.fixture
def xl(sdxl_folder):
    return load_pipeline(str(sdxl_folder), precision="no")
