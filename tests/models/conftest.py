import pytest
import torch

from tests.models.tiny import make


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def prefix():
    return make("prefix")


@pytest.fixture
def dual():
    return make("dual")
