"""The tiny task's tokenizer for the evaluation tests."""

import pytest
from transformers import PreTrainedTokenizerFast

from examples.tiny_dsrl.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
