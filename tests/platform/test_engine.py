"""What an engine's processes get from the platform."""

import ast
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import EngineConfig
from megatron_dsrl.model.architecture import FAMILIES
from megatron_dsrl.platform import engine_models
from megatron_dsrl.platform.cpu import uncompiled
from megatron_dsrl.platform.engine import allocator_warning, engine_environment, engine_server_arguments


def test_engines_find_every_supported_family_without_importing_all_models() -> None:
    """By its name: SGLang is imported by engines only."""
    (module,) = (file for file in Path(engine_models.__path__[0]).glob("*.py") if file.stem != "__init__")
    (listed,) = (node.value for node in ast.parse(module.read_text()).body if isinstance(node, ast.Assign))
    assert isinstance(listed, ast.List)
    assert {ast.unparse(model) for model in listed.elts} == set(FAMILIES)


def test_functions_stay_as_they_are_however_they_are_marked_for_compilation() -> None:
    assert uncompiled(len) is uncompiled(len, dynamic=True) is uncompiled(fullgraph=True)(len) is len


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512, expandable_segments:True"}, "PYTORCH_CUDA_ALLOC_CONF"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_ALLOC_CONF"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_expandable_segments_with_engines_on_the_same_gpus_cause_a_warning(monkeypatch, variables, named) -> None:
    assert allocator_warning(variables) is None, "they have no effect on CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    warning = allocator_warning(variables)
    assert (warning is None) == (named is None)
    assert warning is None or warning.startswith(f"warning: {named} sets expandable_segments:True")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quantization": "fp8"}, "engine.quantization=fp8 needs an NVIDIA GPU"),
        ({"extra_arguments": {"speculative_algorithm": "NGRAM"}}, "speculative_algorithm needs an NVIDIA GPU"),
    ],
)
def test_what_sglang_cannot_do_on_a_cpu_is_refused_before_an_engine_starts(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        engine_server_arguments(EngineConfig(max_total_tokens=1024, **settings), deterministic=False)


def test_sglang_has_a_folder_for_its_caches_where_the_home_cannot_be_written(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SGLANG_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "SGLANG_CACHE_DIR" not in engine_environment(1)
    for home in ("/proc/no/home", "~nobody/at/all"):
        monkeypatch.setenv("HOME", home)
        assert Path(engine_environment(1)["SGLANG_CACHE_DIR"]).parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    assert "SGLANG_CACHE_DIR" not in engine_environment(1)
