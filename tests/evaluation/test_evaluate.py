"""`dsrl eval` with a real engine: refused while another one runs, killed, continued, finished."""

import json
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common import folder_lock
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.evaluation.evaluate import EvaluationRequest, evaluate
from megatron_dsrl.evaluation.sample_file import read_sample_file
from megatron_dsrl.observability.records import read_starts
from tests.support.tiny_run import dsrl, processes_left_behind, start_dsrl, write_tiny_run

BENCHMARK = """
title: Sums
reward: {function: tests.support.reward_functions:even_length, workers: 1}
system_prompt: null
max_prompt_tokens: 64
samples_per_prompt: 8
max_response_tokens: 48
file: {source: sums.jsonl}
"""
PROBLEMS = 16
ENGINE = ["engine.max_total_tokens=8192", "engine.max_outstanding_samples=16", "model.dtype=float32"]
LIMIT_SECONDS = 240
pytestmark = pytest.mark.timeout(600)


def finished_samples(file) -> list[str]:
    """Lines of the sample file."""
    return file.read_bytes().decode().split("\n")[1:-1] if file.exists() else []


def has_a_begun_problem(file) -> bool:
    """Whether a problem has some of its eight samples in the file."""
    samples = Counter(json.loads(line)["index"] for line in finished_samples(file))
    return any(number < 8 for number in samples.values())


def stop_within_a_problem(process, file) -> None:
    """Stop the process at a moment when a problem has some of its samples, however slow the machine."""
    deadline = time.monotonic() + LIMIT_SECONDS
    process.send_signal(signal.SIGSTOP)
    while not has_a_begun_problem(file) and process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)


@dataclass(frozen=True)
class Continued:
    """An evaluation that was refused a second process, killed within a problem, and continued to its end."""

    request: EvaluationRequest
    process_id: int
    refusal: str
    """The message that a second evaluation got while the first one ran."""
    left_behind: list[str]
    """Processes that outlived the killed one."""
    lines_before: list[str]
    """Content of the sample file when the first evaluation was killed."""
    printed: str
    """Output of the evaluation that continued."""

    @property
    def file(self) -> Path:
        return self.request.output / "samples" / "amc23.jsonl"

    def results(self) -> dict:
        return json.loads((self.request.output / "results.json").read_text())["benchmarks"]["amc23"]

    def changed(self, **fields: object) -> EvaluationRequest:
        return replace(self.request, **fields)


@pytest.fixture(scope="module")
def continued(tmp_path_factory) -> Continued:
    """Results of evaluating a Megatron checkpoint by the command."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_tiny_run(folder)
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "sums.jsonl").write_text("".join(lines[:PROBLEMS]))
    (folder / "amc23.yaml").write_text(BENCHMARK)
    converted = dsrl("convert", "hf-to-megatron", str(folder / "model"), str(folder / "megatron"))
    assert converted.returncode == 0, converted.stderr
    model, benchmarks, output = str(folder / "megatron"), [str(folder / "amc23.yaml")], folder / "evaluation"
    command = ["eval", model, "--benchmarks", *benchmarks, "--data-folder", str(folder), "--output", str(output)]
    request = EvaluationRequest(model=model, benchmarks=benchmarks, output=output, data_folder=folder, overrides=ENGINE)

    process = start_dsrl(*command, *ENGINE)
    file = output / "samples" / "amc23.jsonl"
    stop_within_a_problem(process, file)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as refusal:
        patch.setattr(folder_lock, "WAIT_SECONDS", 0.0)
        evaluate(request)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left_behind, lines_before = processes_left_behind(), finished_samples(file)
    assert len(lines_before) < 8 * PROBLEMS and has_a_begun_problem(file)

    continued = dsrl(*command, *ENGINE, timeout_seconds=LIMIT_SECONDS)
    assert continued.returncode == 0, continued.stderr
    return Continued(request, process.pid, str(refusal.value), left_behind, lines_before, continued.stdout)


def test_a_running_evaluation_is_the_only_one_and_leaves_no_process(continued) -> None:
    used_by = f"{continued.request.output} is in use by process {continued.process_id} on {socket.gethostname()}"
    assert used_by in continued.refusal and continued.left_behind == []


def test_a_killed_evaluation_continues_without_sampling_anything_twice(continued) -> None:
    lines = finished_samples(continued.file)
    assert lines[: len(continued.lines_before)] == continued.lines_before
    numbers = sorted((sample["index"], sample["first"]) for sample in map(json.loads, lines))
    assert numbers == [(index, number) for index in range(PROBLEMS) for number in range(8)]
    problems = read_sample_file(continued.file)
    for problem in problems:
        assert [s.reward for s in problem.samples] == [float(len(s.text) % 2 == 0) for s in problem.samples]
        assert len({s.text for s in problem.samples}) > 1  # each has its own random numbers
    rewards = [sample.reward for problem in problems for sample in problem.samples]
    assert continued.results()["accuracy"] == pytest.approx(sum(rewards) / (8 * PROBLEMS))
    assert f"| Sums | {PROBLEMS} | 8 |" in continued.printed


def test_an_evaluation_fills_its_cell_of_the_papers_table_which_names_the_difference(continued, capsys) -> None:
    assert main(["table", f"base={continued.request.output}"]) == 0
    table = capsys.readouterr().out
    assert f"| base |  | {100 * continued.results()['accuracy']:.1f} |  |" in table
    assert f"- base, Sums ({continued.request.output}): 8 samples per problem" in table


def test_a_finished_evaluation_is_only_reported_without_engines(continued, capsys) -> None:
    """In this process, which could not start an engine unnoticed."""
    output = continued.request.output
    starts = read_starts(output)
    assert [start["command"] for start in starts] == ["eval", "eval"], "the killed one and the one that continued"
    assert starts[0]["model"]["fingerprint"] == starts[1]["model"]["fingerprint"]
    assert starts[0]["evaluation_sets"]["amc23"]["prompts"] == PROBLEMS
    logs = [(output / "engines").stat().st_mtime_ns, (output / "engines" / "engine_0.log").stat().st_mtime_ns]
    evaluate(continued.request)
    assert f"| Sums | {PROBLEMS} | 8 |" in capsys.readouterr().out
    assert read_starts(output) == starts
    assert logs == [(output / "engines").stat().st_mtime_ns, (output / "engines" / "engine_0.log").stat().st_mtime_ns]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overrides": [*ENGINE, "seed=2"]}, "was made with other settings .*seed: 1 then, 2 now"),
        ({"changes": {"max_response_tokens": 4096}}, "max_response_tokens = 4096 do not fit into the model's 256"),
        ({"changes": {"temperature": 0.0}}, "temperature 0 is greedy decoding, so 8"),
    ],
)
def test_other_settings_are_refused(continued, fields, message) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(continued.changed(**fields))
