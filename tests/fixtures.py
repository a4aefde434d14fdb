"""Shared by the tests: the tiny base (built once, cached), the official data where it is at hand, one thread."""

from pathlib import Path

import pytest
import torch

from tests.bases import folder, no_network, refused  # noqa: F401
from tests.faults.children import fresh  # noqa: F401
from tests.publishers import go, script, server  # noqa: F401

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def tiny_folder():
    from common.runtime import base

    return base.resolve("tiny")


@pytest.fixture
def tiny_model(tiny_folder):
    from common import model

    return model.load("tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from common.runtime import base

    return base.load_tokenizer(tiny_folder)


@pytest.fixture(scope="session")
def official():
    """The folder of the three tasks' official files, or a skip."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the official data files are not beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="module")
def one_thread():
    """Products this small only wait for each other on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
