"""The model sharded over two real gloo processes: it is Transformers' model, and its weights go in and come out
unchanged.

One pair of processes goes through all layouts; each test below looks at a part of what it measured. Gradients are
compared by putting them in the parameters' place and streaming them out under their HF names.
"""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model, build_trainable
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.weights.export import export_hf_folder
from megatron_dsrl.weights.load import fill_with_random_weights, load_hf_weights
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import WeightTable, weight_table
from tests.support.disk import files_of_at_most
from tests.support.distributed import run_distributed
from tests.support.packed import packed
from tests.support.tiny_model import YARN, make_tiny_qwen3

VOCAB_SIZE = 101  # odd: the vocabulary is padded at a tensor-parallel size of 2
LAYOUTS = {
    "TP2": {"tensor_parallel_size": 2},
    "TP2+SP": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel_size": 2},
    "PP2-uneven": {"pipeline_parallel_size": 2, "layers_in_first_stage": 1},
    "DP2": {},
}
EXTENDED = {**YARN, "factor": 64.0, "original_max_position_embeddings": 8}
"""Most sequences are longer than the original context."""
MODELS = {"tied": {"tied": True}, "untied": {"tied": False}, "YaRN": {"tied": True, "rope": EXTENDED}}
CASES = [f"{layout} {model}" for layout, model in product(LAYOUTS, MODELS) if model != "YaRN" or layout == "TP2+SP"]
MICRO_BATCHES = [[13, 24, 11, 12], [7, 20, 9]]
"""Lengths of the sequences of two packed micro-batches."""


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (1, sum(lengths)), generator=generator) for lengths in MICRO_BATCHES]


# ---- what Transformers computes, in the test's own process


def reference(model: nn.Module, padded_vocab_size: int) -> dict:
    """Logits of every micro-batch, and gradients of the mean cross-entropy of every token predicting itself."""
    model.zero_grad()
    logits, losses = [], []
    for row, lengths in zip(rows(), MICRO_BATCHES):
        logits.append(torch.cat([model(sequence).logits[0] for sequence in row.split(lengths, 1)]))
        # Megatron's padded vocabulary rows are zero and take part in its cross-entropy.
        padded = F.pad(logits[-1], (0, padded_vocab_size - VOCAB_SIZE))
        losses.append(F.cross_entropy(padded, row[0], reduction="none"))
    torch.cat(losses).mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": [x.detach() for x in logits], "gradients": gradients}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def measured(folder) -> dict[str, list[dict]]:
    """Results of both processes by case."""
    for name, options in MODELS.items():
        model = make_tiny_qwen3(folder / name, vocab_size=VOCAB_SIZE, **options)
        (folder / name / "tokenizer.json").write_text("{}")
        for padded_vocab_size in (101, 102):
            torch.save(reference(model, padded_vocab_size), folder / f"{name}-{padded_vocab_size}.pt")
    per_rank = run_distributed(measure_all_layouts, 2, folder, timeout_seconds=150)
    return {case: [rank[case] for rank in per_rank] for case in CASES}


# ---- what runs in the two processes


def measure_all_layouts(folder: Path) -> dict[str, dict]:
    results = {}
    for case in CASES:
        layout, name = case.split(" ")
        parallel = ParallelConfig(collective_timeout_seconds=60, **LAYOUTS[layout])
        with parallel_layout(parallel, seed=1):
            results[case] = measure(folder, name, parallel, folder / f"export {case}")
    destroy_parallel()
    return results


def measure(folder: Path, name: str, parallel: ParallelConfig, target: Path) -> dict:
    architecture = read_architecture(folder / name)
    table = weight_table(architecture)
    padded_vocab_size = architecture.padded_vocab_size(parallel.tensor_parallel_size)
    expected = torch.load(folder / f"{name}-{padded_vocab_size}.pt")
    source = load_file(folder / name / "model.safetensors")
    chunks = build_model(architecture, ModelConfig(path=str(folder / name), dtype="float32"), parallel)
    load_hf_weights(chunks, table, folder / name)

    buckets = list(stream_hf_weights(chunks, table, bucket_bytes=40_000, dtype=torch.float32))
    streamed = dict(pair for bucket in buckets for pair in bucket)
    full_disk = refusal(lambda: export_to_a_full_disk(chunks, table, folder / name, target))
    export_hf_folder(chunks, table, folder / name, target, torch.bfloat16, file_bytes=100_000)
    results = {
        "round_trip_exact": streamed.keys() == source.keys()
        and all(torch.equal(streamed[tensor], source[tensor]) for tensor in source),
        "order": list(streamed),
        "bucket_bytes": [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets],
        "logits_error": logits_error(chunks, expected["logits"]),
        "full_disk": full_disk,
        "second_export": refusal(lambda: export_hf_folder(chunks, table, folder / name, target, torch.bfloat16)),
    }

    chunks = build_trainable(chunks, parallel)
    backward(chunks)
    results["gradient_errors"] = gradient_errors(chunks, table, expected["gradients"])

    fill_with_random_weights(chunks, table, architecture.initializer_range, seed=7)
    drawn = dict(pair for bucket in stream_hf_weights(chunks, table, 10**9, torch.float32) for pair in bucket)
    results["random_digest"] = hashlib.sha256(b"".join(x.numpy().tobytes() for x in drawn.values())).hexdigest()
    results["random_deviation"] = drawn["model.layers.3.mlp.down_proj.weight"].std().item()
    return results


def logits_error(chunks: list[nn.Module], expected: list[Tensor]) -> float | None:
    """Largest difference on the last pipeline stage; None on others."""
    outputs: list[Tensor] = []

    def keep(output: Tensor, non_loss_data: bool = False) -> Tensor:
        outputs.append(output)
        return output

    def forward_step(batches: Iterator, model: nn.Module) -> tuple:
        row, params = next(batches)
        return model(row, None, None, packed_seq_params=params), keep

    with torch.no_grad():
        run_schedule(forward_step, chunks, forward_only=True, collect_non_loss_data=True)
    if not parallel_state.is_pipeline_last_stage():
        return None
    return max((gather(x)[0] - y).abs().max().item() for x, y in zip(outputs, expected, strict=True))


def backward(chunks: list[nn.Module]) -> None:
    """Gradients of the mean cross-entropy over all tokens, into `main_grad`."""

    def sum_of_losses(losses: Tensor) -> tuple:
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int32), {}

    def forward_step(batches: Iterator, model: nn.Module) -> tuple:
        row, params = next(batches)
        return model(row, None, None, labels=row, packed_seq_params=params), sum_of_losses

    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    chunks[0].zero_grad_buffer()
    run_schedule(forward_step, chunks, forward_only=False)


def run_schedule(forward_step, chunks: list[nn.Module], **arguments) -> None:
    """Both micro-batches through Megatron's schedule; data-parallel ranks repeat the same ones."""
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(list(zip(rows(), map(packed, MICRO_BATCHES)))),
        model=chunks,
        num_microbatches=len(MICRO_BATCHES),
        seq_length=max(map(sum, MICRO_BATCHES)),
        micro_batch_size=1,
        **arguments,
    )


def gather(logits: Tensor) -> Tensor:
    """[1, t, vocabulary] from the tensor-parallel parts."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, -1)[..., :VOCAB_SIZE]


def gradient_errors(chunks: list[nn.Module], table, expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each HF tensor's gradient, relative to its largest element."""
    for parameter in chunks[0].parameters():
        parameter.data.copy_(parameter.main_grad)
    streamed = dict(pair for bucket in stream_hf_weights(chunks, table, 10**9, torch.float32) for pair in bucket)
    return {
        name: ((streamed[name] - gradient).abs().max() / gradient.abs().max()).item()
        for name, gradient in expected.items()
    }


def export_to_a_full_disk(chunks: list, table: WeightTable, source: Path, target: Path) -> None:
    """The disk of rank 0, which is the one that writes."""
    with files_of_at_most(1000) if dist.get_rank() == 0 else nullcontext():
        export_hf_folder(chunks, table, source, target.with_name(f"{target.name} on a full disk"), torch.bfloat16)


def refusal(action) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


# ---- what is expected of them


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(measured, case) -> None:
    errors = [rank["logits_error"] for rank in measured[case] if rank["logits_error"] is not None]
    assert errors and max(errors) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_transformers(measured, case) -> None:
    for rank in measured[case]:
        assert len(rank["gradient_errors"]) == (47 if case.endswith(" untied") else 46)
        assert max(rank["gradient_errors"].values()) <= 1e-5, rank["gradient_errors"]


@pytest.mark.parametrize("case", CASES)
def test_weights_come_out_bit_identical_in_the_same_order_on_every_rank(measured, case) -> None:
    first, second = measured[case]
    assert first["round_trip_exact"] and second["round_trip_exact"]
    like = "DP2 untied" if case.endswith(" untied") else "DP2 tied"
    assert first["order"] == second["order"] == measured[like][0]["order"]


def test_buckets_keep_their_size_unless_one_entry_exceeds_it(measured) -> None:
    """Gate and up together are 65,536 bytes, and so is QKV; everything else fits 40,000."""
    sizes = measured["PP2 untied"][0]["bucket_bytes"]
    assert all(size <= 40_000 or size == 65_536 for size in sizes) and len(sizes) > 8


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_random_weights_do_not_depend_on_the_layout(measured, name) -> None:
    digests = {rank["random_digest"] for layout in LAYOUTS for rank in measured[f"{layout} {name}"]}
    assert len(digests) == 1
    assert measured[f"TP2 {name}"][0]["random_deviation"] == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_exported_folders_are_the_source_in_bfloat16(measured, folder, case) -> None:
    exported, source = folder / f"export {case}", folder / case.split(" ")[1]
    assert (exported / "tokenizer.json").read_text() == "{}"
    assert len(list(exported.glob("model-*.safetensors"))) > 2
    assert not list(folder.glob(".export*")), "no temporary folder is left"
    model = Qwen3ForCausalLM.from_pretrained(exported, dtype="auto")
    assert model.dtype == torch.bfloat16
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "model.safetensors").items()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_an_existing_target_is_refused_on_every_rank(measured, case) -> None:
    for rank in measured[case]:
        assert "already exists; remove it or choose another folder" in rank["second_export"]


def test_an_export_to_a_full_disk_fails_on_all_ranks(measured, folder) -> None:
    """Only rank 0 writes; the others take part in the stream to its end, and learn of it."""
    for case, (first, second) in measured.items():
        assert "could not be written (" in first["full_disk"] and first["full_disk"] == second["full_disk"], case
    assert list(folder.glob("* on a full disk")) == list(folder.glob(".*")) == []
