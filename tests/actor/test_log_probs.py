"""Vocab-parallel log-probs and entropy against torch's log_softmax, values and gradients."""

import pytest
import torch

from megatron_dsrl.actor import log_probs as module
from megatron_dsrl.actor.log_probs import VocabularyShard, log_probs_and_entropy

ROWS, TOKENS, VOCAB, PADDED = 41, 37, 50, 56


def reference(logits, targets, temperature):
    distribution = torch.log_softmax(logits[:, :VOCAB].double() / temperature, dim=-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * PADDED * 10, 1 << 20])
def test_values_and_gradient_equal_the_naive_computation(monkeypatch, temperature, chunk_bytes):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(ROWS, PADDED, generator=generator)).requires_grad_()
    positions = torch.randperm(ROWS, generator=generator)[:TOKENS]
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    shard = VocabularyShard(first=0, num_valid=VOCAB, group=None)

    log_probs, entropy = log_probs_and_entropy(logits, positions, targets, temperature, shard)
    (gradient,) = torch.autograd.grad((log_probs * upstream).sum(), logits)

    naive = logits.detach().double().requires_grad_()
    expected, expected_entropy = reference(naive[positions], targets, temperature)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), naive)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=5e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=5e-6)
    assert gradient[:, VOCAB:].abs().max() == 0, "padded columns must not be trained"
    assert not entropy.requires_grad


def test_no_tokens_give_no_values():
    logits = torch.zeros(3, PADDED, requires_grad=True)
    shard = VocabularyShard(first=0, num_valid=VOCAB, group=None)
    none = torch.zeros(0, dtype=torch.int64)
    log_probs, entropy = log_probs_and_entropy(logits, none, none, 1.0, shard)
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert logits.grad.abs().max() == 0
