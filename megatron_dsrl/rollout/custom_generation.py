"""Custom generation: a function of the user's writes each response together with the model (`rollout.generate`)."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.async_callable import async_callable
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.growing_response import AbortedError, Decode, Encode, GrowingResponse
from megatron_dsrl.rollout.sample import SamplingParameters

GenerateFunction = Callable[[GrowingResponse], Awaitable[None]]
"""Writes one response."""


@dataclass(frozen=True)
class CustomGeneration:
    """The function and the tokenizer."""

    path: str
    """The function's dotted path, for messages."""
    function: GenerateFunction
    encode: Encode
    decode: Decode

    async def complete(
        self,
        client: EngineClient,
        prompts: Sequence[Prompt],
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        turn_timeout_seconds: float | None,
    ) -> list[Completion]:
        """One response per request, in the same order. All are written at the same time.

        Args:
            client: the engine for all of them.
            prompts: the prompt of each request.
            requests: have the seeds.
            sampling: how to sample.
            turn_timeout_seconds: limit of each call to the engine.

        Raises:
            EngineError, TooManyOpenFilesError: as from the engine; none of the responses is used.
            UserError: the function failed, or wrote a response that cannot be used.
        """
        responses = [
            GrowingResponse(prompt, request.seed, client, sampling, self.encode, self.decode, turn_timeout_seconds)
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        tasks = [asyncio.create_task(self._write(response)) for response in responses]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, response: GrowingResponse) -> Completion:
        try:
            await self.function(response)
            completion = response.as_completion() if response.failure is None else None
        except Exception as error:
            if response.failure is None:
                raise self._failed(response, error) from error
            completion = None
        if isinstance(response.failure, AbortedError):  # it starts again, if at all
            return Completion((), (), "abort", ())
        if response.failure is not None:
            raise response.failure
        assert completion is not None
        return completion

    def _failed(self, response: GrowingResponse, error: Exception) -> UserError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return UserError(
            f"rollout.generate: {self.path} failed for prompt {response.prompt.index}: {type(error).__name__}: {error} "
            f"({last.filename}, line {last.lineno})"
        )


def custom_generation(config: RolloutConfig, encode: Encode | None, decode: Decode) -> CustomGeneration | None:
    """The configured function; None if responses come from the engine alone.

    Args:
        encode: the tokenizer; needed by a function.

    Raises:
        UserError: as from `async_callable`.
    """
    if config.generate is None:
        return None
    assert encode is not None, "a function needs the tokenizer"
    function = async_callable(config.generate, config.generate_options, "rollout.generate")
    return CustomGeneration(config.generate, function, encode, decode)
