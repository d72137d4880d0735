"""SGLang servers that are already running on their own devices (`engine.urls`), instead of an `EngineGroup`.

Only rank 0 talks to them and broadcasts the weights (`weight_broadcast.py`); the other ranks take part in
gathering them. A server that is gone is not restarted, which is its owner's job, but waited for: as soon as it answers
at its URL again, it gets the weights.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from megatron_dsrl.common.collective import broadcast, rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.stop_signals import run_interruptible
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.platform.engine import feed_forward_multiple
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE, EngineAddress, external_key
from megatron_dsrl.rollout.engines.client import EngineClient, MemoryTag
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.tensor_layout import EngineLayout, quantised_buckets
from megatron_dsrl.rollout.engines.weight_broadcast import ServerLink, broadcast_weights
from megatron_dsrl.rollout.engines.weight_check import SentWeights, lines_of_ranks, mismatch_message, wrong_number

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """The result of a push, which rank 0 shares with the other ranks."""

    problems: Mapping[str, str]
    """Why a server does not have the weights, by URL."""
    error: str | None = None
    """Why the run cannot continue."""


class ExternalEngines:
    """Servers started by someone else; implements `Engines`."""

    def __init__(self, config: RolloutSettings, initial_version: int) -> None:
        """Does not connect yet. The servers report `initial_version` until weights are pushed."""
        self._config = config
        self._initial_version = initial_version
        timeout = config.engine.update_timeout_seconds
        key = external_key()
        self.addresses = [EngineAddress(url, key) for url in config.engine.urls]
        self._links = [ServerLink(address, timeout) for address in self.addresses] if rank() == 0 else []
        self._unchecked = {link.url for link in self._links} if config.engine.check_weights != "never" else set()
        self._lost: dict[str, str] = {}
        self.restarts = 0
        """Number of weight pushes to a server that failed and were retried."""

    def start(self) -> None:
        """Nothing to start: the servers are running already."""

    def wait_until_ready(self) -> None:
        error = broadcast(run_interruptible(self._wait_for(self._links, set_version=True)) if rank() == 0 else None)
        if error is not None:
            raise UserError(error)

    def lose(self, problems: Mapping[int, str]) -> None:
        """See `Engines.lose`; also leaves the servers' broadcast groups."""
        for number, problem in problems.items():
            if rank() == 0:
                link = self._links[number]
                self._lost[link.url] = problem
                link.disconnect()

    def restart_lost(self) -> None:
        """Wait until lost servers, which their owner restarts, answer again.

        Raises:
            UserError: one does not answer within `engine.startup_timeout_seconds`. Raised on every rank.
        """
        error = broadcast(run_interruptible(self._wait_for_lost()) if rank() == 0 else None)
        if error is not None:
            raise UserError(error)

    def load(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        """See `Engines.load`. Raises UserError on every rank if a server is lost too often or for too long."""
        outdated, problems = list(self._links), ""
        for attempt in range(self._config.engine.max_restarts + 1):
            self.restart_lost()
            buckets = make_buckets()
            pushed = run_interruptible(self._push(outdated, buckets, version)) if rank() == 0 else None
            for _ in buckets:
                pass
            outcome = broadcast(pushed)
            assert outcome is not None, "rank 0 has pushed"
            if outcome.error is not None:
                raise UserError(outcome.error)
            if not outcome.problems:
                return
            problems = "\n".join(outcome.problems.values())
            self._lost.update(outcome.problems)
            self.restarts += len(outcome.problems)
            outdated = [link for link in self._links if link.url in outcome.problems]
            for url, problem in outcome.problems.items():
                logger.warning("%s did not get weights (attempt %d): %s", url, attempt + 1, problem)
        raise UserError(
            f"engine.urls: weights still did not arrive after engine.max_restarts = {self._config.engine.max_restarts} "
            f"retries: {problems}"
        )

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Nothing to do: the servers do not use the trainer's devices."""

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Nothing to do, as in `release_memory`."""

    def close(self) -> None:
        """Disconnect; the servers keep running. Not collective."""
        for link in self._links:
            try:
                run_interruptible(link.leave())
            except EngineError as error:
                logger.warning("%s", error)

    async def _push(self, links: Sequence[ServerLink], buckets: Iterable[Bucket], version: int) -> Outcome:
        """On rank 0: connect if necessary, broadcast, compare if due."""
        problems: dict[str, str] = {}
        for link in links:
            try:
                if not link.is_connected:
                    await link.connect()
            except EngineError as error:
                problems[link.url] = str(error)
        ready = [link for link in links if link.url not in problems]
        due = [link for link in ready if link.url in self._unchecked]
        expected = {size: self._nothing_sent(size) for size in {link.size for link in due}}
        for sent in chain.from_iterable(expected.values()):
            buckets = sent.watch(buckets)
        if self._config.engine.quantization:
            buckets = quantised_buckets(buckets)
        problems |= await broadcast_weights(ready, buckets, version)
        mismatches = []
        for link in due:
            if link.url not in problems:
                mismatches += await self._mismatch(link, expected[link.size], problems)
        return Outcome(problems, "\n".join(mismatches) or None)

    def _nothing_sent(self, size: int) -> list[SentWeights]:
        """An empty record for each rank of a server of this size."""
        architecture = read_architecture(resolve_model_folder(self._config.model.path))
        layouts = [EngineLayout(architecture, rank, size, feed_forward_multiple()) for rank in range(size)]
        return [SentWeights(layout, self._config.engine.quantization is not None) for layout in layouts]

    async def _mismatch(self, link: ServerLink, expected: Sequence[SentWeights], problems: dict[str, str]) -> list[str]:
        try:
            digests = await link.digests()
        except EngineError as error:
            problems[link.url] = str(error)
            return []
        if wrong := wrong_number(digests, link.size):
            return [mismatch_message(link.url, wrong)]
        differences = [sent.differences(held) for sent, held in zip(expected, digests, strict=True)]
        if any(differences):
            return [mismatch_message(link.url, lines_of_ranks(differences))]
        if self._config.engine.check_weights == "first":
            self._unchecked.discard(link.url)
        return []

    async def _wait_for_lost(self) -> str | None:
        lost = [link for link in self._links if link.url in self._lost]
        limit = self._config.engine.startup_timeout_seconds
        for link in lost:
            logger.warning("waiting for %s, at most %g s: %s", link.url, limit, self._lost[link.url])
        error = await self._wait_for(lost, set_version=False)
        if error is None:
            for link in lost:
                logger.warning("%s answers again", link.url)
            self._lost.clear()
            if self._config.engine.check_weights != "never":
                self._unchecked.update(link.url for link in lost)
        return error

    async def _wait_for(self, links: Sequence[ServerLink], set_version: bool) -> str | None:
        """Wait until all servers answer; returns why one does not, or None."""
        limit = self._config.engine.startup_timeout_seconds
        deadline = time.monotonic() + limit
        for link in links:
            while (problem := await self._problem_of(link, set_version)) is not None:
                if time.monotonic() > deadline:
                    return (
                        f"engine.urls: no SGLang server was ready at {link.url} within engine.startup_timeout_seconds "
                        f"= {limit:g}: {problem}. Start it with this model and the key in {API_KEY_VARIABLE}."
                    )
                await asyncio.sleep(POLL_SECONDS)
        return None

    async def _problem_of(self, link: ServerLink, set_version: bool) -> str | None:
        try:
            async with EngineClient(link.address, self._config.engine.update_timeout_seconds) as client:
                await client.tensor_parallel_size()
                if set_version:
                    await client.set_weight_version(self._initial_version)
        except EngineError as error:
            return str(error)
        return None
