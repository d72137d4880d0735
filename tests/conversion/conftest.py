"""A converted model."""

from pathlib import Path

import pytest

from tests.support.conversions import VOCAB_SIZE, convert
from tests.support.tiny_model import make_tiny_qwen3


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A folder with an untied Qwen3 under `hf` and `megatron`."""
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron") == 0
    return tmp_path
