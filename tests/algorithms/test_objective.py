"""From a phase and a rollout batch to the terms of the loss."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from megatron_dsrl.algorithms.advantages import Fixed, GroupMean, ReinforcePlusPlus
from megatron_dsrl.algorithms.aggregations import TokenSum
from megatron_dsrl.algorithms.experience import ModelPasses, Response, build_experience
from megatron_dsrl.algorithms.filters import Negative
from megatron_dsrl.algorithms.importance import Truncated
from megatron_dsrl.algorithms.losses import GSPO, PolicyGradient, ScoredTokens, Supervised
from megatron_dsrl.algorithms.objective import build_objectives, token_losses, with_advantages, with_behaviour_log_probs
from megatron_dsrl.algorithms.schedule import required_passes
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.config.phase import AdditionalObjectiveConfig, KLConfig, ObjectiveConfig, PhaseConfig
from tests.support.experiences import experience_of, scored_tokens

POST_TRAIN, PRE_TRAIN = PostTrain(), PreTrain()


def responses(*rewards_and_lengths: tuple[float, int], truncated: Sequence[int] = ()) -> list[Response]:
    return [
        Response((1, 2), (3,) * length, (-1.0,) * length, reward, 0, truncated=position in truncated)
        for position, (reward, length) in enumerate(rewards_and_lengths)
    ]


def test_two_objectives_on_the_same_samples_each_with_its_own_denominator() -> None:
    """GRPO without std on all samples, and NSR-PreRL on the wrong ones with a coefficient."""
    phase = PhaseConfig(
        name="both",
        space=POST_TRAIN,
        advantage=GroupMean(),
        additional_objectives=[
            AdditionalObjectiveConfig(
                name="nsr_prerl", space=PRE_TRAIN, advantage=Fixed(), filter=Negative(), coefficient=0.01
            )
        ],
    )
    batch = responses((1.0, 3), (0.0, 2))
    experiences = [build_experience(batch, o.space, [7]) for o in phase.objectives.values()]
    policy, nsr = build_objectives(phase, experiences, max_response_tokens=10)
    assert (policy.name, nsr.name) == ("policy", "nsr_prerl")
    assert (policy.coefficient, nsr.coefficient) == (1.0, 0.01)
    assert policy.experience.num_scored == [3, 2] and nsr.experience.num_scored == [2]
    assert [a.unique().tolist() for a in policy.experience.advantages] == [[0.5], [-0.5]]
    assert [a.unique().tolist() for a in nsr.experience.advantages] == [[-1]]
    assert policy.aggregation([3, 2]).tolist() == pytest.approx([1 / 5] * 2)
    assert nsr.aggregation([2]).tolist() == [1 / 2]


def test_the_constant_of_the_token_sum_is_the_length_limit() -> None:
    phase = PhaseConfig(name="dr_grpo", space=POST_TRAIN, advantage=GroupMean(), aggregation=TokenSum())
    batch = responses((1.0, 3), (0.0, 2))
    (objective,) = build_objectives(phase, [build_experience(batch, POST_TRAIN, ())], max_response_tokens=10)
    assert objective.aggregation([3, 2]).tolist() == pytest.approx([1 / 20] * 2)


def test_truncated_samples_are_compared_with_but_not_updated() -> None:
    config = ObjectiveConfig(space=POST_TRAIN, advantage=GroupMean(), drop_truncated=True)
    batch = responses((1.0, 3), (0.0, 4), truncated={1})
    experience = with_advantages(build_experience(batch, POST_TRAIN, ()), config)
    assert experience.num_scored == [3] and experience.advantages[0].tolist() == [0.5] * 3


def test_the_filter_judges_a_sample_by_the_sum_of_its_tokens() -> None:
    config = ObjectiveConfig(space=POST_TRAIN, advantage=ReinforcePlusPlus(), filter=Negative())
    experience = with_advantages(build_experience(responses((1.0, 1), (0.0, 3)), POST_TRAIN, ()), config)
    assert experience.num_scored == [3]


def test_nothing_kept_is_an_empty_experience() -> None:
    config = ObjectiveConfig(space=POST_TRAIN, advantage=GroupMean(), filter=Negative())
    assert len(with_advantages(build_experience(responses((1.0, 1), (1.0, 3)), POST_TRAIN, ()), config)) == 0
    assert len(with_advantages(build_experience([], POST_TRAIN, ()), config)) == 0


@pytest.mark.parametrize(
    ("kl", "passes"),
    [
        (None, ModelPasses()),
        (KLConfig(loss_coefficient=0.1), ModelPasses(reference_log_probs=True)),
        (KLConfig(reward_coefficient=0.1), ModelPasses(old_log_probs=True, reference_log_probs=True)),
    ],
)
def test_passes_that_kl_terms_need(kl, passes) -> None:
    assert required_passes(ObjectiveConfig(space=POST_TRAIN, advantage=GroupMean(), kl=kl)) == passes


def test_kl_in_the_reward_is_subtracted_token_by_token() -> None:
    """Log-ratios 0.5, -0.5 and 1 at a coefficient of 0.2: penalties 0.1, -0.1 and 0.2; the reward comes last."""
    experience = replace(
        experience_of([1.0, 0.0], [0, 0], lengths=[2, 1]),
        old_log_probs=(torch.tensor([-1.0, -1.5]), torch.tensor([-1.0])),
        reference_log_probs=(torch.tensor([-1.5, -1.0]), torch.tensor([-2.0])),
    )
    config = ObjectiveConfig(space=POST_TRAIN, advantage=GroupMean(), kl=KLConfig(reward_coefficient=0.2))
    result = with_advantages(experience, config)
    assert [r.tolist() for r in result.token_rewards] == [pytest.approx([-0.1, 1.1]), pytest.approx([-0.2])]
    # worth 1 and -0.2 in all, mean 0.4
    assert [a[0].item() for a in result.advantages] == pytest.approx([0.6, -0.6])


def test_the_loss_of_a_token_adds_up() -> None:
    """w (-A lp) + beta KL - alpha H on one token, with the gradient of each part."""
    config = ObjectiveConfig(
        space=POST_TRAIN,
        advantage=GroupMean(),
        loss=PolicyGradient(),
        importance_correction=Truncated(cap=2.0),
        kl=KLConfig(loss_coefficient=0.1, loss_estimator="k2"),
        entropy_coefficient=0.01,
    )
    log_probs = torch.tensor([-1.0], requires_grad=True)
    entropy = torch.tensor([0.7], requires_grad=True)
    tokens = scored_tokens(
        log_probs,
        old_log_probs=log_probs.detach(),
        advantages=torch.tensor([0.5]),
        engine_log_probs=torch.tensor([-1.5]),
        reference_log_probs=torch.tensor([-1.4]),
        entropy=entropy,
    )
    result = token_losses(config, tokens)
    weight, difference = torch.tensor(0.5).exp().item(), 0.4
    assert result.losses.item() == pytest.approx(weight * 0.5 + 0.1 * difference**2 / 2 - 0.01 * 0.7)
    result.losses.sum().backward()
    assert log_probs.grad.item() == pytest.approx(-weight * 0.5 + 0.1 * difference)
    assert entropy.grad.item() == pytest.approx(-0.01)
    assert result.metrics["reference_kl"].item() == pytest.approx(difference**2 / 2)
    assert result.metrics["importance_truncated_fraction"].item() is False


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, [2, 3]),
        ({"loss": GSPO(), "importance_correction": Truncated()}, [2, 3]),
        ({"kl": KLConfig(reward_coefficient=0.1)}, [2, 3]),
        ({"kl": KLConfig(loss_coefficient=0.1)}, [0, 1, 2, 3]),
        ({"entropy_coefficient": 0.01}, [0, 1, 2, 3]),
        ({"loss": Supervised()}, [0, 1, 2, 3]),
    ],
    ids=["clip", "importance", "KL in the reward", "KL in the loss", "entropy bonus", "supervised"],
)
def test_samples_of_uniform_groups_have_a_gradient_only_where_another_term_gives_them_one(changes, needed) -> None:
    phase = PhaseConfig(name="one", space=POST_TRAIN, advantage=GroupMean(), **changes)
    experience = experience_of([1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1], [2, 3, 2, 3])
    same = tuple(torch.full((count,), -1.0) for count in experience.num_scored)
    experience = replace(experience, old_log_probs=same, reference_log_probs=same)
    (objective,) = build_objectives(phase, [experience], max_response_tokens=10)
    assert objective.samples_with_gradient == needed


def test_an_entropy_bonus_asks_for_the_entropy_gradient() -> None:
    phase = PhaseConfig(name="bonus", space=POST_TRAIN, advantage=GroupMean(), entropy_coefficient=0.01)
    experience = build_experience(responses((1.0, 3), (0.0, 2)), POST_TRAIN, ())
    without = phase.model_copy(update={"entropy_coefficient": 0.0})
    for each, needed in [(phase, True), (without, False)]:
        (objective,) = build_objectives(each, [experience], max_response_tokens=10)
        assert objective.needs_entropy_gradient is needed


@pytest.mark.parametrize(
    ("changes", "old_of_older_tokens"),
    [
        ({}, -2.0),
        ({"importance_correction": Truncated()}, -1.0),
        ({"space": PRE_TRAIN}, -1.0),
    ],
    ids=["the engine's", "an importance correction has them", "the pre-train space has no other"],
)
def test_old_log_probs_of_tokens_from_older_weights(changes, old_of_older_tokens) -> None:
    """Log-probs: the engine's -2, the trainer's before the update -1. The first two tokens are older."""
    batch = [Response([1, 2], [3, 4, 5], [-2.0] * 3, reward, group=0, older_tokens=2) for reward in (0.0, 1.0)]
    objective = ObjectiveConfig(**{"space": POST_TRAIN, "advantage": GroupMean(), **changes})
    experience = build_experience(batch, objective.space, context_ids=[9])
    assert [marks.tolist() for marks in experience.from_older_weights] == [[1, 1, 0]] * 2

    tokens = with_behaviour_log_probs(
        objective,
        ScoredTokens(
            log_probs=torch.zeros(6),
            entropy=torch.zeros(6),
            old_log_probs=torch.full((6,), -1.0),
            engine_log_probs=torch.cat(experience.engine_log_probs),
            reference_log_probs=None,
            advantages=torch.zeros(6),
            num_scored=(3, 3),
            from_older_weights=torch.cat(experience.from_older_weights),
        ),
    )

    assert tokens.old_log_probs.tolist() == [old_of_older_tokens, old_of_older_tokens, -1.0] * 2
