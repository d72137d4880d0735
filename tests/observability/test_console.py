"""Console lines as a log file and as a terminal see them."""

import io

from megatron_dsrl.observability.console import RunConsole, duration
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_one_plain_line_in_a_log() -> None:
    stream = io.StringIO()
    console = RunConsole(total_steps=100, stream=stream)
    with console.generation(step=7, samples=2) as progress:
        progress.advance()
    console.step(RECORD)
    assert stream.getvalue() == (
        "step   7/100 nsr-prerl | reward 0.412 | groups 3 solved 24 mixed 5 unsolved | 231 tokens, 1.2% truncated"
        " | entropy 0.531 | prompt gap 0.440 | 1,834 tokens/s | 12.0 s (generate 8.1, push weights 0.5)"
        " | 2 verifier timeouts | 18 min 36 s left\n"
    )


def test_an_evaluation_is_one_line() -> None:
    stream = io.StringIO()
    RunConsole(total_steps=100, stream=stream).evaluation(evaluation_record(0, accuracy=0.5))
    assert stream.getvalue() == (
        "evaluation after step 0: held-out 50.0% ± 3.1% | 256 problems x 1 samples | 42 tokens, 3.1% truncated\n"
    )


def test_a_terminal_shows_finished_samples_and_colours(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = RunConsole(total_steps=100, stream=stream)
    with console.generation(step=7, samples=32) as progress:
        progress.advance(32)
    console.step(RECORD)
    assert "step 7/100: samples" in stream.getvalue() and "32/32" in stream.getvalue()
    assert "\x1b[" in stream.getvalue().splitlines()[-1]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (41.6, 200, 18720, 183600)] == [
        "42 s", "3 min 20 s", "5 h 12 min", "2 d 3 h",
    ]  # fmt: skip
