"""Console lines as a log file and as a terminal of 80 columns see them."""

import io

import pytest

from megatron_dsrl.observability.console import RunConsole, duration, left
from tests.observability.synthetic_run import evaluation_record

RECORD = {
    "step": 7,
    "phase": "nsr-prerl",
    "reward/mean": 0.4125,
    "reward/solved_groups": 3,
    "reward/unsolved_groups": 5,
    "reward/mixed_groups": 24,
    "reward/verifier_timeouts": 2,
    "reward/verifier_errors": 0,
    "response/mean_tokens": 231.4,
    "response/truncated_fraction": 0.0125,
    "response/conditional_entropy": 0.5312,
    "policy/grad_norm": None,
    "pre_train/mean_log_prob_gap": 0.4401,
    "throughput/tokens_per_second": 1834.2,
    "seconds/generate": 8.12,
    "seconds/push_weights": 0.5,
    "seconds/step": 12.0,
}
SMALL = {
    "step": 12,
    "phase": "GRPO",
    "reward/mean": 0.2344,
    "reward/solved_groups": 3,
    "reward/unsolved_groups": 5,
    "reward/mixed_groups": 24,
    "response/mean_tokens": 24.1,
    "response/truncated_fraction": 0.0,
    "mismatch/mean_log_prob_gap": 2.3e-7,
    "seconds/step": 1.4,
}
LARGE = SMALL | {
    "step": 120,
    "reward/solved_groups": 14,
    "reward/unsolved_groups": 11,
    "reward/mixed_groups": 103,
    "response/mean_tokens": 3841.0,
    "response/truncated_fraction": 0.062,
    "mismatch/mean_log_prob_gap": 0.0021,
    "seconds/step": 273.4,
}
"""A step of Qwen3-8B."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """80 columns, without colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


def lines(stream: io.StringIO) -> list[str]:
    """What is to be read, without the terminal's control sequences (bold)."""
    return stream.getvalue().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()


def test_a_step_is_one_plain_line_in_a_log_and_failures_are_a_second_one() -> None:
    stream = io.StringIO()
    console = RunConsole(100, stream=stream)
    with console.generation(step=7, samples=2) as advance:
        advance(1)
    with console.doing(7, "update"):
        console.step(RECORD)
    assert lines(stream) == [
        "step   7/100 nsr-prerl  reward 0.412  mixed 24/32  len 231  cut 1%  prompt gap 0.44  12 s, 19 min left",
        "    2 verifier timeouts, which scored 0; see examples/troubleshooting: rewards",
    ]


def test_a_step_is_one_line_of_80_columns(terminal) -> None:
    RunConsole(50, stream=terminal).step(SMALL)
    RunConsole(348, stream=terminal).step(LARGE)
    assert lines(terminal) == [
        "step 12/50 GRPO  reward 0.234  mixed 24/32  len 24  gap 2e-7  1.4 s, 53 s left",
        "step 120/348 GRPO  reward 0.234  len 3,841  cut 6%  273 s, 17 h left",
    ]
    assert all(len(line) <= 80 for line in lines(terminal))


def test_everything_about_a_step_is_below_its_line_when_asked_for(terminal) -> None:
    RunConsole(100, verbose=True, stream=terminal).step(RECORD)
    assert [line.rstrip() for line in lines(terminal)[2:]] == [
        "    groups: 3 solved, 24 mixed, 5 unsolved",
        "    1.2% truncated, entropy 0.531, 1,834 tokens/s",
        "    seconds: generate 8.1, push weights 0.5",
    ]


def test_an_evaluation_is_one_line() -> None:
    stream = io.StringIO()
    RunConsole(100, stream=stream).evaluation(evaluation_record(0, accuracy=0.5))
    RunConsole(100, stream=stream, verbose=True).evaluation(evaluation_record(5, accuracy=0.5))
    assert lines(stream) == [
        "evaluation after step 0: held-out 50.0% ± 3.1%  len 42  cut 3%",
        "evaluation after step 5: held-out 50.0% ± 3.1%  len 42  cut 3%",
        "    256 problems x 1 samples",
    ]


def test_a_terminal_shows_what_is_done_finished_samples_and_colours(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = RunConsole(100, stream=stream)
    with console.generation(step=7, samples=32) as advance:
        advance(32)
    with console.doing(7, "update"):
        pass
    console.step(RECORD | {"reward/verifier_timeouts": 0})
    assert "step 7/100: samples" in stream.getvalue() and "32/32" in stream.getvalue()
    assert "step 7/100: update" in stream.getvalue()
    assert "\x1b[" in stream.getvalue().splitlines()[-1]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (41.6, 200, 18720, 183600)] == [
        "42 s", "3 min 20 s", "5 h 12 min", "2 d 3 h",
    ]  # fmt: skip
    assert [left(seconds) for seconds in (41.6, 119, 200, 18720, 183600)] == [
        "42 s left", "119 s left", "3 min left", "5 h left", "2 d left",
    ]  # fmt: skip


def test_supervised_training_shows_its_losses() -> None:
    stream = io.StringIO()
    console = RunConsole(total_steps=20, stream=stream)
    loss = {"policy/loss": 1.23456, "data/epoch": 0.5, "response/mean_tokens": 60.0, "seconds/step": 2.0}
    console.step({"step": 3, "phase": "SFT", **loss})
    console.evaluation({"step": 3, "set": "chat", "loss": 1.5, "loss_standard_error": 0.02, "seconds": 1.0})
    console.evaluation({"step": 3, "set": "one", "loss": 1.5, "loss_standard_error": None, "seconds": 1.0})
    step, *evaluations = stream.getvalue().splitlines()
    assert step == "step  3/20 SFT  loss 1.2346  epoch 0.50  len 60  2.0 s, 34 s left"
    assert evaluations == [
        "evaluation after step 3: chat loss 1.5000 ± 0.0200  1.0 s",
        "evaluation after step 3: one loss 1.5  1.0 s",
    ]
