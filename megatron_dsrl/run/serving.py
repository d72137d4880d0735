"""An SGLang server outside a run, for its `engine.urls`: `dsrl serve`."""

import time
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.platform.engine import LOOPBACK, engine_environment
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE, external_key
from megatron_dsrl.rollout.engines.errors import EngineStartError
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_arguments import engine_threads, server_arguments

POLL_SECONDS = 0.5


def serve(config: RunConfig, host: str, port: int) -> None:
    """Start a server with the settings of the run's engines and wait until it ends. `host` is the address to listen on;
    any but the loopback address needs a key. Raises UserError if the server cannot be started or has ended."""
    if host not in (LOOPBACK, "localhost") and external_key() is None:
        raise UserError(
            f"--host {host}: every machine that reaches it could change the weights; set {API_KEY_VARIABLE} to a "
            "secret key, here and where the run starts"
        )
    folder = resolve_model_folder(config.model.path)
    config = config.with_fields("model", path=str(folder))
    log_file = Path(config.output_dir) / "servers" / f"{port}.log"
    server = EngineServer(
        server_arguments(config, 0),
        engine_environment(config.engine.tensor_parallel_size, engine_threads(config)),
        log_file,
        config.engine.startup_timeout_seconds,
        host,
        port,
        external_key(),
    )
    try:
        server.start()
        server.wait_until_ready()
        print(f"serving {config.model.path} at {server.url}; log: {log_file}", flush=True)
        while True:
            time.sleep(POLL_SECONDS)
            server.check_alive()
    except EngineStartError as error:
        raise UserError(str(error)) from error
    finally:
        server.stop()
