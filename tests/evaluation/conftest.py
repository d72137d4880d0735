"""The tiny task's tokenizer for the evaluation tests."""

import pytest

from examples.tiny_dsrl.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()
