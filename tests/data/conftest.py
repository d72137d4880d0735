"""Tokenizers for the data tests."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from examples.tiny_dsrl.tokenizer import build_tokenizer

DATA = Path(os.environ.get("DSRL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny task's tokenizer: Qwen3's special tokens and chat format over characters."""
    return build_tokenizer()


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data files; the test is skipped where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no data folder {DATA}; set DSRL_TEST_DATA")
    return DATA
