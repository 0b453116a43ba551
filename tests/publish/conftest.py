import pytest


@pytest.fixture(params=["sd", "sdxl"])
def base(request):
    """Return the folder of a tiny pipeline of each family."""
    return request.getfixturevalue(f"{request.param}_folder")
