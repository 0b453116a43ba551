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
    """forget, retain_related, retain_unrelated, unconditional."""
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

    return load_pipeline(str(sd_folder))


@pytest.fixture(scope="session")
def judge():
    return tiny.make_judge()
