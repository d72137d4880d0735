"""Samples in the form that the algorithms take. A separate file, so that reading samples does not load PyTorch."""

from collections.abc import Sequence

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.rollout.sample import SampleGroup


def responses_of(groups: Sequence[SampleGroup], weight_version: int) -> list[Response]:
    """The samples of all groups, in order, in the form that the algorithms take.

    Args:
        weight_version: version of the weights that they update; tokens of earlier versions are marked as older.
    """
    return [
        Response(
            prompt_ids=group.prompt.token_ids,
            response_ids=sample.response_ids,
            engine_log_probs=sample.log_probs,
            reward=sample.reward,
            group=number,
            truncated=sample.finish_reason == "length",
            older_tokens=sample.tokens_before(weight_version),
            routed_experts=sample.routed_experts,
            scored=sample.scored,
        )
        for number, group in enumerate(groups)
        for sample in group.samples
    ]
