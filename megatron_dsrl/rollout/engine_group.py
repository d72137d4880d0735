"""The ranks that share one engine: the first of them owns the server, all of them hand it weights."""

import os
import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_dsrl.collective import gather, rank, world_size
from megatron_dsrl.config.layout import engine_problems, refuse
from megatron_dsrl.errors import UserError
from megatron_dsrl.platform.engine import ServerArguments, engine_environment, engine_server_arguments
from megatron_dsrl.rollout.client import EngineError
from megatron_dsrl.rollout.server import EngineServer
from megatron_dsrl.rollout.settings import RolloutSettings
from megatron_dsrl.rollout.weight_push import Bucket, push_weights

DISK_WEIGHT_VERSION = 0
"""Version of the weights that an engine reads from the model folder; the first update makes it 1."""

UNSET_WEIGHT_VERSION = -1
"""Version of an engine that started with arbitrary weights because the model folder has none to use."""


class EngineGroup:
    """This rank's part in the engine of its group. Every method is called on all ranks."""

    def __init__(self, config: RolloutSettings, run_folder: Path) -> None:
        """Group the ranks; start nothing.

        Raises:
            UserError: The world cannot be divided into engines, or settings contradict each other.
        """
        self._config = config.engine
        size = config.engine.tensor_parallel_size
        self._world = world_size()
        refuse(engine_problems(size, self._world))
        engine = rank() // size
        self._owns_server = rank() % size == 0
        timeout = timedelta(seconds=config.parallel.collective_timeout_seconds)
        self._everyone = new_gloo_group(range(self._world), timeout) if self._world > 1 else None
        self._group = None
        if size > 1:
            # new_group is collective: every rank takes part in making every group.
            groups = [new_gloo_group(range(first, first + size), timeout) for first in range(0, self._world, size)]
            self._group = groups[engine]
        host = self._host()
        self._server = EngineServer(
            arguments=server_arguments(config, engine) if self._owns_server else {},
            environment=engine_environment(size),
            log_file=run_folder / "engines" / f"engine_{engine}.log",
            startup_timeout_seconds=config.engine.startup_timeout_seconds,
            host=host,
            port=None if config.engine.port is None else config.engine.port + engine,
        )

    def start(self) -> None:
        """Start the server of this group and return without waiting for it.

        Raises:
            UserError: On every rank, when any server cannot be started.
        """
        self._together(self._server.start)

    def wait_until_ready(self) -> list[str]:
        """URLs of all engines, in the order of their ranks.

        Raises:
            UserError: On every rank, when any server is not ready in time.
        """
        self._together(self._server.wait_until_ready)
        return [url for url in self._from_all(self._own_url()) if url is not None]

    def push(self, buckets: Iterable[Bucket], version: int) -> None:
        """Replace the weights of this group's engine; see `push_weights`.

        Raises:
            EngineError: An engine refused or is gone, on every rank.
        """
        problem = push_weights(buckets, version, self._own_url(), self._group, self._config.update_timeout_seconds)
        problems = dict.fromkeys(each for each in self._from_all(problem) if each is not None)
        if problems:
            raise EngineError("\n".join(problems))

    def call_engine(self, call: Callable[[str], Any]) -> None:
        """Run `call(url)` for every engine, on the rank that owns it."""
        self._together(lambda: call(self._server.url), EngineCallError)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._from_all(None)

    def close(self) -> None:
        """Stop this rank's server. May be called again; not collective, so that a failing rank can call it."""
        self._server.stop()

    def _own_url(self) -> str | None:
        return self._server.url if self._owns_server else None

    def _together(self, action: Callable[[], Any], kind: type[Exception] = UserError) -> None:
        """Run `action` on server owners; where it fails on any, raise its message on all ranks."""
        error: str | None = None
        if self._owns_server:
            try:
                action()
            except (UserError, RuntimeError) as failure:
                error = str(failure)
        messages = [message for message in self._from_all(error) if message is not None]
        if messages:
            self.close()
            raise kind("\n".join(messages))

    def _from_all(self, value: Any) -> list[Any]:
        return gather(value, self._everyone)

    def _host(self) -> str:
        """Loopback on one node; with several, this node's address, which rank 0 can reach."""
        if int(os.environ.get("LOCAL_WORLD_SIZE", self._world)) == self._world:
            return "127.0.0.1"
        # The address from which this node reaches the first one; connecting a datagram socket sends nothing.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 9))
            return probe.getsockname()[0]


class EngineCallError(RuntimeError):
    """A call to an engine failed on some rank."""


def server_arguments(config: RolloutSettings, engine: int) -> ServerArguments:
    """SGLang's `ServerArgs` fields for the engine with this number.

    Raises:
        UserError: Settings contradict each other.
    """
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.engine.max_context_tokens is not None and config.engine.max_context_tokens < longest:
        raise UserError(
            f"engine.max_context_tokens = {config.engine.max_context_tokens} is less than data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}"
        )
    arguments: ServerArguments = {
        "model_path": config.model.path,
        "dtype": config.model.dtype,
        "tp_size": config.engine.tensor_parallel_size,
        "random_seed": config.seed + engine,
        "load_format": "auto" if starts_with_weights(config) else "dummy",
        "weight_version": str(initial_weight_version(config)),
        # Token ids go in and come out: the engine needs neither tokenizer nor detokenizer.
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "stream_interval": 1000,  # nothing is streamed
        "log_level": "warning",
        **engine_server_arguments(config.engine, config.rollout.deterministic),
    }
    if config.engine.max_context_tokens is not None:
        arguments["context_length"] = config.engine.max_context_tokens
    if config.engine.max_total_tokens is not None:
        arguments["max_total_tokens"] = config.engine.max_total_tokens
    return arguments | config.engine.extra_arguments


def initial_weight_version(config: RolloutSettings) -> int:
    """Weight version of an engine that nothing was pushed to."""
    return DISK_WEIGHT_VERSION if starts_with_weights(config) else UNSET_WEIGHT_VERSION


def starts_with_weights(config: RolloutSettings) -> bool:
    """Whether SGLang finds weights to start with: not in a Megatron checkpoint, and not where they are to be drawn."""
    folder = Path(config.model.path)
    return not config.model.random_init and (not folder.is_dir() or any(folder.glob("*.safetensors")))


def new_gloo_group(ranks: Iterable[int], timeout: timedelta) -> torch.distributed.ProcessGroup:
    """A group for Python objects and waiting, whatever the default backend is. It does not inherit a time limit."""
    return torch.distributed.new_group(list(ranks), backend="gloo", timeout=timeout)
