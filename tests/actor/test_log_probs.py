"""Log-probs and entropy in blocks of the vocabulary against torch's log_softmax of all logits in float64: values, and
the gradients of hidden states and output layer."""

import sys
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dsrl.actor.log_probs import LogProbOptions, VocabularyShard, log_probs_and_entropy
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.output_rows import FactoredLogits
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.support.distributed import run_distributed

TOKENS, HIDDEN, VOCAB, PADDED = 37, 24, 50, 56
WHOLE = LogProbOptions(VocabularyShard(first=0, num_valid=VOCAB, group=None), temperature=0.7, entropy_gradient=True)
TEN_COLUMNS = 4 * TOKENS * 10
"""Block size; the last block is smaller."""


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight of the padded output layer, targets, and the gradients [2, tokens] that come back for
    log-probs and entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(2, TOKENS, generator=generator)


def in_blocks(options: LogProbOptions, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probs, entropy, and the gradients of hidden states and weight."""
    hidden, weight, targets, upstream = inputs(dtype)
    values = log_probs_and_entropy(FactoredLogits(hidden, weight, fused_gradient=False), targets, options)
    assert values[1].requires_grad == options.entropy_gradient
    total = sum((x * g).sum() for x, g in zip(values, upstream) if x.requires_grad)
    return [*(x.detach() for x in values), *torch.autograd.grad(total, [hidden, weight])]


def naive(options: LogProbOptions, vocab: int = VOCAB) -> list[Tensor]:
    """The same from all logits, in float64."""
    hidden, weight, targets, upstream = inputs()
    logits = hidden.double() @ weight[:vocab].double().t()
    targets = targets.clamp(max=vocab - 1)
    distribution = torch.log_softmax(logits / options.temperature, dim=-1)
    values = [distribution.gather(1, targets[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)]
    total = (values[0] * upstream[0]).sum() + (values[1] * upstream[1]).sum() * options.entropy_gradient
    return [*(x.detach() for x in values), *torch.autograd.grad(total, [hidden, weight])]


def assert_close(actual: list[Any], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours).double(), theirs.double(), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block_bytes", [1, TEN_COLUMNS, 1 << 20], ids=["columns", "blocks", "one block"])
def test_values_and_gradients_equal_the_naive_computation(block_bytes, temperature, entropy_gradient) -> None:
    options = replace(WHOLE, temperature=temperature, entropy_gradient=entropy_gradient, block_bytes=block_bytes)
    result = in_blocks(options)
    assert_close(result, naive(options))
    assert result[-1][VOCAB:].abs().max() == 0, "padded columns must not be trained"


@pytest.mark.parametrize("kept_bytes", [TEN_COLUMNS, 10 * TEN_COLUMNS], ids=["one block", "all"])
def test_keeping_logits_changes_nothing(kept_bytes) -> None:
    """Bit for bit: a block is computed again as it was."""
    options = replace(WHOLE, block_bytes=TEN_COLUMNS)
    for again, kept in zip(in_blocks(options), in_blocks(replace(options, kept_bytes=kept_bytes))):
        assert torch.equal(again, kept)


def test_blocks_lose_no_precision_in_bfloat16() -> None:
    """Gradients are summed over blocks in float32: no farther from the exact ones than with all logits at once."""
    in_one, in_several = (in_blocks(replace(WHOLE, block_bytes=size), torch.bfloat16) for size in (2**20, TEN_COLUMNS))
    for blocks, at_once, exact in zip(in_several, in_one, naive(WHOLE)):
        assert (blocks.double() - exact).norm() < 1.2 * (at_once.double() - exact).norm() + 1e-6


def half_a_vocabulary(vocab: int) -> list[list]:
    """This rank's log-probs, entropy, and gradients of hidden states and of its half of the output layer."""
    parallel = ParallelConfig(tensor_parallel_size=2, collective_timeout_seconds=60)
    with parallel_layout(parallel, seed=1):
        width = PADDED // 2
        shard = VocabularyShard.for_this_rank(width, vocab)
        options = replace(WHOLE, shard=shard, block_bytes=TEN_COLUMNS)
        hidden, weight, targets, upstream = inputs()
        mine = weight[shard.first : shard.first + width].detach().requires_grad_()
        logits = FactoredLogits(hidden, mine, fused_gradient=False)
        values = log_probs_and_entropy(logits, targets.clamp(max=vocab - 1), options)
        (torch.stack(values) * upstream).sum().backward()
        result = [x.tolist() for x in (*values, hidden.grad, mine.grad)]
    destroy_parallel()
    return result


@pytest.mark.parametrize("vocab", [VOCAB, 20], ids=["padding in the second half", "a half of nothing but padding"])
def test_two_halves_of_the_vocabulary_are_the_whole(vocab) -> None:
    expected = naive(WHOLE, vocab)
    first, second = run_distributed(half_a_vocabulary, 2, vocab)
    hidden = torch.tensor(first[2]) + torch.tensor(second[2])  # as the output layer's all-reduce does
    for log_probs, entropy, _, _ in (first, second):
        assert_close([log_probs, entropy, hidden, first[3] + second[3]], expected)


def peak_bytes(num_tokens: int, kept_bytes: int) -> int:
    """Peak of what is allocated forward and backward, above the inputs."""
    hidden, weight = torch.randn(num_tokens, 4, requires_grad=True), torch.randn(8192, 4, requires_grad=True)
    targets, shard = torch.zeros(num_tokens, dtype=torch.int64), VocabularyShard(0, 8192, None)
    with torch.profiler.profile(profile_memory=True) as profile:
        options = LogProbOptions(shard, kept_bytes=kept_bytes, block_bytes=2**20)
        log_probs, _ = log_probs_and_entropy(FactoredLogits(hidden, weight, False), targets, options)
        log_probs.sum().backward()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes))


def test_memory_does_not_grow_with_the_logits() -> None:
    """256 tokens have 8 MB of logits, 2,048 have 64 MB."""
    few, many = peak_bytes(256, kept_bytes=0), peak_bytes(2048, kept_bytes=0)
    assert many < 1.3 * few < 6 * 2**20
    kept = 16 * 2**20
    assert kept < peak_bytes(2048, kept) < kept + 1.1 * many


def test_with_gradient_accumulation_fusion_the_weights_gradient_is_added_to_the_main_gradient(monkeypatch) -> None:
    """Apex's kernel, which needs CUDA, is replaced by what it computes."""

    def accumulate_gradient(hidden: Tensor, grad_logits: Tensor, main_grad: Tensor) -> None:
        main_grad += grad_logits.t() @ hidden

    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate_gradient)
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", kernels)
    options = replace(WHOLE, block_bytes=TEN_COLUMNS)
    hidden, weight, targets, upstream = inputs()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(PADDED, HIDDEN), False
    values = log_probs_and_entropy(FactoredLogits(hidden, weight, fused_gradient=True), targets, options)
    (torch.stack(values) * upstream).sum().backward()
    assert_close([*(x.detach() for x in values), hidden.grad, weight.main_grad - 1], naive(options))
    assert weight.grad_added_to_main_grad and weight.grad.abs().max() == 0, "or it would be added twice"


def test_nothing_of_the_entropy_is_kept_unless_its_gradient_is_asked_for() -> None:
    kept = []
    for entropy_gradient in (False, True):
        hidden, weight, targets, _ = inputs()
        options = replace(WHOLE, entropy_gradient=entropy_gradient)
        log_probs, _ = log_probs_and_entropy(FactoredLogits(hidden, weight, False), targets, options)
        kept.append([x.shape for x in log_probs.grad_fn.saved_tensors if x is not None])
    assert kept[1] == [*kept[0], torch.Size([TOKENS])]


def test_no_tokens_give_no_values_and_a_gradient_of_zero() -> None:
    hidden, weight, targets, _ = inputs()
    none = FactoredLogits(hidden[:0], weight, fused_gradient=False)
    log_probs, entropy = log_probs_and_entropy(none, targets[:0], replace(WHOLE, kept_bytes=1))
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert weight.grad.abs().max() == 0 and hidden.grad.abs().max() == 0
