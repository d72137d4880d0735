"""How pytest-xdist spreads the tests over its workers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support.forked import REPOSITORY

ONE_ENGINE = "tests/rollout"
"""Tests of this folder share one engine, which is started once if one worker runs them all."""

LONGEST_FIRST = (
    ONE_ENGINE,
    "tests/test_resume.py",
    "tests/actor/test_layouts.py",
    "tests/evaluation/test_evaluate.py",
    "tests/test_train.py",
    "tests/test_train_two_processes.py",
    "tests/actor/test_critic.py",
    "tests/actor/test_saved_state.py",
    "tests/examples/test_laboratory.py",
    "tests/run",
    "tests/configs",
)
"""Tests that take half a minute or more, so that no worker begins one when the others have finished."""


class SpreadFiles(LoadFileScheduling):
    """All tests of a file go to one worker, which sets up what they share once; so do those of `ONE_ENGINE`."""

    def _split_scope(self, nodeid: str) -> str:
        return ONE_ENGINE if nodeid.startswith(f"{ONE_ENGINE}/") else super()._split_scope(nodeid)


def spread_files(config: pytest.Config, log: object) -> SpreadFiles:
    """The scheduler; it takes the files in the order of the collection."""
    config.option.loadscopereorder = False
    return SpreadFiles(config, log)


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests file by file, beginning with those of `LONGEST_FIRST`."""
    return sorted(items, key=lambda item: _place(item.path))


def _place(file: Path) -> int:
    folders_and_file = [file.relative_to(REPOSITORY), *file.relative_to(REPOSITORY).parents]
    places = [LONGEST_FIRST.index(str(path)) for path in folders_and_file if str(path) in LONGEST_FIRST]
    return min(places, default=len(LONGEST_FIRST))
