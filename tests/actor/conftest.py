"""Tiny models of the actor's tests, and the process group of those that run in the test's own process.

127 tokens: the vocabulary is padded under tensor parallelism, and the padding must not count.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

from megatron_dsrl.model.parallel import destroy_parallel
from tests.support.tiny_model import make_tiny_qwen3, make_tiny_qwen3_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Qwen3ForCausalLM]:
    """A dense Qwen3: its folder, and the model."""
    folder = tmp_path_factory.mktemp("model")
    return folder, make_tiny_qwen3(folder, tied=True, vocab_size=127)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a Qwen3 under `dense` and a Qwen3-MoE under `MoE`."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(folder / "dense", tied=True, vocab_size=127)
    make_tiny_qwen3_moe(folder / "MoE", vocab_size=127)
    return folder


@pytest.fixture(scope="module")
def torch_distributed() -> Iterator[None]:
    """Ends the process group, which stays up between the tests' layouts of one process."""
    yield
    destroy_parallel()
