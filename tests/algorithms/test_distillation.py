"""On-policy distillation: the advantage, and that its gradient is that of the reverse KL divergence."""

from dataclasses import replace

import pytest
import torch

from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.objective import with_advantages
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain, Space
from megatron_dsrl.config.phase import ObjectiveConfig

STUDENT = (torch.tensor([-1.0, -2.0]), torch.tensor([-0.5]))
TEACHER = (torch.tensor([-0.5, -5.0]), torch.tensor([-0.5]))


def advantages(space: Space, **options: float) -> list[list[float]]:
    responses = [Response([1, 2], [3, 4], [-1.0, -2.0], reward=1.0, group=0), Response([1, 2], [5], [-0.5], 0.0, 0)]
    experience = build_experience(responses, space, context_ids=[9])
    experience = replace(experience, old_log_probs=STUDENT, reference_log_probs=TEACHER)
    objective = ObjectiveConfig.model_validate(
        {"space": space.name, "advantage": {"name": "distillation", **options}}, strict=False
    )
    result = with_advantages(experience, objective).advantages
    assert result is not None
    return [one.tolist() for one in result]


@pytest.mark.parametrize("space", [PostTrain(), PreTrain()])
def test_each_token_is_compared_with_the_teacher_whatever_its_reward(space: Space) -> None:
    assert advantages(space) == [[0.5, -3.0], [0.0]]
    assert advantages(space, clip=1.0) == [[0.5, -1.0], [0.0]]


def test_its_expected_gradient_is_that_of_the_reverse_kl_divergence() -> None:
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    student, teacher = torch.log_softmax(logits, -1), torch.log_softmax(torch.randn(7, dtype=torch.float64), -1)
    (of_kl,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    weights = (student.exp() * (teacher - student)).detach()
    (of_policy_loss,) = torch.autograd.grad(-(weights * student).sum(), logits)
    torch.testing.assert_close(of_policy_loss, of_kl, rtol=1e-12, atol=1e-12)
