"""A base to be spoilt, and the one line with which it must be refused; fixtures, see tests/conftest.py."""

import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

from common import model
from common.log import command


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny base."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture
def no_network(monkeypatch):
    def raising(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", raising)
    monkeypatch.setattr(socket, "getaddrinfo", raising)


@pytest.fixture
def refused(capsys, no_network):
    """The one line on stderr with which a command that loads this base ends."""

    def run(checkpoint, **options):
        main = command(lambda argv: model.load(argv, torch.device("cpu"), torch.float32, **options))
        capsys.readouterr()
        start = time.perf_counter()
        with pytest.raises(SystemExit) as stop:
            main(str(checkpoint))
        assert time.perf_counter() - start < 10
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run
