"""Fixtures of all tests: tiny models and sets, and no network."""

import os
import socket

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse connections to other machines."""
    real = socket.socket.connect

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to connect to {address}")
        return real(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture
def unet():
    return tiny.make_unet()


@pytest.fixture
def unet_frozen():
    return tiny.frozen(tiny.make_unet())


@pytest.fixture
def noise_scheduler():
    return tiny.make_scheduler()


@pytest.fixture(scope="session")
def sets():
    """Return the forget, related and unrelated sets and the empty prompt's embeddings."""
    return tiny.make_sets()


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    return tiny.make_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    return tiny.make_xl_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def pipe(sd_folder):
    from mu.models import load_pipeline

    return load_pipeline(str(sd_folder), precision="no")  # "auto" depends on the CPU


@pytest.fixture(scope="session")
def training_sets(tmp_path_factory):
    """Return a concept folder with the defender's three sets."""
    base = tmp_path_factory.mktemp("sets")
    captions = {
        "forget": ["a cat", "a photo of a cat"],
        "retain-related": ["a tiger", "a tiger"],
        "retain-unrelated": ["a banana", "a cup", "a cup"],
    }
    for name, lines in captions.items():
        tiny.make_images(base / "defender" / name, lines, seed=len(name))
    return base


@pytest.fixture(scope="session")
def judge():
    return tiny.make_judge()
