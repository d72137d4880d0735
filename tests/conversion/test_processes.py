"""Conversion by several processes, and resharding on load: written at one layout, read at another, the same model.

Two real gloo processes go through all families and layouts at once, four through TP2 x PP2; the tests look at parts of
what they measured.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.conversion.convert import ConversionOptions, convert_hf_to_megatron, convert_megatron_to_hf
from megatron_dsrl.conversion.distributed_checkpoint_writer import CheckpointLayout
from megatron_dsrl.conversion.work import conversion_processes
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint
from megatron_dsrl.weights.load import bind, load_weights
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import weight_table
from tests.support.distributed import run_distributed
from tests.support.families import FAMILIES

VOCAB_SIZE = 101  # odd: the vocabulary is padded at a tensor-parallel size of 2
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP2 = {"expert_parallel_size": 2}
TP2_WITH_EXPERTS = TP2 | {"sequence_parallel": True}
WRITE_AND_READ = {  # layout that the checkpoint is written for -> layouts that load it
    "dense": [(TP2, [TP2, PP2]), (PP2, [{}])],
    "MoE": [(TP2, [PP2, EP2]), (EP2, [TP2_WITH_EXPERTS, TP2_WITH_EXPERTS | EP2 | {"expert_tensor_parallel_size": 1}])],
}
CASES = [
    (family, tuple(written.items()), tuple(read.items()))
    for family in FAMILIES
    for written, readers in WRITE_AND_READ["MoE" if family == "Qwen3-MoE" else "dense"]
    for read in readers
]
FOUR_PROCESSES = {
    "Qwen3 untied": (TP2 | PP2, TP2 | PP2),
    "Qwen3-MoE": (TP2 | PP2, EP2 | PP2),
}


def rows() -> Tensor:
    """Token ids [2, 24]."""
    return torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, and their logits by Transformers."""
    folder = tmp_path_factory.mktemp("processes")
    for family, make in FAMILIES.items():
        model = make(folder / family, vocab_size=VOCAB_SIZE, max_shard_size="200KB")
        with torch.no_grad():
            torch.save(model(rows()).logits, folder / f"{family}.pt")
    return folder


@pytest.fixture(scope="module")
def measured(folder) -> list[dict]:
    """Results of both processes by case, and under "refusal" their messages."""
    return run_distributed(measure_two_processes, 2, folder, timeout_seconds=200)


# ---- what runs in the processes


def measure_two_processes(folder: Path) -> dict:
    with conversion_processes():
        results = {case: measure(folder, folder / f"two {i}", *case) for i, case in enumerate(CASES)}
        convert_megatron_to_hf(folder / "two 0", folder / "back", 100_000, ConversionOptions(verify=True))
        results["virtual stages"] = loads_into_virtual_stages(folder, folder / "two virtual")
        results["refusal"] = refused_by_one_process(folder)
        destroy_parallel()
    return results


def measure_four_processes(folder: Path) -> dict:
    with conversion_processes():
        results = {
            family: measure(folder, folder / f"four {family}", family, tuple(written.items()), tuple(read.items()))
            for family, (written, read) in FOUR_PROCESSES.items()
        }
        destroy_parallel()
    return results


def measure(folder: Path, target: Path, family: str, written: tuple, read: tuple) -> dict:
    """Write the checkpoint for one layout, load it at another, and look at what came in."""
    convert_hf_to_megatron(str(folder / family), target, CheckpointLayout(**dict(written)), ConversionOptions())
    parallel = ParallelConfig(collective_timeout_seconds=60, **dict(read))
    with parallel_layout(parallel, seed=1):
        architecture = read_architecture(target)
        table = weight_table(architecture)
        chunks = build_model(architecture, ModelConfig(path=str(target), dtype="float32"), parallel)
        load_weights(chunks, table, target)
        streamed = dict(pair for bucket in stream_hf_weights(chunks, table, 40_000, torch.float32) for pair in bucket)
        expected = {name: x for path in (folder / family).glob("*.safetensors") for name, x in load_file(path).items()}
        return {
            "bit_identical": streamed.keys() == expected.keys()
            and all(torch.equal(streamed[name], tensor) for name, tensor in expected.items()),
            "logits_error": logits_error(chunks, torch.load(folder / f"{family}.pt")),
            "files": sorted(path.name for path in target.glob("*.distcp")),
        }


def loads_into_virtual_stages(folder: Path, target: Path) -> dict[str, bool]:
    """For every HF tensor in this process's two chunks, whether it equals the source's."""
    layout = CheckpointLayout(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)
    convert_hf_to_megatron(str(folder / "Qwen3 untied"), target, layout, ConversionOptions())
    parallel = ParallelConfig(collective_timeout_seconds=60, virtual_pipeline_stages=2, **PP2)
    with parallel_layout(parallel, seed=1):
        architecture = read_architecture(target)
        table = weight_table(architecture)
        model = ModelConfig(path=str(target), dtype="float32")
        chunks = build_model(architecture, model, parallel)
        load_weights(chunks, table, target)
        source = HfCheckpoint(folder / "Qwen3 untied")
        return {
            tensor.name: torch.equal(value, source.read(tensor.name))
            for entry, parameters in bind(chunks, table).items()
            for tensor, value in zip(entry.hf, entry.rule.layout.merge(parameters))
        }


def refused_by_one_process(folder: Path) -> str:
    """A file is damaged in the middle of the conversion, where only the process that reads it notices."""
    read = HfCheckpoint.read

    def fail_on_second_process(self: HfCheckpoint, name: str, memory: ReusedMemory) -> Tensor:
        if dist.get_rank() == 1:
            raise UserError("the disk was taken out")
        return read(self, name, memory)

    HfCheckpoint.read = fail_on_second_process
    try:
        convert_hf_to_megatron(str(folder / "Qwen2.5"), folder / "bad", CheckpointLayout(), ConversionOptions())
    except UserError as error:
        return str(error)
    finally:
        HfCheckpoint.read = read
    return ""


@torch.no_grad()
def logits_error(chunks: list[nn.Module], expected: Tensor) -> float | None:
    """Largest difference on the last pipeline stage; None on others."""
    outputs: list[Tensor] = []

    def keep(output: Tensor, non_loss_data: bool = False) -> Tensor:
        outputs.append(output)
        return output

    def forward_step(batches: Iterator[Tensor], model: nn.Module) -> tuple:
        return model(next(batches), None, None), keep

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([rows()]),
        model=chunks,
        num_microbatches=1,
        seq_length=rows().shape[1],
        micro_batch_size=rows().shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(outputs[0]) for _ in range(group.size())]
    dist.all_gather(parts, outputs[0].contiguous(), group=group)
    return (torch.cat(parts, -1)[..., :VOCAB_SIZE] - expected).abs().max().item()


# ---- what is expected of them


def described(case: tuple) -> str:
    family, written, read = case
    return f"{family}: {dict(written)} to {dict(read)}"


@pytest.mark.parametrize("case", CASES, ids=described)
def test_a_checkpoint_loads_at_another_layout(measured, case) -> None:
    results = [rank[case] for rank in measured]
    assert all(result["bit_identical"] for result in results)
    errors = [result["logits_error"] for result in results if result["logits_error"] is not None]
    assert errors and max(errors) <= 1e-5


def test_a_checkpoint_loads_into_virtual_pipeline_stages(measured) -> None:
    """Two chunks of one layer each on each of two stages: the first stage has layers 0 and 2, the second 1 and 3."""
    first, second = (rank["virtual stages"] for rank in measured)
    layers = [{int(name.split(".")[2]) for name in part if name.startswith("model.layers")} for part in (first, second)]
    assert layers == [{0, 2}, {1, 3}]
    assert all(first.values()) and all(second.values()) and len(first) + len(second) == 47


def test_both_processes_write_their_share(measured, folder) -> None:
    assert measured[0][CASES[0]]["files"] == ["__0_0.distcp", "__1_0.distcp"]
    sizes = [path.stat().st_size for path in (folder / "two 0").glob("*.distcp")]
    assert max(sizes) < 1.3 * min(sizes)


def test_both_processes_write_one_hf_folder(measured, folder) -> None:
    back = {name: x for path in (folder / "back").glob("*.safetensors") for name, x in load_file(path).items()}
    source = folder / CASES[0][0]
    expected = {name: x for path in source.glob("*.safetensors") for name, x in load_file(path).items()}
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in expected)


def test_what_one_process_meets_all_of_them_report_and_nothing_is_left(measured, folder) -> None:
    assert [rank["refusal"] for rank in measured] == ["the disk was taken out"] * 2
    assert not (folder / "bad").exists() and not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_four_processes(folder) -> None:
    """Tensor and pipeline parallelism together, and experts over pipeline stages."""
    measured = run_distributed(measure_four_processes, 4, folder, timeout_seconds=200)
    for family in FOUR_PROCESSES:
        results = [rank[family] for rank in measured]
        assert all(result["bit_identical"] and len(result["files"]) == 4 for result in results)
        errors = [result["logits_error"] for result in results if result["logits_error"] is not None]
        assert errors and max(errors) <= 1e-5
