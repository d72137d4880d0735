"""Planned activations and logits against what real forward and backward passes keep, in the layouts of real runs."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_dsrl.actor.forward_backward import MicroBatch, run_schedule
from megatron_dsrl.actor.log_probs import LogProbOptions, VocabularyShard, log_probs_and_entropy
from megatron_dsrl.actor.packing import PackedRow, RowSplit, pack
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.output_rows import FactoredLogits
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.planning.memory import policy_memory
from tests.planning.test_memory import paper_run, write_model
from tests.support.distributed import run_distributed

LENGTH = 160
"""Tokens of a sequence; a row holds two, as attention makes padded batches of several only."""
LAYERS = 4
TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}
INTERLEAVED = PIPELINE | {"virtual_pipeline_stages": 2}
WHOLE_EXPERTS = {"expert_parallel_size": 2, "expert_tensor_parallel_size": 1}


@dataclass(frozen=True)
class Case:
    parallel: dict = field(default_factory=dict)
    recompute: str = "none"
    experts: bool = False
    micro_batches: int = 1
    vocabulary: int = 16


ONE_PROCESS = {f"{mode}, experts {experts}": Case({}, mode, experts) for mode in ("none", "selective", "full")
               for experts in (False, True)}  # fmt: skip
AS_IN_THE_PAPERS_RUN = {"TP 2 with sequence parallelism, selective": Case(TENSOR, "selective")}
OTHER_LAYOUTS = {
    "TP 2 with sequence parallelism": Case(TENSOR),
    "TP 2 with sequence parallelism, full": Case(TENSOR, "full"),
    "TP 2": Case({"tensor_parallel_size": 2}),
    "MoE: TP 2 with sequence parallelism, experts split": Case(TENSOR, experts=True),
    "MoE: TP 2 with sequence parallelism, whole experts": Case(TENSOR | WHOLE_EXPERTS, "selective", experts=True),
    "CP 2": Case({"context_parallel_size": 2}),
    "CP 2, selective": Case({"context_parallel_size": 2}, "selective"),
    "PP 2": Case(PIPELINE, micro_batches=4),
    "PP 2, full": Case(PIPELINE, "full", micro_batches=4),
    "PP 2 x 2 virtual stages": Case(INTERLEAVED, micro_batches=4),
    "PP 2 x 2 virtual stages, selective": Case(INTERLEAVED, "selective", micro_batches=4),
}


class SavedTensors:
    """Bytes of the storages that autograd holds for the backward pass, each counted once, without parameters."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters = parameters
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "Held":
        return Held(self, tensor.detach())


class Held:
    """A saved tensor, for as long as its node of the graph lives."""

    def __init__(self, saved: SavedTensors, tensor: torch.Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        storage = tensor.untyped_storage()
        self.pointer, self.size = storage.data_ptr(), storage.nbytes()
        self._hold(+1)

    def __del__(self) -> None:
        self._hold(-1)

    def _hold(self, change: int) -> None:
        saved = self.saved
        if self.pointer in saved.parameters:
            return
        before = saved.holders[self.pointer]
        saved.holders[self.pointer] += change
        if 0 in (before, before + change):
            saved.now += change * self.size
            saved.peak = max(saved.peak, saved.now)


def configuration(case: Case, *overrides: str) -> RunConfig:
    """The paper's run, with rows of two short sequences."""
    settings = ["model.dtype=float32", f"model.recompute={case.recompute}", "data.max_prompt_tokens=8"]
    settings += ["rollout.max_response_tokens=8", "engine.max_context_tokens=null"]
    config = paper_run(*settings, f"actor.max_tokens_per_micro_batch={2 * LENGTH}", *overrides)
    return config.model_copy(update={"parallel": ParallelConfig(**case.parallel)})


def build_case(folder: Path, case: Case) -> tuple[list[torch.nn.Module], PackedRow]:
    model = ModelConfig(path="", dtype="float32", recompute=case.recompute)
    architecture = write_model(folder, LAYERS, case.experts, case.vocabulary)
    chunks = build_model(architecture, model, ParallelConfig(**case.parallel))
    for chunk in chunks:
        for parameter in chunk.train().parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    split = RowSplit(
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    tokens = tuple(token % 16 for token in range(LENGTH))
    return chunks, pack([ScoredSequence(tokens, 1)] * 2, [0, 1], split, torch.device("cpu"))


def sum_of_logits(logits: FactoredLogits) -> tuple[torch.Tensor, None]:
    return (logits.hidden @ logits.weight.t()).sum(), None


def saved_and_planned(folder: Path, cases: Mapping[str, Case]) -> dict[str, tuple[int, int]]:
    """Bytes in this process: the most that autograd held during all micro-batches, and what the plan counts."""
    folder = folder / os.environ["RANK"]
    world_size = int(os.environ["WORLD_SIZE"])
    results = {}
    for name, case in cases.items():
        with parallel_layout(ParallelConfig(**case.parallel), seed=1):
            chunks, row = build_case(folder, case)
            saved = SavedTensors({p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()})
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
                run_schedule(chunks, [MicroBatch(row, sum_of_logits)] * case.micro_batches)
            assert saved.now == 0, "the backward passes let go of everything"
            stage = parallel_state.get_pipeline_model_parallel_rank()
            architecture = write_model(folder, LAYERS, case.experts, case.vocabulary)
            memory = policy_memory(configuration(case), architecture, world_size, stage)
            results[name] = (saved.peak, memory.passing)
    destroy_parallel()
    return results


def logits_allocated_and_planned(folder: Path, vocabulary: int, kept_megabytes: int) -> tuple[int, int]:
    """Bytes in this process for logits, log-probs and entropy, forward and backward: the peak, and what the plan
    counts."""
    case = Case(TENSOR, vocabulary=vocabulary)
    config = configuration(case, f"actor.kept_logits_megabytes={kept_megabytes}")
    with parallel_layout(ParallelConfig(**case.parallel), seed=1):
        architecture = write_model(folder / os.environ["RANK"], LAYERS, case.experts, vocabulary)
        shard, kept_bytes = VocabularyShard.for_this_rank(vocabulary // 2, vocabulary), kept_megabytes * 2**20
        options = LogProbOptions(shard, entropy_gradient=True, kept_bytes=kept_bytes)
        hidden, weight = torch.randn(2 * LENGTH, 256, requires_grad=True), torch.randn(vocabulary // 2, 256)
        with torch.profiler.profile(profile_memory=True) as profile:
            targets = torch.arange(2 * LENGTH)
            logits = FactoredLogits(hidden, weight, fused_gradient=False)
            log_probs, entropy = log_probs_and_entropy(logits, targets, options)
            (log_probs + entropy).sum().backward()
        memory = policy_memory(config, architecture, 2, stage=0)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes)), memory.logits


def in_the_papers_layout(folder: Path) -> tuple[dict[str, tuple[int, int]], list[tuple[int, int]]]:
    logits = [logits_allocated_and_planned(folder, 2**17, kept_megabytes) for kept_megabytes in (1024, 40, 0)]
    return saved_and_planned(folder, AS_IN_THE_PAPERS_RUN), logits


def test_activations_on_one_process_are_what_autograd_keeps(tmp_path) -> None:
    """Within 1 %: softmax statistics, indices of padded batches and the router's small tensors are not counted."""
    (results,) = run_distributed(saved_and_planned, 1, tmp_path, ONE_PROCESS)
    for name, (saved, planned) in results.items():
        assert saved == pytest.approx(planned, rel=0.01), name


def test_activations_and_logits_in_the_layout_of_the_papers_run(tmp_path) -> None:
    """Tensor and sequence parallelism with selective recomputation, on two processes: within 1 %."""
    for results, logits in run_distributed(in_the_papers_layout, 2, tmp_path):
        for name, (saved, planned) in results.items():
            assert saved == pytest.approx(planned, rel=0.01), name
        for allocated, planned in logits:
            assert allocated == pytest.approx(planned, rel=0.02)


@pytest.mark.slow
def test_activations_in_other_layouts(tmp_path) -> None:
    """Within 2 % too, the micro-batches under way of each pipeline stage included; 5 % where a process has whole
    experts: the plan assumes that all get equally many tokens."""
    for rank, results in enumerate(run_distributed(saved_and_planned, 2, tmp_path, OTHER_LAYOUTS, timeout_seconds=300)):
        for name, (saved, planned) in results.items():
            rel = 0.05 if "whole experts" in name else 0.02
            assert saved == pytest.approx(planned, rel=rel), (name, rank)
