"""The key that SGLang servers ask for (`--api-key`): servers of other people's making, and a run's own ones where they
listen on more than loopback."""

import os
import secrets

from megatron_dsrl.common.collective import broadcast

API_KEY_VARIABLE = "DSRL_ENGINE_API_KEY"
"""Environment variable with the key. It is no configuration field: configurations are copied into run folders."""


def agree_on_key() -> None:
    """Give all ranks one key, drawn for this run unless rank 0 has one; engines inherit it. All ranks call it."""
    os.environ[API_KEY_VARIABLE] = broadcast(os.environ.get(API_KEY_VARIABLE) or secrets.token_hex(32))


def engine_headers() -> dict[str, str]:
    """HTTP headers of every call to an engine."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
