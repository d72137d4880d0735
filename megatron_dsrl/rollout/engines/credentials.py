"""The key of SGLang servers (`--api-key`): external servers, and the run's own where they listen beyond loopback."""

import os
import secrets

from megatron_dsrl.common.collective import broadcast

API_KEY_VARIABLE = "DSRL_ENGINE_API_KEY"
"""Environment variable with the key. Not a configuration field, since configurations are copied into run folders."""


def agree_on_key() -> None:
    """Give all ranks rank 0's key, or a new random one if it has none; engines inherit it. All ranks call it."""
    os.environ[API_KEY_VARIABLE] = broadcast(os.environ.get(API_KEY_VARIABLE) or secrets.token_hex(32))


def engine_headers() -> dict[str, str]:
    """HTTP headers of every call to an engine."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
