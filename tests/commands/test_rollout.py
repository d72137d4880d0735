"""`dsrl samples` on a run folder on disk; with token log-probs it is tested in tests/test_train.py."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_dsrl.analysis.sample_view import ResponseLogProbs, print_group
from megatron_dsrl.cli import main
from megatron_dsrl.rollout.recording import read_groups, rollout_file, write_groups
from megatron_dsrl.rollout.sample import SampleGroup
from tests.observability.synthetic_run import make_group, make_sample, write_run

TAKES_THE_TERMINAL = "\x1b]0;owned\x07 [red]right[/red] \\boxed{2}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder, steps=3, warmup=1)
    return folder


def printed(group: SampleGroup, terminal: bool, **arguments) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
    print_group(group, **({"log_probs": [None] * len(group.samples), "token_text": None} | arguments), console=console)
    return stream.getvalue()


def test_a_prompt_of_a_step_is_printed_with_all_its_samples(run, capsys) -> None:
    assert main(["samples", str(run), "--step", "2", "--prompt", "3"]) == 0
    out = capsys.readouterr().out
    (group,) = [group for group in read_groups(rollout_file(run, 2)) if group.prompt.index == 3]
    assert "What is 3 + 3?" in out and "answer 6" in out and "step 2: 1 of 8 prompts" in out
    for number, sample in enumerate(group.samples):
        ending = "stopped" if sample.finish_reason == "stop" else "truncated"
        line = f"sample {number} | reward {sample.reward:g} | {len(sample.response_ids)} tokens, {ending}"
        assert line in out
        assert sample.text in out
    assert "engine log P(y|x) -0.500 per token" in out
    assert "\x1b" not in out  # the output is not a terminal


def test_the_last_step_and_a_few_prompts_without_being_asked(run, capsys) -> None:
    assert main(["samples", str(run)]) == 0
    assert "step 3: 4 of 8 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--step", "9"], "3 steps from 1 to 3"), (["--step", "2", "--prompt", "77"], "0, 1, 2, 3, 4, 5, 6, 7")],
)
def test_what_was_not_recorded_is_named(run, capsys, arguments, message) -> None:
    assert main(["samples", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_response_cannot_take_over_the_terminal(tmp_path) -> None:
    group = SampleGroup(make_group([]).prompt, (make_sample(1.0, text=TAKES_THE_TERMINAL),))
    write_groups(rollout_file(tmp_path, 1), [group])
    out = printed(read_groups(rollout_file(tmp_path, 1))[0], terminal=True)
    assert "\\x1b]0;owned\\x07 [red]right[/red] \\boxed{2}" in out
    assert "\x1b]" not in out and "\x1b[1;32m" in out  # colours are ours only


def test_tokens_in_both_spaces_and_a_first_token_that_nothing_stands_before() -> None:
    group = make_group([0.0], verdict="timeout", finish_reason="length")
    scores = ResponseLogProbs(with_prompt=[-0.5, -2.0, -0.25], without_prompt=[None, -3.0, -0.125])
    out = printed(group, terminal=False, log_probs=[scores], token_text=lambda token: f"t{token}\n")
    assert "reward 0 (verifier: timeout) | 3 tokens, truncated" in out
    assert "log P(y|x) -0.917 | log P(y) -1.562" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("t") and "\\n" in line]
    assert rows == [
        ["t0\\n", "-0.500", "-0.500"],
        ["t1\\n", "-0.500", "-2.000", "-3.000", "1.000"],
        ["t2\\n", "-0.500", "-0.250", "-0.125", "-0.125"],
    ]


def test_tokens_that_are_not_the_models_have_no_log_probs() -> None:
    sample = replace(make_sample(1.0, tokens=3), log_probs=(-1.0, 0.0, -2.0), scored=(True, False, True))
    group = SampleGroup(make_group([]).prompt, (sample,))
    scores = ResponseLogProbs(with_prompt=[-1.5, None, -2.5], without_prompt=[-4.0, None, -3.0])
    out = printed(group, terminal=False, log_probs=[scores], token_text=lambda token: f"t{token}|")
    assert "engine log P(y|x) -1.500 per token | trainer log P(y|x) -2.000 | log P(y) -3.500" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("t") and "|" in line.split()[0]]
    assert [len(row) for row in rows] == [5, 1, 5]
