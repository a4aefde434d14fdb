"""Shared by the tests: the tiny base (built once, cached), the micro base, the official data, one thread."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import processes
from tests.bases import folder, no_network, refused  # noqa: F401
from tests.faults.children import fresh  # noqa: F401
from tests.publishers import go, script, server  # noqa: F401

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def tiny_folder():
    from common.runtime import base

    return processes.keep(base.resolve("tiny"))


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory, tiny_folder):
    """A base for runs that only have to run: the tokenizer of the tiny one, two small layers, random weights."""
    from transformers import Gemma3ForCausalLM

    from common.runtime import tiny

    target = tmp_path_factory.mktemp("micro") / "base"
    shutil.copytree(tiny_folder, target, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    config = tiny.make_config()
    config.num_hidden_layers, config.layer_types = 2, ["sliding_attention"] * 2
    config.hidden_size, config.intermediate_size, config.initializer_range = 32, 64, 0.2
    config.num_attention_heads, config.head_dim, config.query_pre_attn_scalar = 2, 16, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Gemma3ForCausalLM(config)
    config.save_pretrained(target)
    weights = {name: p.detach() for name, p in net.named_parameters()}  # the tied head is listed once
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return processes.keep(target)


@pytest.fixture
def micro_model(micro_folder):
    from common import model

    return model.load(micro_folder, torch.device("cpu"), torch.float32)


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
