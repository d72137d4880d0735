"""Rollouts on disk: one JSON line per group. Reading gives back exactly what was written."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.errors import UserError
from megatron_dsrl.rollout.sample import Group, Sample


def rollout_file(run_folder: Path, step: int) -> Path:
    """Where the rollouts of a step (counted from 1) lie in a run folder."""
    return run_folder / "rollouts" / f"step_{step:06d}.jsonl"


def write_groups(file: Path, groups: Sequence[Group]) -> None:
    """Write all groups of a step; the file appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with open(partial, "w", encoding="utf-8") as stream:
        for group in groups:
            stream.write(json.dumps(asdict(group), ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def read_groups(file: Path) -> list[Group]:
    """
    Raises:
        UserError: The file is missing, or a line is not a group.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            lines = list(stream)  # not splitlines(): that also splits at characters which a response may hold
    except FileNotFoundError as error:
        raise UserError(f"no saved rollouts: {file} does not exist") from error
    groups = []
    for number, line in enumerate(lines, start=1):
        try:
            groups.append(_group(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: not a group of saved rollouts ({error!r})") from error
    return groups


def _group(record: dict[str, Any]) -> Group:
    return Group(
        prompt=Prompt(**_with_tuples(record["prompt"], "token_ids")),
        samples=tuple(Sample(**_with_tuples(sample, "response_ids", "log_probs")) for sample in record["samples"]),
    )


def _with_tuples(record: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: tuple(value) if name in fields else value for name, value in record.items()}
