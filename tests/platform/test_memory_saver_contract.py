"""What the CUDA side relies on in torch_memory_saver, which gives an engine's memory back while the trainer works.

The package's own Python runs here; its compiled part needs a GPU and is only searched for names.
"""

import ast
import inspect
import os
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_dsrl.rollout.engines.client import MemoryTag
from megatron_dsrl.rollout.engines.server_process import inherited_environment
from tests.platform.test_sglang_contract import RELEASE, RESUME, SGLANG, parsed, source
from tests.support.tiny_run import REPOSITORY
from tests.support.transformer_engine_on_cpu import packages_folder

NAME = "torch_memory_saver"
FOLDER = packages_folder()
ADAPTER = "utils/torch_memory_saver_adapter.py:_TorchMemorySaverAdapterReal"
GRAPHS = "model_executor/runner_backend/full_cuda_graph_backend.py"
REGIONS = {
    "weights": "model_executor/model_runner_components/load_model_utils.py",
    "kv_cache": "mem_cache/memory_pool.py",
}
"""By tag: where SGLang allocates such memory."""

pytestmark = pytest.mark.skipif(
    not (FOLDER / NAME).is_dir(), reason=f"no {NAME} in {FOLDER}: bash tools/setup_cpu.sh --dev"
)


@pytest.fixture
def package(monkeypatch) -> Iterator[ModuleType]:
    """The package of the image, with the CUDA 13 build of torch."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    import torch_memory_saver

    yield torch_memory_saver
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


def test_it_is_the_images_release_and_new_enough_for_sglang() -> None:
    (installed,) = [each.version for each in distributions(name=NAME, path=[str(FOLDER)])]
    for lock in ("image/requirements.lock", "requirements-transformer-engine.lock"):
        assert f"torch-memory-saver=={installed}" in (REPOSITORY / "tools" / lock).read_text().splitlines(), lock
    (sglang,) = distributions(name="sglang")
    (wanted,) = [
        requirement
        for requirement in map(Requirement, sglang.requires or ())
        if canonicalize_name(requirement.name) == "torch-memory-saver"
    ]
    assert wanted.specifier.contains(installed)


def calls_in(tree: ast.AST, of_object: str) -> list[ast.Call]:
    """Calls of methods of the object with this name, even as an attribute."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [call for call in found if ast.unparse(call.func.value).rpartition(".")[2].lstrip("_") == of_object]


def is_capture(call: ast.Call) -> bool:
    """SGLang passes some keywords of `cuda_graph` by `partial`, and the others in the call of the result."""
    return ast.unparse(call.func) == "graph_ctx" or (
        ast.unparse(call.func) == "partial" and ast.unparse(call.args[0]).endswith("memory_saver_adapter.cuda_graph")
    )


def test_it_has_what_sglang_calls(package) -> None:
    """With the keywords that it is called with."""
    saver = package.torch_memory_saver
    calls = calls_in(source(ADAPTER), "memory_saver")
    assert {call.func.attr for call in calls} == {"region", "cuda_graph", "disable", "pause", "resume"}
    for call in calls:
        parameters = inspect.signature(getattr(saver, call.func.attr)).parameters
        assert {keyword.arg for keyword in call.keywords if keyword.arg} <= parameters.keys(), ast.unparse(call)
    captures = [node for node in ast.walk(parsed(GRAPHS)) if isinstance(node, ast.Call) and is_capture(node)]
    keywords = {keyword.arg for call in captures for keyword in call.keywords}
    assert {"cuda_graph", "pool", "stream", "tag"} <= keywords <= inspect.signature(saver.cuda_graph).parameters.keys()
    assert {call.func.attr for call in calls_in(source(ADAPTER), NAME)} == {"configure_subprocess"}
    assert callable(package.configure_subprocess) and saver.enabled


@pytest.mark.parametrize("place", [RELEASE, RESUME])
def test_every_tag_that_the_trainer_names_is_one_that_sglang_allocates_under_and_passes_on(place) -> None:
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in parsed("constants.py").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    passed_on = {constants[call.args[0].id] for call in calls_in(source(place), "memory_saver_adapter") if call.args}
    assert REGIONS.keys() == set(get_args(MemoryTag)) <= passed_on
    for tag, file in REGIONS.items():
        (name,) = [name for name, value in constants.items() if value == tag]
        calls = [node for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)]
        regions = [ast.unparse(call) for call in calls if "region" in ast.unparse(call.func)]
        assert any(name in region for region in regions), (tag, SGLANG / file)


def test_scheduler_processes_preload_the_build_for_torchs_cuda(package, monkeypatch) -> None:
    from torch_memory_saver.hooks.mode_preload import HookUtilModePreload

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert "LD_PRELOAD" in inherited_environment(), "the engine's server has the user's"
    with package.configure_subprocess():
        ours, theirs = os.environ["LD_PRELOAD"].split(":")
        assert theirs == "/usr/lib/libjemalloc.so.2"
        assert HookUtilModePreload().get_path_binary() == ours
    assert os.environ["LD_PRELOAD"] == "/usr/lib/libjemalloc.so.2"
    assert Path(ours).name.startswith("torch_memory_saver_hook_mode_preload_cu13.")
    wrapper = ast.parse((FOLDER / NAME / "binary_wrapper.py").read_text())
    functions = {node.attr for node in ast.walk(wrapper) if isinstance(node, ast.Attribute) and "tms_" in node.attr}
    exported = Path(ours).read_bytes()
    for name in (function for function in functions if "xpu" not in function):
        assert f"\0{name}\0".encode() in exported, name


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_no_engine_starts_with_expandable_segments(package, monkeypatch, variable) -> None:
    """It refuses them under the older name, and does not look at the newer one, which PyTorch reads as well."""
    from torch_memory_saver.entrypoint import _sanity_checks

    monkeypatch.setenv(variable, "max_split_size_mb:512,expandable_segments:True")
    if variable == "PYTORCH_CUDA_ALLOC_CONF":
        with pytest.raises(RuntimeError, match="expandable_segments is not supported"):
            _sanity_checks()
    else:
        _sanity_checks()
    assert not inherited_environment().keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
