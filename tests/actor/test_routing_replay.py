"""A mixture of experts follows the experts that it is given, as Transformers' model with a forced choice does.

That this holds in every layout is shown in test_layouts.py; that engines name the experts, in
tests/test_train_two_processes.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from megatron_dsrl.algorithms.experience import Experience, build_experience
from megatron_dsrl.algorithms.losses import supervised_loss
from megatron_dsrl.model.parallel import destroy_parallel
from megatron_dsrl.model.routed_experts import decode_routed_experts, encode_routed_experts
from tests.actor.test_actor import BOS, GRPO, NSR_PRERL, TEMPERATURE, objective_of, one_process, responses
from tests.support.random_experts import random_experts
from tests.support.tiny_model import make_tiny_qwen3_moe

LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 4, 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("model")
    yield folder, make_tiny_qwen3_moe(folder, vocab_size=127)
    destroy_parallel()


@contextmanager
def forced(model: Qwen3MoeForCausalLM, experts: Tensor) -> Iterator[None]:
    """Inside, the tokens of one sequence go to these experts, [tokens, layers, experts per token]."""

    def force(layer: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        def hook(router, arguments, output) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = output[0]
            chosen = experts[:, layer].long()
            weights = logits.float().softmax(-1).gather(1, chosen)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        return hook

    handles = [layer.mlp.gate.register_forward_hook(force(i)) for i, layer in enumerate(model.model.layers)]
    yield
    for handle in handles:
        handle.remove()


def reference_log_probs(model: Qwen3MoeForCausalLM, experience: Experience, experts: Sequence[str]) -> list[Tensor]:
    """Log-probs of each sequence's scored tokens, with the experts forced."""
    result = []
    for sequence, text in zip(experience.sequences, experts):
        given = decode_routed_experts(text, LAYERS, EXPERTS_PER_TOKEN)
        tokens = torch.tensor(sequence.token_ids)
        with forced(model, given):
            logits = model(tokens[None, :-1]).logits[0]
        scored = (logits[sequence.num_context - 1 :].float() / TEMPERATURE).log_softmax(-1)
        result.append(scored.gather(1, tokens[sequence.num_context :, None])[:, 0])
    return result


def test_log_probs_loss_and_gradient_are_those_of_the_given_experts(model) -> None:
    folder, transformers_model = model
    objective = replace(objective_of(GRPO), loss=supervised_loss, needs_every_sample=True)
    experts = random_experts(objective.experience.sequences, LAYERS, EXPERTS, EXPERTS_PER_TOKEN)
    experience = replace(objective.experience, routed_experts=experts)
    with one_process(folder) as actor:
        free = torch.cat(actor.log_probs(objective.experience))
        log_probs = torch.cat(actor.log_probs(experience))
        metrics = actor.update([replace(objective, experience=experience)])

    expected = torch.cat(reference_log_probs(transformers_model, experience, experts))
    loss = -expected.mean()
    transformers_model.zero_grad()
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in transformers_model.parameters() if p.grad is not None]).norm()

    torch.testing.assert_close(log_probs, expected.detach(), rtol=0, atol=1e-5)
    assert (log_probs - free).abs().max() > 0.1, "the given experts are others than the model's own"
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.grad_norm == pytest.approx(grad_norm.item(), rel=1e-5)
    assert all(layer.mlp.gate.weight.grad.norm() > 0 for layer in transformers_model.model.layers)


def test_experts_of_a_different_model_are_refused(model) -> None:
    folder, _ = model
    experience = objective_of(GRPO).experience
    with one_process(folder) as actor:
        for wrong in ({"layers": 3}, {"experts_per_token": 1, "layers": 12}):
            shape = {"layers": LAYERS, "experts": EXPERTS, "experts_per_token": EXPERTS_PER_TOKEN} | wrong
            with pytest.raises(ValueError, match="recorded with a different model"):
                actor.log_probs(replace(experience, routed_experts=random_experts(experience.sequences, **shape)))


def test_only_the_post_train_space_takes_the_engine_s_experts() -> None:
    batch = [
        replace(response, routed_experts=encode_routed_experts(torch.zeros(1).numpy())) for response in responses()
    ]

    assert build_experience(batch, GRPO.space, BOS).routed_experts == tuple(r.routed_experts for r in batch)
    assert build_experience(batch, NSR_PRERL.space, BOS).routed_experts is None
    with pytest.raises(ValueError, match="only 23 of 24 responses have routed experts"):
        build_experience([*batch[:-1], replace(batch[-1], routed_experts=None)], GRPO.space, BOS)
