"""Whether the sandbox can isolate programs on this machine."""

import pytest

from megatron_dsrl.rewards.sandbox_isolation import missing_isolation


@pytest.fixture
def isolation() -> None:
    """Skips the test where programs cannot be isolated."""
    if problem := missing_isolation():
        pytest.skip(problem)
