"""Keys of SGLang servers (`--api-key`)."""

import os
import secrets

from megatron_dsrl.common.collective import broadcast

API_KEY_VARIABLE = "DSRL_ENGINE_API_KEY"
"""Environment variable with the key of external servers (`engine.urls`), and in a server's own process with its key.
Not a configuration field, since configurations are copied into run folders."""


def draw_key() -> str:
    """A random key for the engines that this run starts, the same on all ranks. All ranks call it.

    Without it, every program on the machine could change an engine's weights, and a run could take the engine of
    another run for its own.
    """
    return broadcast(secrets.token_hex(32))


def external_key() -> str | None:
    """The key of external servers, if the environment has one."""
    return os.environ.get(API_KEY_VARIABLE) or None
