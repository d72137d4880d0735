"""Partial rollouts over a real engine: a step ends when it has enough, and the next one continues where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dsrl.config.rollout import PartialRolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.sample import Sample
from megatron_dsrl.rollout.step_sampling import sample_until
from megatron_dsrl.rollout.unfinished import (
    CarryOver,
    CarryOverWrite,
    PartialResponse,
    UnfinishedGroup,
    restart_expired,
)
from tests.support.engine import numbered_prompts, tiny_run_config, transformers_log_probs

WANTED, SAMPLES, RESPONSE_TOKENS = 4, 3, 400
PROMPTS = [replace(prompt, token_ids=prompt.token_ids[:20]) for prompt in numbered_prompts(64)]


@pytest.fixture
def rollout(engine_rollout: EngineRollout, monkeypatch: pytest.MonkeyPatch) -> EngineRollout:
    """A rare stop token makes the lengths differ a lot."""
    sampling = replace(engine_rollout.training_sampling, max_response_tokens=RESPONSE_TOKENS, stop_token_ids=(0,))
    monkeypatch.setattr(engine_rollout, "training_sampling", sampling)
    return engine_rollout


@pytest.fixture
def config(tiny_model_folder: Path) -> RunConfig:
    """Wants 4 groups and keeps 24 in flight."""
    config = tiny_run_config(tiny_model_folder)
    section = config.rollout.model_copy(
        update={
            "prompts_per_step": WANTED,
            "samples_per_prompt": SAMPLES,
            "max_response_tokens": RESPONSE_TOKENS,
            "partial_rollouts": PartialRolloutConfig(oversampling=6.0, max_weight_versions=2),
        }
    )
    return config.model_copy(update={"rollout": section})


def load_policy(rollout: EngineRollout, folder, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rollout.load_weights(lambda: [list(model.named_parameters())], rollout.weight_version + 1)
    return model


def test_two_steps(rollout, config, tiny_model_folder, tmp_path) -> None:
    waiting = list(PROMPTS)

    def draw(count: int) -> list[Prompt]:
        return [waiting.pop(0) for _ in range(count)]

    policies = {rollout.weight_version + 1: load_policy(rollout, tiny_model_folder, seed=1)}
    rollout.generate(PROMPTS[:1], 1, rollout.training_sampling, "warm up")  # and the verifier's processes
    first = sample_until(config, rollout, 1, draw, lambda group: True, CarryOver())
    begun = PROMPTS[: len(PROMPTS) - len(waiting)]

    assert (len(first.accepted), first.rejected, first.expired_groups) == (WANTED, [], 0)
    in_flight = [*first.accepted, *first.left.finished, *first.left.unfinished]
    assert {group.prompt.index for group in in_flight} == {prompt.index for prompt in begun}
    assert len(in_flight) == len(begun) == 6 * WANTED, "none is lost or doubled"
    cut = [r for group in first.left.unfinished for r in group.responses if r.finish_reason is None and r.response_ids]
    assert cut, "some were in the middle"

    # The checkpoint keeps it.
    CarryOverWrite(first.left, tmp_path).write()
    assert CarryOver.read_from(tmp_path) == first.left

    policies |= {rollout.weight_version + 1: load_policy(rollout, tiny_model_folder, seed=2)}
    second = sample_until(config, rollout, 2, draw, lambda group: True, CarryOver.read_from(tmp_path))

    assert len(second.accepted) == WANTED
    finished = (*second.accepted, *second.left.finished)
    samples = [(group.prompt, sample) for group in finished for sample in group.samples]
    put_together = [sample for _, sample in samples if sample.older_versions]
    assert put_together, "a cut response was finished"
    for prompt, sample in samples:
        assert_log_probs_of_their_versions(policies, prompt, sample)
        assert len(sample.response_ids) <= RESPONSE_TOKENS
    beginnings = {response.seed: response for response in cut}
    for group in second.left.unfinished:
        for response in group.responses:
            if response.seed in beginnings:
                before = beginnings[response.seed].response_ids
                assert response.response_ids[: len(before)] == before


def assert_log_probs_of_their_versions(policies: dict[int, Qwen3ForCausalLM], prompt, sample: Sample) -> None:
    """Every token has the log-prob of the policy that its span names."""
    older = sum(count for _, count in sample.older_versions)
    spans = [*sample.older_versions, (sample.weight_version, len(sample.response_ids) - older)]
    expected, start = [], 0
    for version, count in spans:
        of_policy = transformers_log_probs(policies[version], prompt.token_ids, sample.response_ids, 1.0)
        expected.append(of_policy[start : start + count])
        start += count
    torch.testing.assert_close(torch.tensor(sample.log_probs), torch.cat(expected), atol=1e-4, rtol=0)


def test_only_accepted_groups_count_and_new_prompts_replace_the_others(rollout, config, tiny_model_folder) -> None:
    load_policy(rollout, tiny_model_folder, seed=3)
    waiting = list(PROMPTS)

    batch = sample_until(
        config,
        rollout,
        3,
        lambda count: [waiting.pop(0) for _ in range(count)],
        lambda group: group.prompt.index % 2 == 0,
        CarryOver(),
    )

    assert len(batch.accepted) == WANTED
    assert {group.prompt.index % 2 for group in batch.accepted} == {0}
    assert {group.prompt.index % 2 for group in batch.rejected} <= {1}


def test_a_continued_response_has_the_experts_of_its_last_request(tmp_path) -> None:
    """Which went through all of it; what a response had when it was cut is not kept."""
    ended = Completion((1, 2), (-0.1, -0.2), "stop", ((1, 2),), routed_experts="of the first")
    cut = Completion((3,), (-0.3,), "abort", ((1, 1),), routed_experts="of the one that was cut")
    group = UnfinishedGroup.new(PROMPTS[0], [5, 6]).extended([ended, cut])
    CarryOverWrite(CarryOver(unfinished=(group,)), tmp_path).write()
    (group,) = CarryOver.read_from(tmp_path).unfinished
    assert [response.routed_experts for response in group.responses] == ["of the first", None]

    rest = Completion((4, 2), (-0.4, -0.5), "stop", ((2, 2),), routed_experts="of both parts")
    group = group.extended([rest])
    assert [response.routed_experts for response in group.responses] == ["of the first", "of both parts"]
    assert list(group.responses[1].response_ids) == [3, 4, 2]


def test_groups_that_are_too_old_are_restarted() -> None:
    def group(number: int, *versions: int) -> UnfinishedGroup:
        spans = tuple((version, 2) for version in versions)
        tokens = 2 * len(versions)
        return UnfinishedGroup(
            PROMPTS[number], (PartialResponse(number, (5,) * tokens, (-1.0,) * tokens, spans), PartialResponse(70))
        )

    carried = CarryOver(unfinished=(group(0, 4, 6), group(1, 5), group(2)))

    fitting, expired = restart_expired(carried, 7, 3, new_seeds=lambda prompts: [(91, 92) for _ in prompts])

    assert expired == 1
    assert fitting.unfinished == (group(1, 5), group(2), UnfinishedGroup.new(PROMPTS[0], (91, 92)))
