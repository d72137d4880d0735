"""Fixtures that several folders share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from megatron_dsrl.config.run import RunConfig

# Hypothesis's own profile for busy machines: the same examples in every run, and no time limit for a single one.
settings.load_profile("ci")

# In the background of a shell SIGINT is ignored, which the programs that tests interrupt would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        from tests.support.workers import longest_first

        items[:] = longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.workers import spread_files

    return spread_files(config, log)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The data sets that are not part of the repository: `DSRL_TEST_DATA`, or `shared/data` beside it."""
    folder = Path(os.environ.get("DSRL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set DSRL_TEST_DATA")
    return folder


@pytest.fixture
def isolation() -> None:
    """Skips the test where programs cannot be isolated."""
    from megatron_dsrl.rewards.sandbox_isolation import missing_isolation

    if problem := missing_isolation():
        pytest.skip(problem)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder with the tiny random Qwen3 that the shared engine starts from."""
    from tests.support.tiny_model import LONG_CONTEXT_TOKENS, make_tiny_qwen3

    folder = tmp_path_factory.mktemp("tiny_qwen3")
    make_tiny_qwen3(folder, tied=True, context_tokens=LONG_CONTEXT_TOKENS)
    return folder


@pytest.fixture(scope="session")
def rewards() -> Iterator:
    """The pool that judges the samples of `engine_rollout` when a test dispatches a batch itself."""
    from megatron_dsrl.rewards.pool import RewardPool
    from tests.support.engine import tiny_run_config

    with RewardPool(tiny_run_config(Path("unused")).reward) as pool:
        yield pool


@pytest.fixture(scope="session")
def engine_rollout(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The rollout side over one real SGLang engine, started once for all tests. Weights: as the last test left them.

    Rewards come from `tests.support.reward_functions:response_length`; text is the token ids, separated by spaces.
    """
    from tests.support.engine import started_rollout, tiny_run_config

    config: RunConfig = tiny_run_config(tiny_model_folder)
    with started_rollout(config, tmp_path_factory.mktemp("run")) as rollout:
        yield rollout
