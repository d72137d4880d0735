"""Which tests go to one process, and which go first."""

from types import SimpleNamespace

import pytest

pytest.importorskip("xdist")

from tests.support.forked import REPOSITORY  # noqa: E402
from tests.support.workers import LONGEST_FIRST, ONE_ENGINE, SpreadFiles, longest_first  # noqa: E402


def test_everything_that_goes_first_exists() -> None:
    assert all((REPOSITORY / name).exists() for name in LONGEST_FIRST)


def test_long_files_go_first_and_the_rest_keeps_its_order() -> None:
    names = ["tests/a.py", "tests/test_resume.py", "tests/rollout/engines/test_server.py", "tests/b.py"]
    items = [SimpleNamespace(path=REPOSITORY / name) for name in names]
    assert [item.path for item in longest_first(items)] == [REPOSITORY / names[index] for index in (2, 1, 0, 3)]


def test_tests_that_share_an_engine_go_to_one_process() -> None:
    scheduler = SpreadFiles.__new__(SpreadFiles)
    for file in ("rollout/test_rollout.py", "rollout/engines/test_weight_push.py"):
        assert scheduler._split_scope(f"tests/{file}::test_it[rollout::x]") == ONE_ENGINE
    assert scheduler._split_scope("tests/test_cli.py::TestIt::test_it") == "tests/test_cli.py"
