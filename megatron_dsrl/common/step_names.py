"""The entries of a run's folders that are named by their step: `step_000050`, `step_000050.jsonl`."""

import re
from pathlib import Path

_NAME = re.compile(r"step_(\d{6,})")


def step_of(name: str) -> int | None:
    """The step of `step_000050`; None for other names, such as that of a copy, `step_000050_old`."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """The entries `step_000050<suffix>` of a folder by their steps, ascending; none if there is no such folder."""
    entries = folder.iterdir() if folder.is_dir() else ()
    steps = {entry: step_of(entry.name.removesuffix(suffix)) for entry in entries if entry.name.endswith(suffix)}
    return dict(sorted((step, entry) for entry, step in steps.items() if step is not None))
