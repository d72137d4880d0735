"""Prepared responses instead of an engine's; everything else is real. No model is asked."""

import asyncio
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import BatchProgress, RolloutBatch
from megatron_dsrl.rollout.dispatcher import Dispatcher, GroupJudge
from megatron_dsrl.rollout.engine_health import EngineStates
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.sample import Sample, SampleGroup, SamplingParameters
from megatron_dsrl.rollout.seeds import sample_seed
from megatron_dsrl.rollout.unfinished import UnfinishedGroup
from tests.support.engine import batch_request

TIMEOUT_SECONDS = 3000.0


class ReplayedCompletions:
    """Answers like an engine, with the text that belongs to a sample's seed."""

    def __init__(self, texts: dict[int, str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._texts = texts
        self._tokenizer = tokenizer

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingParameters, timeout_seconds: float | None
    ) -> list[Completion]:
        texts = [self._texts[request.seed] for request in requests]
        all_ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            Completion((*ids, sampling.stop_token_ids[0]), (0.0,) * (len(ids) + 1), "stop", ((0, len(ids) + 1),))
            for ids in all_ids
        ]

    async def check_health(self, timeout_seconds: float) -> None:
        """It is always well."""


class ReplayingSampler:
    """Samples from prepared responses, through the real dispatcher and the real reward pool."""

    def __init__(self, responses: Callable[[Prompt], Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> None:
        """`responses` gives every sample of a prompt."""
        self._responses = responses
        self._tokenizer = tokenizer

    def generate_samples(
        self,
        wanted: Sequence[tuple[Prompt, int]],
        sampling: SamplingParameters,
        stream: str,
        on_sample: Callable[[Prompt, int, Sample], None],
        rewards: RewardPool,
    ) -> None:
        seeds = [sample_seed(0, stream, prompt.index, number) for prompt, number in wanted]
        responses = {prompt.index: self._responses(prompt) for prompt, _ in wanted}
        texts = {seed: responses[prompt.index][number] for (prompt, number), seed in zip(wanted, seeds, strict=True)}
        groups = [UnfinishedGroup.new(prompt, [seed]) for (prompt, _), seed in zip(wanted, seeds, strict=True)]
        request = batch_request(groups, sampling, step_timeout_seconds=TIMEOUT_SECONDS)
        batch, clients = RolloutBatch(request, 1), [ReplayedCompletions(texts, self._tokenizer)]

        def decode(ids: Sequence[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=True)

        def hand_over(position: int, group: SampleGroup) -> None:
            on_sample(*wanted[position], *group.samples)

        progress = BatchProgress(on_group=hand_over)
        asyncio.run(Dispatcher(batch, clients, EngineStates(), GroupJudge(rewards, decode), progress).run())
