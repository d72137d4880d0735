"""The settings of a server, as SGLang chose them: recorded beside the server's log."""

import json
from pathlib import Path
from typing import Any

SETTINGS = (
    "version", "tp_size", "attention_backend", "prefill_attention_backend", "decode_attention_backend",
    "sampling_backend", "disable_cuda_graph", "cuda_graph_config", "dtype", "kv_cache_dtype", "quantization",
    "max_total_num_tokens", "max_running_requests", "mem_fraction_static", "chunked_prefill_size",
)  # fmt: skip
"""Recorded fields of SGLang's /server_info. Others may be secrets, such as `api_key`."""


def settings_file(log_file: Path) -> Path:
    """The file for the server with this log: `engine_0.json` beside `engine_0.log`."""
    return log_file.with_suffix(".json")


def write_settings(answer: bytes, log_file: Path) -> None:
    """Write the settings from an answer of `/server_info`. Raises ValueError if it is not a JSON object."""
    told = json.loads(answer)
    if not isinstance(told, dict):
        raise ValueError(f"/server_info answered {answer!r:.200}")
    settings = {name: told[name] for name in SETTINGS if name in told}
    settings_file(log_file).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(log_file: Path) -> dict[str, Any]:
    """The recorded settings; empty if the server has never been ready."""
    file = settings_file(log_file)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
