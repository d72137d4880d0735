"""The reward pool survives everything that a verifier may do."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig, RewardConfig
from megatron_dsrl.rewards.pool import Judgement, RewardPool

FUNCTIONS = "tests.support.reward_functions"
JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "any"}


def judge(config: RewardConfig, *responses: str) -> list[Judgement]:
    with RewardPool(config) as pool:
        futures = [pool.submit(response, "answer") for response in responses]
        return [future.result(timeout=30) for future in futures]


def test_an_endless_verifier_is_killed_and_the_others_are_judged() -> None:
    config = RewardConfig(function=f"{FUNCTIONS}:endless", workers=1, timeout_seconds=1.0)
    start = time.monotonic()

    judgements = judge(config, "fine", "hang", "fine")

    assert judgements == [Judgement(1.0, "ok"), Judgement(0.0, "timeout"), Judgement(1.0, "ok")]
    assert time.monotonic() - start < 10


def test_a_misbehaving_verifier_scores_zero_and_is_counted_and_logged(caplog) -> None:
    config = RewardConfig(function=f"{FUNCTIONS}:misbehaving", options={"weight": 0.5}, workers=2)
    responses = ["raise", "nan", "none", "text", "die", "true", "weight", "fine"]

    with caplog.at_level(logging.WARNING, logger="megatron_dsrl.rewards.pool"):
        judgements = dict(zip(responses, judge(config, *responses), strict=True))

    for response in ("raise", "nan", "none", "text", "die"):
        assert judgements[response] == Judgement(0.0, "error"), response
    assert judgements["true"] == Judgement(1.0, "ok")
    assert judgements["weight"] == Judgement(0.5, "ok")
    assert judgements["fine"] == Judgement(0.25, "ok")
    assert len(caplog.records) == 5
    assert "KeyError" in caplog.text and "died" in caplog.text


def test_an_asynchronous_verifier_keeps_its_event_loop() -> None:
    """Its hints name a class that only type checkers import, so the options' types are not checked."""
    config = RewardConfig(function=f"{FUNCTIONS}:remote", options={"share": 0.5}, workers=1)
    assert judge(config, "fine", "raise", "fine") == [
        Judgement(0.5, "ok"),
        Judgement(0.0, "error"),
        Judgement(0.5, "ok"),
    ]


def test_any_of_several_answers_is_accepted() -> None:
    with RewardPool(RewardConfig(function="boxed", workers=1)) as pool:
        assert pool.submit(r"\boxed{1/2}", "0.7", ["0.5", "3"]).result(timeout=30) == Judgement(1.0, "ok")
        assert pool.submit(r"\boxed{1/2}", "0.7", ["3"]).result(timeout=30) == Judgement(0.0, "ok")


def test_the_response_of_a_killed_worker_is_judged_again(tmp_path) -> None:
    with RewardPool(RewardConfig(function=f"{FUNCTIONS}:killed_once", workers=2)) as pool:
        assert pool.submit("fine", str(tmp_path / "killed")).result(timeout=60) == Judgement(1.0, "ok")
    assert (tmp_path / "killed").exists()


def test_signals_to_all_processes_of_a_job_leave_a_pool_that_judges_and_can_be_closed() -> None:
    """As SLURM sends them before it ends a job; when to stop is up to the trainer alone."""
    with RewardPool(RewardConfig(function=f"{FUNCTIONS}:even_length", workers=2)) as pool:
        assert pool.submit("even", "").result(timeout=60) == Judgement(1.0, "ok")
        children = psutil.Process().children(recursive=True)
        processes = [child for child in children if "multiprocessing.forkserver" in str(child.cmdline())]
        assert len(processes) >= 2  # the fork server and workers
        for process in processes:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
                process.send_signal(number)
        assert pool.submit("even", "").result(timeout=60) == Judgement(1.0, "ok")


@pytest.mark.parametrize(
    ("response", "judgement"),
    [
        ("unpicklable", Judgement(0.0, "error")),
        ("exit", Judgement(0.0, "error")),
        ("exit with 0", Judgement(0.0, "error")),
        ("stop", Judgement(0.0, "error")),
        ("dict", Judgement(0.0, "error")),
        ("array", Judgement(0.0, "error")),
        ("complex", Judgement(0.0, "error")),
        ("large", Judgement(0.0, "error")),
        ("explosive", Judgement(0.5, "ok")),
        ("float32", Judgement(0.25, "ok")),
        ("int64", Judgement(1.0, "ok")),
        ("bool", Judgement(1.0, "ok")),
    ],
)
def test_every_kind_of_result_leaves_the_others_judged(strange_pool, response, judgement) -> None:
    """Exceptions and results that cannot be pickled, or not be read again; any real scalar is a reward."""
    first, strange, last = [strange_pool.submit(text, "") for text in ("fine", response, "fine")]
    assert strange.result(timeout=30) == judgement
    assert first.result(timeout=30) == last.result(timeout=30) == Judgement(1.0, "ok")


@pytest.fixture(scope="module")
def strange_pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(function=f"{FUNCTIONS}:strange", workers=2)) as pool:
        yield pool


def test_a_verifier_that_fails_on_everything_is_an_error_that_says_why(caplog) -> None:
    config = RewardConfig(function=f"{FUNCTIONS}:strange", workers=1, max_consecutive_errors=16)
    with RewardPool(config) as pool, caplog.at_level(logging.WARNING, logger="megatron_dsrl.rewards.pool"):
        for _ in range(16):
            pool.submit("dict", "").result(timeout=30)
        with pytest.raises(UserError, match=r"has failed on 16 responses .*\{'score': 1.0\} of type dict, which"):
            pool.submit("fine", "")
    assert len(caplog.records) == 5 + 2  # of 16: the first five, the 8th and the 16th


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "judging"])
def test_the_death_of_the_fork_server_changes_no_reward(idle) -> None:
    with RewardPool(RewardConfig(function=f"{FUNCTIONS}:{'even_length' if idle else 'slow'}", workers=2)) as pool:
        if idle:
            assert pool.submit("even", "").result(timeout=60) == Judgement(1.0, "ok")
        judged = [] if idle else [pool.submit("even", "") for _ in range(2)]
        time.sleep(1.0)
        (server,) = [
            child for child in psutil.Process().children() if "multiprocessing.forkserver" in str(child.cmdline())
        ]
        server.kill()
        time.sleep(0.5)
        judged += [pool.submit("even", "") for _ in range(2)]
        assert [future.result(timeout=60) for future in judged] == [Judgement(1.0, "ok")] * len(judged)


def test_a_worker_that_is_stopped_while_it_has_nothing_to_do_is_continued() -> None:
    """It takes no response, so no time limit would begin."""
    before = set(psutil.Process().children(recursive=True))
    with RewardPool(RewardConfig(function=f"{FUNCTIONS}:even_length", workers=1)) as pool:
        assert pool.submit("even", "").result(timeout=60) == Judgement(1.0, "ok")
        started = set(psutil.Process().children(recursive=True)) - before
        max(started, key=psutil.Process.create_time).suspend()
        assert pool.submit("even", "").result(timeout=30) == Judgement(1.0, "ok")


BOMBS = ["9^{9^{9}}", "1000000!", "(" * 5000 + "1" + ")" * 5000, r"\frac{1}{" * 500 + "2" + "}" * 500]


def test_bombs_for_the_verifier_cost_their_limit_and_what_comes_after_them_is_judged() -> None:
    config = RewardConfig(function="math_verify", workers=2, timeout_seconds=1.5)
    start = time.monotonic()

    with RewardPool(config) as pool:
        futures = [pool.submit(rf"\boxed{{{text}}}", "7") for text in (*BOMBS, r"\frac{14}{2}")]
        *bombed, right = [future.result(timeout=60) for future in futures]

    assert bombed[:2] == [Judgement(0.0, "timeout")] * 2
    assert [judgement.reward for judgement in bombed] == [0.0] * len(BOMBS)  # nesting fails early or runs out of time
    assert right == Judgement(1.0, "ok")
    assert time.monotonic() - start < 60


def test_a_verifier_that_takes_too_much_memory_fails_alone() -> None:
    config = RewardConfig(function=f"{FUNCTIONS}:hungry", workers=1, memory_megabytes=512)
    assert judge(config, "hungry", "fine") == [Judgement(0.0, "error"), Judgement(1.0, "ok")]


def test_workers_do_not_import_torch() -> None:
    assert judge(RewardConfig(function=f"{FUNCTIONS}:has_torch"), "any") == [Judgement(0.0, "ok")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("boxd", r"reward.function: unknown verifier 'boxd'; use one of box_format, boxed, .* or a path"),
        ("no_such_package.rewards:f", "reward.function: cannot import `no_such_package.rewards`"),
        (f"{FUNCTIONS}:nothing", "has no function `nothing`"),
        ("./my/rewards.py:f", "`./my/rewards.py` is a file's path; write it with dots: `my.rewards:f`"),
        (f"{FUNCTIONS}:of_trl", r"called as f\(response, answer, \*\*options\), and its parameters are \(completions"),
    ],
)
def test_an_unknown_function_is_named_before_anything_starts(function, message) -> None:
    with pytest.raises(UserError, match=message):
        RewardPool(RewardConfig(function=function))


@pytest.mark.parametrize(
    ("reward", "field"),
    [
        ({"function": "boxd"}, "reward.function: unknown"),
        ({"function": "boxed", "options": {"x": 1}}, "reward.options: boxed does not take"),
        ({"function": "remote", "options": {"url": "x"}}, "reward.options.url: expected"),
        ({"function": "judge", "options": JUDGE | {"fallback": "boxd"}}, "reward.options.fallback: unknown"),
        ({"function": "judge", "options": JUDGE, "timeout_seconds": 60}, "reward.timeout_seconds = 60 would end"),
        (
            {"function": "combination", "options": {"parts": [{"function": "remote", "options": {"url": "x"}}]}},
            "reward.options.parts.0.options.url: expected",
        ),
    ],
)
def test_the_verifier_of_a_set_is_named_by_its_own_section(reward, field) -> None:
    sets = [{"name": "first", "source": "a"}, {"name": "second", "source": "b", "reward": reward}]
    data = DataConfig.model_validate({"source": "c", "mixed_with": sets})
    with pytest.raises(UserError, match=f"^data.mixed_with.1.{field}"):
        RewardPool(RewardConfig(), data.set_rewards)


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("wrong_syntax", "def f(:", r"SyntaxError: invalid syntax \(wrong_syntax.py, line 1\)"),
        ("wrong_name", "x = 1\nundefined", r"NameError: name 'undefined' is not defined \(.*wrong_name.py, line 2\)"),
        ("wrong_exit", "import sys\nsys.exit(3)", r"SystemExit: 3 \(.*wrong_exit.py, line 2\)"),
    ],
)
def test_a_module_that_fails_is_one_message_with_its_line(tmp_path, monkeypatch, module, text, message) -> None:
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"reward.function: cannot import `{module}`: {message}"):
        RewardPool(RewardConfig(function=f"{module}:f"))


def test_a_process_that_is_killed_while_it_judges_leaves_no_messages() -> None:
    """multiprocessing removes its semaphores, and would warn that they leaked."""
    program = """
import os
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.pool import RewardPool
pool = RewardPool(RewardConfig(function="boxed", workers=1))
pool.submit("", "1").result(timeout=60)
os._exit(0)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.stderr == ""
