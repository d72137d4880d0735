"""Custom generation: a user's function writes each response together with the model (`rollout.generate`)."""

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.section import object_at
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.growing_response import AbortedError, Decode, Encode, GrowingResponse
from megatron_dsrl.rollout.sample import SamplingParameters

GenerateFunction = Callable[[GrowingResponse], Awaitable[None]]
"""Writes one response."""


@dataclass(frozen=True)
class CustomGeneration:
    """The function, and the tokenizer that it needs."""

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
            if response.failure is None:
                return response.as_completion()
        except Exception as error:
            if response.failure is None:
                last = traceback.extract_tb(error.__traceback__)[-1]
                raise UserError(
                    f"rollout.generate: {self.path} failed for prompt {response.prompt.index}: {type(error).__name__}: "
                    f"{error} ({last.filename}, line {last.lineno})"
                ) from error
        if isinstance(response.failure, AbortedError):  # it starts again, if at all
            return Completion((), (), "abort", ())
        assert response.failure is not None
        raise response.failure


def custom_generation(config: RolloutConfig, encode: Encode | None, decode: Decode) -> CustomGeneration | None:
    """The configured function, which needs `encode`; None if responses come from the engine alone. Raises like
    `async_callable`."""
    if config.generate is None:
        return None
    assert encode is not None, "a function needs the tokenizer"
    function = async_callable(config.generate, config.generate_options, "rollout.generate")
    return CustomGeneration(config.generate, function, encode, decode)


AsyncCallable = Callable[[Any], Awaitable[Any]]


def async_callable(path: str, options: Mapping[str, Any], field: str) -> AsyncCallable:
    """What a path names, with its options: a function of one argument. Raises UserError if it does not exist, is not
    asynchronous, does not take these options, or refuses them.

    Args:
        path: names a function that begins with `async def`, or a class whose instances can be called like one. A class
            gets the options once, when the run starts.
        field: that holds the path, for messages; `<field>_options` holds the options.
    """
    try:
        found = object_at(path)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error
    is_class = inspect.isclass(found)
    if not inspect.iscoroutinefunction(getattr(found, "__call__", None) if is_class else found):  # noqa: B004
        module, _, name = path.partition(":")
        raise UserError(
            f"{field}: `{module}` has no function `{name}` that begins with `async def`, and no class with an "
            "`async def __call__`"
        )
    try:
        inspect.signature(found).bind(*(() if is_class else (None,)), **options)
    except TypeError as error:
        raise UserError(f"{field}_options: {path} does not take these options: {error}") from error
    if not is_class:
        return partial(found, **options)
    try:
        return found(**options)
    except UserError as error:
        raise UserError(f"{field}: {path}: {error}") from error
