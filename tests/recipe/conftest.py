import pytest
import torch


@pytest.fixture(scope="session")
def rgba():
    """Return six drawings: coloured squares on transparent ground."""
    images = torch.zeros(6, 4, 128, 128, dtype=torch.uint8)
    for i in range(6):
        g = torch.Generator().manual_seed(i)
        square = (slice(20 + 5 * i, 90), slice(30, 100))
        images[i, :3, *square] = torch.randint(256, (3, 1, 1), generator=g).byte()
        images[i, 3, *square] = 255
    return images
