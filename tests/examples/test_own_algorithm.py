"""The example of a custom algorithm: what its parts compute, and that its configuration uses them."""

import math
from pathlib import Path

import pytest
import torch

from examples.own_algorithm.algorithm import HarderProblems, NotTooLong, SimplePolicyOptimization
from examples.own_algorithm.phase import FadingPhase
from examples.own_algorithm.reward import right_in_few_lines
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.objective import build_objectives
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.rewards.registry import check_options, reward_function
from tests.support.experiences import experience_of, scored_tokens

RUN = Path(__file__).parents[2] / "examples" / "own_algorithm" / "run.yaml"


def test_harder_problems_count_more() -> None:
    """Means 1/4 and 3/4: factors 1 + 3/4 and 1 + 1/4."""
    experience = experience_of([1.0, 0, 0, 0, 1, 1, 1, 0], [0] * 4 + [1] * 4, lengths=[1] * 8)
    advantages = [tokens.item() for tokens in HarderProblems().estimate(experience).advantages]
    assert advantages == pytest.approx([1.3125, *[-0.4375] * 3, *[0.3125] * 3, -0.9375])


@pytest.mark.parametrize(("ratio", "slope"), [(1.0, -2.0), (1.1, -1.0), (1.2, 0.0), (1.4, 2.0)])
def test_the_slope_of_the_parabola_turns_round_at_eps(ratio, slope) -> None:
    """With A = 2 and eps = 0.2, dl/d rho = -A + |A| (rho - 1) / eps."""
    log_probs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    tokens = scored_tokens(log_probs, torch.zeros(1, dtype=torch.float64), torch.tensor([2.0]))
    SimplePolicyOptimization().token_losses(tokens).losses.sum().backward()
    assert log_probs.grad.item() / ratio == pytest.approx(slope, abs=1e-6)


def test_one_objective_fades_away() -> None:
    """In four steps from 0.01: the phase is another one at each, and begins once."""
    phases = load_config(RUN, ["phases.0.fading_steps=4", "phases.0.until_step=6", "steps=6"]).phases
    schedule = Schedule(phases)
    terms = [schedule.at(step).objectives for step in range(1, 7)]
    coefficients = [objectives["nsr_prerl"].coefficient for objectives in terms[:4]]
    assert coefficients == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert [set(objectives) for objectives in terms[4:]] == [{"policy"}, {"policy"}]
    assert not any(schedule.starts_phase(step) for step in range(1, 7))


def test_the_reward() -> None:
    assert right_in_few_lines("1+1\n=2\n\\boxed{2}", "2") == 1.0
    assert right_in_few_lines("1\n" * 6 + "\\boxed{2}", "2") == pytest.approx(0.8)
    assert right_in_few_lines("\\boxed{3}", "2") == 0.0


def test_the_configuration_means_them() -> None:
    config = load_config(RUN)
    (phase,) = config.phases
    assert phase.advantage == HarderProblems(name=phase.advantage.name, weight=2.0)
    assert phase.loss == SimplePolicyOptimization(name=phase.loss.name, eps=0.1)
    assert phase.filter == NotTooLong(name=phase.filter.name, max_tokens=60)
    check_options(config.reward.function, config.reward.options)
    assert reward_function(config.reward.function) is right_in_few_lines
    assert type(phase) is FadingPhase and phase.fading_steps == 2
    batch = [Response((1,), (2,) * length, (-1.0,) * length, reward, 0) for length, reward in [(3, 1.0), (61, 0.0)]]
    experience = build_experience(batch, phase.space, ())
    at_the_end = Schedule(config.phases).at(config.steps)
    (objective,) = build_objectives(at_the_end, [experience], config.rollout.max_response_tokens)
    assert objective.experience.num_scored == [3]
    with pytest.raises(UserError, match=r"phases\.0\.loss\.epsilon: unknown key; did you mean eps\?"):
        load_config(RUN, ["phases.0.loss.epsilon=1"])
