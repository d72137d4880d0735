"""A small valid configuration, written as YAML, that tests vary."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dsrl.config.yaml_text import format_yaml

SMALL = {
    "name": "small",
    "steps": 6,
    "model": {"path": "some/model"},
    "data": {"source": "train.jsonl", "max_prompt_tokens": 100},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 60},
    "actor": {"max_tokens_per_micro_batch": 1000},
    "phases": [
        {
            "name": "warm-up",
            "until_step": 2,
            "space": {"name": "pre_train"},
            "advantage": {"name": "group_mean"},
            "filter": "negative",
        },
        {"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}},
    ],
}


@pytest.fixture
def small() -> dict[str, Any]:
    """Plain data of a valid run: 8 x 4 samples, prompt 100 + response 60, warm-up for 2 of 6 steps."""
    return copy.deepcopy(SMALL)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write plain data (or text) as a YAML file of the test's own folder."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else format_yaml(content), encoding="utf-8")
        return path

    return write_file
