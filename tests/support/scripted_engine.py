"""An engine that writes a given text, turn by turn, instead of `EngineClient`. No model is asked."""

import asyncio
from collections.abc import Callable, Sequence

from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.sample import SamplingParameters

Answer = Sequence[int] | Exception | None
"""The tokens that the model would write; an error of the call; None: the engine aborts it."""


class ScriptedEngine:
    """Answers each call by a function of its request, and stops and counts like an engine."""

    url = "http://scripted"

    def __init__(self, answer: Callable[[SampleRequest], Answer], weight_version: int = 0) -> None:
        self.requests: list[SampleRequest] = []
        self._answer = answer
        self._weight_version = weight_version

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingParameters, timeout_seconds: float | None
    ) -> list[Completion]:
        """Log-probs are -0.5 for the first token of a turn, and half as much for each later one."""
        await asyncio.sleep(0)
        return [self._complete(request, sampling) for request in requests]

    async def check_health(self, timeout_seconds: float) -> None:
        """It is always well."""

    def _complete(self, request: SampleRequest, sampling: SamplingParameters) -> Completion:
        self.requests.append(request)
        answer = self._answer(request)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            return Completion((), (), "abort", ())
        stop = next((n for n, token in enumerate(answer, 1) if token in sampling.stop_token_ids), None)
        ids = tuple(answer[:stop])[: request.max_new_tokens]
        log_probs = tuple(-0.5 / 2**n for n in range(len(ids)))
        reason = "stop" if stop is not None and stop == len(ids) else "length"
        return Completion(ids, log_probs, reason, ((self._weight_version, len(ids)),))
