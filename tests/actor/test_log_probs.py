"""Vocab-parallel log-probs and entropy against torch's log_softmax in float64, values and gradients of both."""

import pytest
import torch
from torch import Tensor

from megatron_dsrl.actor import log_probs as module
from megatron_dsrl.actor.log_probs import VocabularyShard, log_probs_and_entropy
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.support.distributed import run_distributed

TOKENS, VOCAB, PADDED = 37, 50, 56
WHOLE = VocabularyShard(first=0, num_valid=VOCAB, group=None)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [tokens, padded vocabulary], targets, and the gradients that come back for log-probs and entropy."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(TOKENS, PADDED, generator=generator)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return logits, targets, *torch.randn(2, TOKENS, generator=generator)


def naive(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    distribution = torch.log_softmax(logits[:, :VOCAB].double() / temperature, dim=-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution.gather(1, targets[:, None])[:, 0], entropy


def expected(temperature: float, entropy_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy, and the gradient by the logits."""
    logits, targets, of_log_probs, of_entropy = inputs()
    logits.requires_grad_()
    log_probs, entropy = naive(logits, targets, temperature)
    total = (log_probs * of_log_probs).sum() + (entropy * of_entropy).sum() * entropy_gradient
    return log_probs.detach(), entropy.detach(), torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * PADDED * 10, 1 << 20])
def test_values_and_gradient_equal_the_naive_computation(monkeypatch, temperature, chunk_bytes, entropy_gradient):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    logits, targets, of_log_probs, of_entropy = inputs()
    logits.requires_grad_()
    log_probs, entropy = log_probs_and_entropy(logits, targets, temperature, WHOLE, entropy_gradient)
    assert entropy.requires_grad == entropy_gradient
    total = (log_probs * of_log_probs).sum() + ((entropy * of_entropy).sum() if entropy_gradient else 0)
    (gradient,) = torch.autograd.grad(total, logits)

    values = (log_probs, entropy, gradient)
    for ours, theirs in zip(values, expected(temperature, entropy_gradient)):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=5e-6)
    assert gradient[:, VOCAB:].abs().max() == 0, "padded columns must not be trained"


def half_a_vocabulary(temperature: float) -> list[list]:
    """This rank's log-probs, entropy and gradient, with the gradients of both."""
    parallel = ParallelConfig(tensor_parallel_size=2, collective_timeout_seconds=60)
    with parallel_layout(parallel, seed=1):
        from megatron.core import parallel_state

        width, rank = PADDED // 2, parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        shard = VocabularyShard(width * rank, min(VOCAB - width * rank, width), group)
        logits, targets, of_log_probs, of_entropy = inputs()
        mine = logits[:, shard.first : shard.first + width].clone().requires_grad_()
        log_probs, entropy = log_probs_and_entropy(mine, targets, temperature, shard, entropy_gradient=True)
        ((log_probs * of_log_probs).sum() + (entropy * of_entropy).sum()).backward()
        result = [log_probs.tolist(), entropy.tolist(), mine.grad.tolist()]
    destroy_parallel()
    return result


def test_two_halves_of_the_vocabulary_are_the_whole():
    """The second half holds the padding."""
    log_probs, entropy, gradient = expected(0.7, entropy_gradient=True)
    ranks = run_distributed(half_a_vocabulary, 2, 0.7)
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank[0]).double(), log_probs, rtol=0, atol=5e-6)
        torch.testing.assert_close(torch.tensor(rank[1]).double(), entropy, rtol=0, atol=5e-6)
    halves = torch.cat([torch.tensor(rank[2]) for rank in ranks], 1)
    torch.testing.assert_close(halves, gradient, rtol=0, atol=5e-6)


def test_nothing_of_the_entropy_is_kept_unless_its_gradient_is_asked_for():
    logits, targets, _, _ = inputs()
    logits.requires_grad_()
    kept = []
    for entropy_gradient in (False, True):
        log_probs, _ = log_probs_and_entropy(logits, targets, 1.0, WHOLE, entropy_gradient)
        kept.append([x.shape for x in log_probs.grad_fn.saved_tensors if x is not None])
    assert kept[1] == [*kept[0], torch.Size([TOKENS])]


def test_no_tokens_give_no_values():
    logits = torch.zeros(0, PADDED, requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.zeros(0, dtype=torch.int64), 1.0, WHOLE)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert logits.grad.shape == (0, PADDED)
