"""The key that SGLang servers of other people's making ask for (`--api-key`)."""

import os

API_KEY_VARIABLE = "DSRL_ENGINE_API_KEY"
"""Environment variable with the key. It is no configuration field: configurations are copied into run folders."""


def engine_headers() -> dict[str, str]:
    """HTTP headers of every call to an engine."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
