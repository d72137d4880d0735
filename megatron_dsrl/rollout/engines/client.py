"""HTTP calls to one SGLang server, each with a time limit and a checked answer.

Unlike SGLang 0.5.23's own client, which ignores `success: false` in the answer to a weight call, a refusal is an error
here; so is `update_weights_from_tensor` outside a weight update.
"""

import errno
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal, Self

import aiohttp
import orjson

from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.errors import BadRequestError, EngineError
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest, generate_body, read_completions
from megatron_dsrl.rollout.engines.packed_answers import MEDIA_TYPE, read_json, unpack
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError
from megatron_dsrl.rollout.sample import SamplingParameters

MemoryTag = Literal["weights", "kv_cache"]


class EngineClient:
    """Calls to one server. An asynchronous context manager that holds the connections.

    Every call raises `EngineError` if the server refuses it, is gone, or takes longer than `timeout_seconds`. Only
    `generate` has its own limit.
    """

    def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
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
            sampling: its length limit is not used, since each request has its own.
            timeout_seconds: limit of the whole call; None: no limit.

        Raises:
            BadRequestError: the engine refused the request itself, such as one that is too long.
            EngineError: the engine is busy or gone, or returned a log-prob that is not a finite number.
            TooManyOpenFilesError: this process has no descriptor for the connection.
        """
        body, accept = generate_body(requests, sampling), {"Accept": MEDIA_TYPE}
        answers = await self._request("POST", "/generate", body, timeout_seconds, accept)
        try:
            return read_completions(answers, requests, sampling)
        except EngineError as error:
            raise type(error)(f"engine {self.url}: {error}") from error

    async def abort_all(self) -> None:
        """End all running requests now; they return the tokens sampled so far."""
        await self._post("/abort_request", {"abort_all": True})

    async def check_health(self, timeout_seconds: float) -> None:
        """Check that the scheduler makes progress; an idle one has to sample a token.

        Raises:
            EngineError: no progress within the limit.
        """
        await self._request("GET", "/health", None, timeout_seconds)

    async def begin_weight_update(self) -> None:
        """No request may be running."""
        await self._post_checked("/begin_weight_update", {})

    async def update_weights(self, payload_per_rank: list[str]) -> None:
        """Load one flattened bucket; one serialised payload per tensor-parallel rank of the engine, in rank order.

        Returns when every rank has copied the tensors, so that their memory may be reused. Cached prefixes are dropped,
        or later samples would continue from the old weights' cache. (SGLang's separate flush call also collects
        garbage, which on CPU takes longer than everything else together.)
        """
        body = {"serialized_named_tensors": payload_per_rank, "load_format": "flattened_bucket", "flush_cache": True}
        await self._post_checked("/update_weights_from_tensor", body)

    async def end_weight_update(self) -> None:
        await self._post_checked("/end_weight_update", {})

    async def set_weight_version(self, version: int) -> None:
        """Set the version that samples carry from now on."""
        await self._post_checked("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Give device memory back. The engine must be idle, otherwise SGLang kills the whole engine."""
        # Waits until the scheduler has noticed that nothing is running, and fails if something is.
        await self._post(f"/flush_cache?timeout={self._timeout_seconds:g}", None)
        await self._post("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take released memory again; its contents are undefined until weights are pushed."""
        await self._post("/resume_memory_occupation", {"tags": list(tags)})

    async def weight_digests(self) -> list[dict[str, str]]:
        """For every tensor-parallel rank in order, the digests of its tensors (platform/weight_digest.py), by SGLang's
        names. Servers before SGLang 0.5.23 refuse this."""
        answer = await self._post_checked("/weights_checker", {"action": "checksum", "selector": "target"})
        try:
            ranks = sorted(answer["ranks"], key=lambda each: each["parallelism_info"][0]["rank"])
            return [dict(rank["checksums"]) for rank in ranks]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"engine {self.url}: /weights_checker has no digests: {answer!r:.500}") from error

    async def pause(self) -> None:
        """Stop sampling. Running requests stay in the server and give up their cache; new ones wait.

        They continue after `resume`, with the weights that the server then has; prompt and tokens are computed again.
        (SGLang's mode `in_place` would keep the cache, which the old weights have made.)
        """
        await self._post("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        """Sample again after `pause`; no effect on a server that is not paused."""
        await self._post("/continue_generation", {})

    async def tensor_parallel_size(self) -> int:
        answer = await self._request("GET", "/server_info", None, self._timeout_seconds)
        if not isinstance(answer, dict) or not isinstance(answer.get("tp_size"), int):
            raise EngineError(f"engine {self.url}: /server_info has no tp_size: {answer!r:.500}")
        return answer["tp_size"]

    async def join(self, group_name: str, host: str, port: int, size: int, backend: str) -> None:
        """Have all ranks of the server join a torch.distributed group after its rank 0, the sender, and wait for that.

        Args:
            host, port: the sender's store, at which the group meets.
            size: number of ranks with the sender.
            backend: gloo or nccl.
        """
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._post_checked("/init_weights_update_group", body)

    async def leave(self, group_name: str) -> None:
        await self._post_checked("/destroy_weights_update_group", {"group_name": group_name})

    async def receive_weights(
        self, group_name: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> None:
        """Load one bucket that the sender broadcasts at the same time, and drop all cached prefixes.

        Args:
            names: HF names of the full tensors, which are concatenated without gaps.
            dtypes: attribute names in `torch`, such as `bfloat16`.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        await self._post_checked("/update_weights_from_distributed", body)

    async def _post_checked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST to an endpoint whose answer says whether it succeeded."""
        answer = await self._post(path, body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineError(f"engine {self.url} refused {path}: {answer!r:.2000}")
        return answer

    async def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        return await self._request("POST", path, body, self._timeout_seconds)

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        limit: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The decoded answer; that of `/generate` as a list of `Answer`. `limit` is in seconds; None: no limit."""
        assert self._session is not None, "EngineClient is used outside `async with`"
        try:
            async with self._session.request(
                method, self.url + path, json=body, headers=headers, timeout=aiohttp.ClientTimeout(total=limit)
            ) as response:
                if response.status != 200:
                    kind = BadRequestError if 400 <= response.status < 500 else EngineError
                    raise kind(
                        f"engine {self.url} refused {path}: status {response.status}, {await response.text():.2000}"
                    )
                if response.content_type == MEDIA_TYPE:
                    return unpack(await response.read())
                if response.content_type != "application/json":
                    return await response.text()
                content = await response.read()
                return read_json(content) if path == "/generate" else orjson.loads(content)
        except TimeoutError as error:
            raise EngineError(f"engine {self.url} did not answer {path} within {limit:g} s") from error
        except aiohttp.ClientError as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyOpenFilesError(error) from error
            raise EngineError(
                f"engine {self.url} is gone: {path} failed with {error!r}; its log is in the run folder under engines/"
            ) from error
        except ValueError as error:
            raise EngineError(f"engine {self.url}: the answer to {path} cannot be read: {error}") from error


@asynccontextmanager
async def connect(addresses: Sequence[EngineAddress], timeout_seconds: float) -> AsyncIterator[list[EngineClient]]:
    """Clients of several engines, closed together."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(EngineClient(address, timeout_seconds)) for address in addresses]
