"""What tests of plans have in common."""

import json

import pytest

from tests.planning.test_memory import write_model


@pytest.fixture
def model(tmp_path) -> str:
    """Qwen3-8B without weights."""
    write_model(tmp_path / "model", layers=36, with_experts=False)
    file = tmp_path / "model" / "config.json"
    sizes = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
    }  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    return f"model.path={tmp_path / 'model'}"
