"""What the CUDA side relies on in SGLang, read from its source without importing it.

The installed release is the image's, so a new pin cannot change any of this unnoticed: `READ` has a digest of each
piece of source that the CUDA side was written against.
"""

import ast
import hashlib
import inspect
import io
import pickle
import pickletools
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_dsrl.config.engine_numerics import FP8_BLOCK
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.platform.cuda import WEIGHT_BROADCAST_VARIABLES
from megatron_dsrl.rollout.engines.flattened_bucket import BucketMemory, flatten
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from megatron_dsrl.rollout.engines.tensor_layout import FP8_CHECKPOINT, fp8_server_arguments
from megatron_dsrl.weights.fp8 import dequantise_blocks, quantise_blocks
from tests.support.tiny_run import REPOSITORY

SGLANG = Path(find_spec("sglang").submodule_search_locations[0], "srt")
SET_ENVIRONMENT = "entrypoints/engine.py:_set_envs_and_config"
RELEASE = "managers/scheduler_components/weight_updater.py:SchedulerWeightUpdaterManager.release_memory_occupation"
RESUME = "managers/scheduler_components/weight_updater.py:SchedulerWeightUpdaterManager.resume_memory_occupation"
UNPICKLER = "utils/common.py:SafeUnpickler"
SPECULATION = "engines/ngram_speculation.yaml"
READ = {
    SET_ENVIRONMENT: "bdd194bca472af6b",
    RELEASE: "20963e2e63a90ab3",
    RESUME: "84b451bcd6a34aab",
    UNPICKLER: "e21546a9440cb02e",
    "utils/patch_torch.py:_rebuild_cuda_tensor_modified": "6a7aab17c3d0ff47",
    "weight_sync/tensor_bucket.py:FlattenedTensorBucket": "d39e127d064bd479",
    "mem_cache/kv_cache_configurator.py:_profile_available_bytes": "b4514d2a80e9d4a3",
    "layers/quantization/fp8.py:Fp8LinearMethod.create_fp8_weight_": "2cc124fe6c5d5dff",
    "layers/quantization/fp8.py:Fp8LinearMethod.validate_block_quant_shapes": "43e3a10a28ccf1e2",
    "layers/quantization/fp8.py:Fp8LinearMethod.process_weights_after_loading_block_quant": "1b0d5b91d0fa853a",
    "models/qwen3_moe.py:Qwen3MoeSparseMoeBlock.__init__": "0502f097c8b096a9",
    "utils/weight_checker.py:WeightChecker._compute_checksum": "0587ebdaeb0c1daa",
    "utils/weight_checker.py:_build_quantized_set": "501f3e35ef4a80aa",
    "utils/weight_checker.py:_build_check_entries": "5b1cd5b04b76586a",
    "utils/weight_checker_comparator.py:Fp8BlockComparable": "7e77d092dd767ac5",
    "arg_groups/speculative_hook.py:_handle_ngram": "2431f92a0caed426",
    "utils/torch_memory_saver_adapter.py:_TorchMemorySaverAdapterReal": "ec96dc2332ec235a",
}
"""First digits of the SHA-256 of a function's or class's code, without comments and layout."""


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse((SGLANG / file).read_text())


def source(place: str) -> ast.AST:
    """The function or class `file:name`, or `file:class.name`."""
    file, _, names = place.partition(":")
    node: ast.AST = parsed(file)
    for name in names.split("."):
        (node,) = [child for child in ast.walk(node) if getattr(child, "name", None) == name]
    return node


def fields_in(tree: ast.AST) -> dict[str, ast.AnnAssign]:
    """Annotated fields of all classes in it, by name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {node.target.id: node for node in found if isinstance(node.target, ast.Name)}


def test_the_installed_release_is_the_images() -> None:
    pins = (REPOSITORY / "tools" / "image" / "requirements.lock").read_text().splitlines()
    assert f"sglang=={version('sglang')}" in pins


@pytest.mark.parametrize("place", READ)
def test_what_was_read_has_not_changed(place) -> None:
    digest = hashlib.sha256(ast.unparse(source(place)).encode()).hexdigest()[:16]
    assert digest == READ[place], f"{place} has changed: read it, adapt the CUDA side, and write down its new digest"


@pytest.fixture
def on_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_every_server_argument_on_cuda_is_a_field(on_cuda) -> None:
    config = load_config(REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml", ["rollout.deterministic=true"])
    arguments = server_arguments(config, engine=0)
    arguments |= fp8_server_arguments() | speculation().engine.extra_arguments
    assert arguments["enable_memory_saver"] and arguments["enable_deterministic_inference"]
    fields: dict[str, ast.AnnAssign] = {}
    for file in (SGLANG / "arg_groups" / "fields").glob("*.py"):
        fields |= fields_in(ast.parse(file.read_text()))
    assert arguments.keys() <= fields.keys()
    backends = ast.unparse(fields["cuda_graph_backend_prefill"].annotation)
    assert repr(arguments["cuda_graph_backend_prefill"]) in backends


def speculation() -> RunConfig:
    """A run with the shipped configuration of speculative decoding."""
    return load_config([REPOSITORY / "configs" / name for name in ("dsrl_qwen3_8b.yaml", SPECULATION)])


def test_trainer_and_external_engines_agree_on_nccls_settings() -> None:
    """SGLang sets these unless they are set, from flags that are off by default."""
    assigned = {}
    for node in ast.walk(source(SET_ENVIRONMENT)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("os.environ["):
            assigned[ast.literal_eval(node.targets[0].slice)] = node.value
    flags = {"enable_symm_mem": False, "enable_nccl_nvls": False}
    for name, ours in WEIGHT_BROADCAST_VARIABLES.items():
        names = {"cfg": SimpleNamespace(**flags), "kv_shard_symmetric_scratch": False}
        assert eval(ast.unparse(assigned[name]), names) == ours, name
    declared = fields_in(parsed("arg_groups/fields/exec_.py"))
    assert all(ast.literal_eval(declared[flag].value) is False for flag in flags)
    assert ast.literal_eval(assigned["CUDA_DEVICE_MAX_CONNECTIONS"]) == "8", "not the trainer's, which it inherits"


class CudaTensor:
    """Pickles as torch does a CUDA tensor of another process: a handle, and what is needed to rebuild it."""

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = dict.fromkeys(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
        arguments |= {
            "tensor_cls": torch.Tensor, "tensor_size": torch.Size([4]), "tensor_stride": (1,), "tensor_offset": 0,
            "storage_cls": torch.UntypedStorage, "dtype": torch.uint8, "storage_device": 0, "storage_handle": b"",
            "storage_size_bytes": 4, "storage_offset_bytes": 0, "requires_grad": False, "ref_counter_handle": b"",
            "ref_counter_offset": 0, "event_handle": b"", "event_sync_required": True,
        }  # fmt: skip
        return reductions.rebuild_cuda_tensor, tuple(arguments.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_a_bucket_on_cuda_can_be_unpickled(dtype: torch.dtype) -> None:
    """Every global of its pickle is on the list, and the device is where SGLang's patch of torch looks for it."""
    bucket = flatten([("weight", torch.zeros(3, dtype=dtype))], BucketMemory())
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=2).dump({**bucket, "flattened_tensor": CudaTensor()})
    operations = pickletools.genops(stream.getvalue())
    needed = {tuple(argument.split(" ")) for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert ("torch.multiprocessing.reductions", "rebuild_cuda_tensor") in needed and len(needed) > 4
    (allowed,) = [
        ast.literal_eval(node.value)
        for node in source(UNPICKLER).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ALLOWED_GLOBALS"
    ]
    assert {(module.replace("__builtin__", "builtins"), name) for module, name in needed} <= allowed
    (place,) = [
        ast.literal_eval(node.value)
        for node in parsed("utils/patch_torch.py").body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_REDUCE_TENSOR_ARG_DEVICE_INDEX"
    ]
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[place] == "storage_device"


def test_fp8_weights_have_the_names_types_and_shapes_that_are_pushed() -> None:
    """In layers of a checkpoint whose configuration is the one that the engine is given."""
    text = ast.unparse(source("layers/quantization/fp8.py:Fp8LinearMethod.create_fp8_weight_"))
    assert "torch.float8_e4m3fn if is_checkpoint_fp8_serialized" in text
    assert "layer.register_parameter('weight_scale_inv', scale)" in text
    assert "(output_size_per_partition + block_n - 1) // block_n" in text
    assert "scale_dtype = torch.uint8 if use_mxfp8 else torch.float32" in text
    read = ast.unparse(source("layers/quantization/fp8.py:Fp8Config.from_config"))
    for name in FP8_CHECKPOINT.keys() - {"fmt"}:
        assert f"'{name}'" in read, name
    override = ast.unparse(source("utils/hf_transformers/config.py:get_config"))
    assert "for key, value in model_override_args.items()" in override


def test_a_quantised_weights_digest_is_taken_of_the_same_matrix_as_here() -> None:
    names = {"torch": torch, "List": list}
    exec(ast.unparse(source("layers/quantization/fp8_utils.py:block_quant_dequant")), names)
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    values, scales = quantise_blocks(weight)
    theirs = names["block_quant_dequant"](values, scales, [FP8_BLOCK, FP8_BLOCK], torch.bfloat16)
    assert torch.equal(dequantise_blocks(values, scales), theirs)
    comparable = source("utils/weight_checker_comparator.py:ComparableWeight.dequantize")
    assert "dtype: torch.dtype=torch.bfloat16" in ast.unparse(comparable)


def test_speculation_with_ngrams_gives_log_probs_of_the_target() -> None:
    worker = ast.unparse(parsed("speculative/ngram_worker.py"))
    assert "if batch.return_logprob" in worker and "compute_spec_logprobs(" in worker
    assert "'cpu'" in ast.unparse(source("arg_groups/speculative_hook.py:_handle_ngram"))


def test_memory_is_released_by_these_names_and_only_from_an_idle_engine() -> None:
    names = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in parsed("constants.py").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert {names["GPU_MEMORY_TYPE_KV_CACHE"], names["GPU_MEMORY_TYPE_WEIGHTS"]} == {"kv_cache", "weights"}
    for request in ("ReleaseMemoryOccupationReqInput", "ResumeMemoryOccupationReqInput"):
        assert "tags" in fields_in(source(f"managers/io_struct.py:{request}"))
    first = next(node for node in source(RELEASE).body if isinstance(node, ast.Assert))
    assert "is_fully_idle" in ast.unparse(first.test)
