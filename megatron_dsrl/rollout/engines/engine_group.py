"""The ranks that share one engine: the first of them owns the server, all of them send it weights.

An engine that is gone, hangs or fails a call is lost: it is not called again until the next `restart_lost` or `load`
restarts it. The other engines are not disturbed.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_dsrl.common.collective import gather, rank, world_size
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.stop_signals import run_interruptible
from megatron_dsrl.config.layout import engine_problems, refuse
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.platform.engine import LOOPBACK, compiles_kernels, engine_environment, weights_through_shared_memory
from megatron_dsrl.rollout.engines.address import EngineAddress, address_towards, draw_key
from megatron_dsrl.rollout.engines.client import EngineClient, MemoryTag
from megatron_dsrl.rollout.engines.errors import EngineError, LostEngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket, BucketMemory
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_arguments import engine_threads, server_arguments
from megatron_dsrl.rollout.engines.server_process import ServerProcess
from megatron_dsrl.rollout.engines.supervised_server import SupervisedServer
from megatron_dsrl.rollout.engines.tensor_layout import quantised_buckets
from megatron_dsrl.rollout.engines.warm_up import warm_up
from megatron_dsrl.rollout.engines.weight_check import WeightCheck
from megatron_dsrl.rollout.engines.weight_push import check_shared_memory, push_weights

LOOPBACK_INTERFACE = "lo"


class EngineGroup:
    """SGLang servers on the trainer's devices; implements `Engines`. Each rank's object handles its group's engine."""

    def __init__(self, config: RolloutSettings, run_folder: Path, starting: ServerProcess | None = None) -> None:
        """Group the ranks. Starts nothing. Raises UserError if the world cannot be divided into engines, or settings
        contradict each other."""
        self._all_settings = config
        self._config = config.engine
        size = config.engine.tensor_parallel_size
        self._world = world_size()
        refuse(engine_problems(size, self._world))
        self._engine = engine = rank() // size
        self._problem: str | None = None
        """Why this group's engine is lost; the same on all its ranks, except for problems that only the owner sees."""
        self.restarts = 0
        self.addresses: list[EngineAddress] = []
        self._released: set[MemoryTag] = set()
        """Memory that the engine has given back; a restarted one holds all of it."""
        self._owns_server = rank() % size == 0
        timeout = timedelta(seconds=config.parallel.collective_timeout_seconds)
        self._everyone = new_gloo_group(range(self._world), timeout) if self._world > 1 else None
        self._group = None
        if size > 1:
            # new_group is collective: every rank has to create every group.
            groups = [new_gloo_group(range(first, first + size), timeout) for first in range(0, self._world, size)]
            self._group = groups[engine]
        self._check = WeightCheck(config, self._group)
        self._memory = BucketMemory()
        self._server = self._new_server(run_folder, starting)
        self._supervised = SupervisedServer(self._server, engine, config.engine.max_restarts)

    def _new_server(self, run_folder: Path, starting: ServerProcess | None) -> EngineServer:
        """The engine's server; only its owner starts it."""
        config, engine, host = self._config, self._engine, self._host()
        environment = engine_environment(config.tensor_parallel_size, engine_threads(self._all_settings))
        if host == LOOPBACK:
            environment.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
        key = draw_key()  # collective, so before anything that only one rank may refuse
        return EngineServer(
            arguments=server_arguments(self._all_settings, engine) if self._owns_server else {},
            environment=environment,
            log_file=run_folder / "engines" / f"engine_{engine}.log",
            startup_timeout_seconds=config.startup_timeout_seconds,
            host=host,
            port=None if config.port is None else config.port + engine,
            key=key,
            warm_up=self._warm_up if compiles_kernels() else None,
            starting=starting,
        )

    def start(self) -> None:
        self._together(self._start_server)

    def wait_until_ready(self) -> None:
        self._together(self._supervised.wait_until_ready)
        self._share_state()

    def _warm_up(self, seconds: float) -> None:
        """On the engine's owner, each time it has started."""
        run_interruptible(warm_up(self._server.address, self._all_settings.rollout.routing_replay, seconds))

    def lose(self, problems: Mapping[int, str]) -> None:
        if self._engine in problems:
            self._problem = problems[self._engine]

    def restart_lost(self) -> None:
        """See `Engines.restart_lost`. A restarted engine has the weights of the model folder."""
        if self._owns_server and self._problem is None and self._server.has_ended():
            self._problem = f"the engine at {self._server.url} has exited"
        self._together(lambda: self._restart(self._problem) if self._problem is not None else None)
        self._problem = None
        self._share_state()

    def load(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        """See `Engines.load`, and `push_weights` for the transport."""
        has_old_weights = True
        while any(self._from_all(has_old_weights)):
            self.restart_lost()
            mismatch = None
            if has_old_weights:
                mismatch = self._push(make_buckets(), version)
            else:
                for _ in make_buckets():
                    pass
            mismatches = dict.fromkeys(each for each in self._from_all(mismatch) if each is not None)
            if mismatches:
                self.close()
                raise UserError("\n".join(mismatches))
            has_old_weights = self._problem is not None

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        self._change_memory(tags, released_before=False)

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Like `Engines.resume_memory`; a restarted engine already holds all its memory."""
        self._change_memory(tags, released_before=True)

    def close(self) -> None:
        """Stop this rank's server. Not collective, so that a failing rank can call it."""
        self._server.stop()

    def _push(self, buckets: Iterable[Bucket], version: int) -> str | None:
        """Push weights to this group's engine and compare them if due; returns the differences, or None."""
        engine, timeout = self._own_address(), self._config.update_timeout_seconds
        watched = self._check.watch(buckets)
        sent = quantised_buckets(watched) if self._config.quantization else watched
        self._problem = push_weights(sent, version, engine, self._group, timeout, self._memory)
        try:
            return None if self._problem is not None else self._check.mismatch(engine)
        except EngineError as error:
            self._problem = str(error)
            return None

    def _start_server(self) -> None:
        if weights_through_shared_memory():
            check_shared_memory(self._all_settings, int(os.environ.get("LOCAL_WORLD_SIZE", self._world)))
        self._server.start()

    def _restart(self, problem: str) -> None:
        """On the engine's owner: stop the server and start a new one."""
        self._check.repeat()
        self._released.clear()
        self._supervised.restart(problem)

    def _change_memory(self, tags: Sequence[MemoryTag], released_before: bool) -> None:
        concerned = [tag for tag in tags if (tag in self._released) == released_before]
        if self._owns_server and self._problem is None and concerned:
            try:
                run_interruptible(self._call_memory(concerned, release=not released_before))
                self._released.symmetric_difference_update(concerned)
            except EngineError as error:
                self._problem = str(error)
        self._from_all(None)  # a barrier

    async def _call_memory(self, tags: Sequence[MemoryTag], release: bool) -> None:
        async with EngineClient(self._server.address, self._config.update_timeout_seconds) as client:
            await (client.release_memory(tags) if release else client.resume_memory(tags))

    def _share_state(self) -> None:
        """Tell all ranks every engine's address, which changes if it lost its port, and the number of restarts."""
        state = self._from_all((self._own_address(), self._supervised.restarts))
        self.addresses = [address for address, _ in state if address is not None]
        self.restarts = sum(restarts for _, restarts in state)

    def _own_address(self) -> EngineAddress | None:
        return self._server.address if self._owns_server else None

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action` on server owners. If it fails on any, raise on all ranks with all messages: UserError if one of
        them tells the user what to fix, otherwise LostEngineError."""
        failure: UserError | EngineError | None = None
        if self._owns_server:
            try:
                action()
            except (UserError, EngineError) as error:
                failure = error
        outcome = None if failure is None else (isinstance(failure, UserError), str(failure))
        failures = [each for each in self._from_all(outcome) if each is not None]
        if failures:
            self.close()
            kind = UserError if any(to_fix for to_fix, _ in failures) else LostEngineError
            raise kind("\n".join(message for _, message in failures))

    def _from_all(self, value: Any) -> list[Any]:
        return gather(value, self._everyone)

    def _host(self) -> str:
        """Loopback on a single node; on several, this node's address towards rank 0's."""
        if int(os.environ.get("LOCAL_WORLD_SIZE", self._world)) == self._world:
            return LOOPBACK
        return address_towards(os.environ["MASTER_ADDR"])


def new_gloo_group(ranks: Iterable[int], timeout: timedelta) -> torch.distributed.ProcessGroup:
    """A group for Python objects and barriers, independent of the default backend. Sets its own time limit."""
    return torch.distributed.new_group(list(ranks), backend="gloo", timeout=timeout)
