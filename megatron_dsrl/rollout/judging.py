"""Judges a group whose responses are complete, which makes samples of them."""

import asyncio
import time
from dataclasses import dataclass

from megatron_dsrl.rewards.pool import RewardPool, Verdict
from megatron_dsrl.rollout.batch import RolloutBatch
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.growing_response import Decode
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from megatron_dsrl.rollout.unfinished import PartialResponse, UnfinishedGroup


@dataclass(frozen=True)
class GroupJudge:
    """Decodes responses and has the reward pool judge them."""

    rewards: RewardPool
    decode: Decode

    async def judge(self, group: UnfinishedGroup, batch: RolloutBatch) -> SampleGroup:
        """The group's samples with their rewards.

        Raises:
            EngineError: the rewards were not ready by the batch's deadline.
        """
        texts = [self.decode(response.response_ids) for response in group.responses]
        prompt = group.prompt
        about = (prompt.answer, prompt.other_answers, prompt.text, prompt.prompt_set)
        judgements = [self.rewards.submit(text, *about) for text in texts]
        samples = []
        for response, text, judgement in zip(group.responses, texts, judgements, strict=True):
            try:
                limit = max(0.1, batch.deadline - time.monotonic())
                judged = await asyncio.wait_for(asyncio.wrap_future(judgement), limit)
            except TimeoutError as error:
                raise EngineError(
                    "rewards were not ready within rollout.step_timeout_seconds = "
                    f"{batch.request.timeout_seconds:g}; raise the limit or reward.workers, or lower "
                    "reward.timeout_seconds"
                ) from error
            samples.append(_sample(response, text, judged.reward, judged.verdict, batch.request.weight_version))
        return SampleGroup(prompt, tuple(samples))


def _sample(response: PartialResponse, text: str, reward: float, verdict: Verdict, weight_version: int) -> Sample:
    """Make a sample of a finished response. Its last token is older than `weight_version` only if it ended earlier."""
    assert response.finish_reason is not None
    versions = response.weight_versions or ((weight_version, 0),)
    return Sample(
        response_ids=response.response_ids,
        log_probs=response.log_probs,
        text=text,
        finish_reason=response.finish_reason,
        weight_version=versions[-1][0],
        reward=reward + sum(value for _, value in response.turn_rewards),
        verdict=verdict,
        older_versions=versions[:-1],
        routed_experts=response.routed_experts,
        scored=response.scored,
        turn_rewards=response.turn_rewards,
    )
