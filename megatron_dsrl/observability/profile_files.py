"""Names of the files that hold profiles of steps; see profiler.py."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.observability.timeline import TRACE_FOLDER

_NAME = re.compile(r"profile_rank_(\d+)_step_(\d+)\.json\.gz")


@dataclass(frozen=True)
class ProfileFile:
    """One rank's profile of one step."""

    rank: int
    step: int
    path: Path


def profile_file(run_folder: Path, rank: int, step: int) -> Path:
    """Where a rank's profile of a step is written."""
    return run_folder / TRACE_FOLDER / f"profile_rank_{rank:05d}_step_{step:06d}.json.gz"


def profile_files(run_folder: Path) -> list[ProfileFile]:
    """All profiles of a run, by rank and step."""
    paths = sorted((run_folder / TRACE_FOLDER).glob("profile_rank_*.json.gz"))
    found = ((_NAME.fullmatch(path.name), path) for path in paths)
    return [ProfileFile(int(match[1]), int(match[2]), path) for match, path in found if match]
