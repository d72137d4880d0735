"""The whole repository passes ruff's checks and is formatted by it."""

import pytest

from tests.support.linters import complaints


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(command) -> None:
    assert complaints("ruff", *command, "--quiet", "--no-cache", ".") == ""
