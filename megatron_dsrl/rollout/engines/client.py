"""HTTP calls to one SGLang server, each with a time limit and a checked answer.

Unlike SGLang 0.5.23's own client, which ignores `success: false` in the answer to a weight call, a refusal is an error
here; so is `update_weights_from_tensor` outside a weight update.
"""

import base64
import errno
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import aiohttp
import numpy as np

from megatron_dsrl.common.errors import MachineError
from megatron_dsrl.model.routed_experts import encode_routed_experts
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError
from megatron_dsrl.rollout.sample import SamplingParameters

MemoryTag = Literal["weights", "kv_cache"]
VersionSpans = tuple[tuple[int, int], ...]
"""(weight version, number of tokens that it produced), oldest first."""


class EngineError(RuntimeError):
    """An engine refused a call, answered something unusable, or is gone."""


class LostEngineError(EngineError, MachineError):
    """An engine was lost more often than `engine.max_restarts` allows."""


class BadRequestError(EngineError):
    """The engine will never accept this request; retrying does not help."""


@dataclass(frozen=True)
class SampleRequest:
    """A request for one response."""

    token_ids: tuple[int, ...]
    """The prompt and the response tokens so far."""
    seed: int
    """Seed of the response's random numbers, in 0..2^63 - 1."""
    max_new_tokens: int
    """The response ends after at most this many further tokens."""


@dataclass(frozen=True)
class Completion:
    """The engine's result for one request."""

    response_ids: tuple[int, ...]
    """New tokens, including the stop token."""

    log_probs: tuple[float, ...]
    """Log-prob of every new token. Unit: nat."""

    finish_reason: Literal["stop", "length", "abort"]
    """`length`: the response reached the limit. `abort`: `abort_all` ended it, perhaps before its first token."""

    weight_versions: VersionSpans
    """Versions of the weights that produced the tokens; several if weights changed during the request."""

    routed_experts: str | None = None
    """The experts chosen for every token of request and response except the last, which went through no layer. None
    unless requested."""


class EngineClient:
    """Calls to one server. An asynchronous context manager that holds the connections."""

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
        """
        Args:
            address: Where the server is, and its key.
            timeout_seconds: Limit of every call except `generate`, whose caller limits the whole batch.
        """
        self.url = address.url
        self._headers = address.headers
        self._timeout_seconds = timeout_seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A connection per request: the server closes one that was idle for five seconds, just when it may be needed.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._session is not None
        await self._session.close()
        self._session = None

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingParameters, timeout_seconds: float | None = None
    ) -> list[Completion]:
        """One response per request, in the same order.

        SGLang's scheduler gets all requests in one message, so that it forms the same batches every time.

        Args:
            requests: What to sample.
            sampling: How to sample; the length limit is each request's own.
            timeout_seconds: Limit of the whole call; None: no limit.

        Raises:
            BadRequestError: The engine refused the request itself, such as one that is too long.
            EngineError: The engine is busy or gone, or returned a log-prob that is not a finite number.
            TooManyOpenFilesError: This process has no descriptor for the connection.
        """
        body = {
            "input_ids": [list(request.token_ids) for request in requests],
            "sampling_params": [
                sampling.as_engine_request(request.max_new_tokens) | {"sampling_seed": request.seed}
                for request in requests
            ],
            "return_logprob": True,
            "return_routed_experts": sampling.return_routed_experts,
        }
        answers = await self._request("POST", "/generate", body, timeout_seconds)
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise EngineError(
                f"engine {self.url}: /generate did not answer with {len(requests)} samples: {answers!r:.500}"
            )
        completions = [self._completion(answer) for answer in answers]
        if not sampling.return_routed_experts:
            return completions
        return [
            replace(completion, routed_experts=self._routed_experts(request, completion, answer))
            for request, completion, answer in zip(requests, completions, answers)
        ]

    async def abort_all(self) -> None:
        """End all running requests now; they return the tokens sampled so far."""
        await self._post("/abort_request", {"abort_all": True})

    async def check_health(self, timeout_seconds: float) -> None:
        """Check that the scheduler makes progress; an idle one has to sample a token.

        Raises:
            EngineError: No progress within the limit.
        """
        await self._request("GET", "/health", None, timeout_seconds)

    async def begin_weight_update(self) -> None:
        """Open a weight update. No request may be running."""
        await self._post_checked("/begin_weight_update", {})

    async def update_weights(self, payload_per_rank: list[str]) -> None:
        """Load one flattened bucket; one serialised payload per tensor-parallel rank of the engine, in rank order.

        Returns when every rank has copied the tensors, so that their memory may be reused. Cached prefixes are dropped,
        or later samples would continue from the old weights' cache. (SGLang's separate flush call also collects
        garbage, which on CPU takes longer than everything else together.)
        """
        await self._post_checked(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": payload_per_rank,
                "load_format": "flattened_bucket",
                "flush_cache": True,
            },
        )

    async def end_weight_update(self) -> None:
        """Close the weight update."""
        await self._post_checked("/end_weight_update", {})

    async def set_weight_version(self, version: int) -> None:
        """Set the version that samples carry from now on."""
        await self._post_checked(
            "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}
        )

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Give device memory back. The engine must be idle, otherwise SGLang kills the whole engine."""
        # Waits until the scheduler has noticed that nothing is running, and fails if something is.
        await self._post(f"/flush_cache?timeout={self._timeout_seconds:g}", None)
        await self._post("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take released memory again; its contents are undefined until weights are pushed."""
        await self._post("/resume_memory_occupation", {"tags": list(tags)})

    async def _post_checked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST to an endpoint whose answer says whether it succeeded."""
        answer = await self._post(path, body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineError(f"engine {self.url} refused {path}: {answer!r:.2000}")
        return answer

    async def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        """POST within the client's own limit."""
        return await self._request("POST", path, body, self._timeout_seconds)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, limit: float | None) -> Any:
        """The decoded answer. `limit` is in seconds; None: no limit."""
        assert self._session is not None, "EngineClient is used outside `async with`"
        try:
            async with self._session.request(
                method, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=limit)
            ) as response:
                if response.status != 200:
                    kind = BadRequestError if 400 <= response.status < 500 else EngineError
                    raise kind(
                        f"engine {self.url} refused {path}: status {response.status}, {await response.text():.2000}"
                    )
                if response.content_type != "application/json":
                    return await response.text()
                return await response.json()
        except TimeoutError as error:
            raise EngineError(f"engine {self.url} did not answer {path} within {limit:g} s") from error
        except aiohttp.ClientError as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyOpenFilesError(error) from error
            raise EngineError(
                f"engine {self.url} is gone: {path} failed with {error!r}; its log is in the run folder under engines/"
            ) from error

    def _completion(self, answer: dict[str, Any]) -> Completion:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] not in ("stop", "length", "abort"):
            raise EngineError(f"engine {self.url} ended a sample with {reason!r:.500}")
        response_ids = tuple(answer["output_ids"])
        log_probs = tuple(entry[0] for entry in meta.get("output_token_logprobs", ()))  # absent if it never began
        assert len(log_probs) == len(response_ids), f"{len(log_probs)} log-probs for {len(response_ids)} tokens"
        for position, log_prob in enumerate(log_probs):
            if log_prob is None or not math.isfinite(log_prob):  # JSON has no NaN: SGLang writes null
                raise EngineError(
                    f"engine {self.url}: the log-prob of token {position} of a response is {log_prob}, not a finite "
                    "number, so its logits are not either: the weights have diverged, or the model overflows in "
                    "model.dtype or with the engine's kernels (engine.extra_arguments)"
                )
        return Completion(
            response_ids=response_ids,
            log_probs=log_probs,
            finish_reason=reason["type"],
            weight_versions=tuple(
                (int(span["version"]), span["end"] - span["start"])
                for span in meta.get("weight_versions", ())
                if span["end"] > span["start"]
            ),
        )

    def _routed_experts(self, request: SampleRequest, completion: Completion, answer: dict[str, Any]) -> str | None:
        if not completion.response_ids:
            return None
        answered = answer["meta_info"].get("routed_experts")
        if answered is None:
            raise BadRequestError(
                f"engine {self.url} does not return the experts it chose, which rollout.routing_replay needs; start "
                "it with --enable-return-routed-experts, or turn routing_replay off"
            )
        experts = np.frombuffer(base64.b64decode(answered), dtype=np.int32)
        tokens = len(request.token_ids) + len(completion.response_ids) - 1
        if not experts.size or experts.size % tokens:
            raise EngineError(f"engine {self.url} returned {experts.size} expert choices for {tokens} tokens")
        return encode_routed_experts(experts)


@asynccontextmanager
async def connect(addresses: Sequence[EngineAddress], timeout_seconds: float) -> AsyncIterator[list[EngineClient]]:
    """Clients of several engines, closed together."""
    clients = [EngineClient(address, timeout_seconds) for address in addresses]
    for client in clients:
        await client.__aenter__()
    try:
        yield clients
    finally:
        for client in clients:
            await client.__aexit__()
