"""Gradient comparisons of the Megatron model against plain autograd on Transformers, in one process and split over two.

Float32. Inner products cover every parameter once, so they must be those of the whole model in every layout.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_dsrl.actor.sharded_model import ShardedModel
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain, ScoredSequence
from megatron_dsrl.analysis.gradients import LogProbGradients
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model, build_trainable
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.weights.load import load_weights
from megatron_dsrl.weights.table import weight_table
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3, make_tiny_qwen3_moe

TEMPERATURE = 0.8
BOS = (3,)
TOLERANCE = 1e-4
"""Relative."""
PROMPT = (5, 17, 90, 41, 126, 8, 33)
RESPONSES = ((12, 60, 7, 7, 101, 45, 2), (99, 3, 54, 18, 18, 120, 77, 64, 31, 9, 10, 2, 88))
ONE = {"one process": ("dense", {}), "MoE, one process": ("MoE", {})}
TWO = {
    "TP 2": ("dense", {"tensor_parallel_size": 2}),
    "TP 2, sequence parallel": ("dense", {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "PP 2": ("dense", {"pipeline_parallel_size": 2}),
    "PP 2 x 2 virtual stages": ("dense", {"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2}),
    "CP 2": ("dense", {"context_parallel_size": 2}),
    "MoE, TP 2, sequence parallel": ("MoE", {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "MoE, EP 2": ("MoE", {"expert_parallel_size": 2}),
}


@dataclass(frozen=True)
class Expected:
    """Expected gradients of one response; arrays, since tensors do not outlive the process that sends them."""

    numbers: np.ndarray
    """[3] float64: inner product, norm without the prompt, norm with it."""
    log_probs: np.ndarray
    """[2, tokens]: without the prompt, with it."""
    entropy: np.ndarray
    """[2, tokens]."""


def compare_responses(folder: Path, cases: dict) -> dict[str, list[Expected]]:
    """What the Megatron model says of every response, in every layout of the cases."""
    results = {}
    for name, (model, layout) in cases.items():
        parallel = ParallelConfig(collective_timeout_seconds=60, **layout)
        with parallel_layout(parallel, seed=1):
            architecture = read_architecture(folder / model)
            chunks = build_model(architecture, ModelConfig(path=str(folder / model), dtype="float32"), parallel)
            load_weights(chunks, weight_table(architecture), folder / model)
            sharded = ShardedModel(build_trainable(chunks, parallel), max_tokens_per_micro_batch=1)
            gradients = LogProbGradients(sharded, architecture.vocab_size, TEMPERATURE)
            results[name] = [compare(gradients, response) for response in RESPONSES]
    destroy_parallel()
    return results


def compare(gradients: LogProbGradients, response: tuple[int, ...]) -> Expected:
    found = gradients.compare(PreTrain().sequence((), response, BOS), PostTrain().sequence(PROMPT, response))
    both = (found.without_prompt, found.with_prompt)
    numbers = [found.inner_product, found.norm_without_prompt, found.norm_with_prompt]
    return Expected(
        np.array(numbers),
        np.stack([scores.log_probs for scores in both]),
        np.stack([scores.entropy for scores in both]),
    )


def by_autograd(model: PreTrainedModel, response: tuple[int, ...]) -> Expected:
    sequences = (PreTrain().sequence((), response, BOS), PostTrain().sequence(PROMPT, response))
    (first, *of_first), (second, *of_second) = (gradient_of(model, sequence) for sequence in sequences)
    numbers = torch.stack([first @ second, first.norm(), second.norm()])
    return Expected(numbers.numpy(), *(np.stack(pair) for pair in zip(of_first, of_second)))


def gradient_of(model: PreTrainedModel, sequence: ScoredSequence) -> tuple[Tensor, Tensor, Tensor]:
    """The whole gradient as one vector in fp64, log-probs, and entropy."""
    token_ids = torch.tensor([sequence.token_ids])
    logits = model(token_ids).logits[0, sequence.num_context - 1 : -1] / TEMPERATURE
    distribution = logits.log_softmax(-1)
    log_probs = distribution.gather(1, token_ids[0, sequence.num_context :, None])[:, 0]
    parameters: list[nn.Parameter] = list(model.parameters())  # tied ones once
    gradients = torch.autograd.grad(log_probs.sum(), parameters)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return torch.cat([g.flatten().double() for g in gradients]), log_probs.detach(), entropy.detach()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, dict[str, list[Expected]]]:
    """Folder of the models, and what autograd says of each."""
    folder = tmp_path_factory.mktemp("models")
    # 127 tokens: the vocabulary is padded under tensor parallelism, and the padding must not count
    dense = make_tiny_qwen3(folder / "dense", tied=True, vocab_size=127)
    moe = make_tiny_qwen3_moe(folder / "MoE", vocab_size=127)
    return folder, {
        name: [by_autograd(model, response) for response in RESPONSES]
        for name, model in (("dense", dense), ("MoE", moe))
    }


@pytest.fixture(scope="module")
def found(models) -> list[dict[str, list[Expected]]]:
    """Per rank, what every layout gave; those of one process are computed here."""
    one = compare_responses(models[0], ONE)
    two = run_distributed(compare_responses, 2, models[0], TWO, timeout_seconds=240)
    return [one | of_rank for of_rank in two]


@pytest.mark.parametrize("case", [*ONE, *TWO])
def test_a_layout_gives_what_autograd_gives(models, found, case) -> None:
    model = (ONE | TWO)[case][0]
    for rank in found:
        for result, expected in zip(rank[case], models[1][model], strict=True):
            np.testing.assert_allclose(result.numbers, expected.numbers, rtol=TOLERANCE)
            np.testing.assert_allclose(result.log_probs, expected.log_probs, rtol=TOLERANCE)
            np.testing.assert_allclose(result.entropy, expected.entropy, rtol=TOLERANCE)


def test_the_two_gradients_differ_and_the_prompt_matters(models) -> None:
    """So that a comparison of a gradient with itself would be noticed."""
    for expected in models[1]["dense"]:
        inner_product, norm_without, norm_with = expected.numbers.tolist()
        assert abs(inner_product) < 0.9 * norm_without * norm_with
        assert np.abs(expected.log_probs[0] - expected.log_probs[1]).max() > 0.1
