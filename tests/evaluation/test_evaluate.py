"""`dsrl eval` with a real engine: refused while another one runs, killed, continued, finished."""

import json
import signal
import socket
import time
from collections import Counter

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
file: {source: prompts.jsonl}
"""
ENGINE = ["engine.max_total_tokens=8192", "engine.max_outstanding_samples=16", "model.dtype=float32"]
LIMIT_SECONDS = 240


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


@pytest.mark.timeout(600)
def test_an_evaluation_of_a_megatron_checkpoint_is_killed_continued_and_reported(tmp_path, capsys, monkeypatch) -> None:
    write_tiny_run(tmp_path)
    (tmp_path / "amc23.yaml").write_text(BENCHMARK)
    converted = dsrl("convert", "hf-to-megatron", str(tmp_path / "model"), str(tmp_path / "megatron"))
    assert converted.returncode == 0, converted.stderr
    output = tmp_path / "evaluation"
    command = ["eval", str(tmp_path / "megatron"), "--benchmarks", str(tmp_path / "amc23.yaml")]
    command += ["--data-folder", str(tmp_path), "--output", str(output), *ENGINE]
    file = output / "samples" / "amc23.jsonl"
    request = EvaluationRequest(
        model=str(tmp_path / "megatron"),
        benchmarks=[str(tmp_path / "amc23.yaml")],
        output=output,
        data_folder=tmp_path,
        overrides=ENGINE,
    )

    process = start_dsrl(*command)
    stop_within_a_problem(process, file)
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.0)
    with pytest.raises(UserError, match=f"{output} is in use by process {process.pid} on {socket.gethostname()}"):
        evaluate(request)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished_samples(file)
    assert len(before) < 320 and has_a_begun_problem(file)
    assert processes_left_behind() == []

    continued = dsrl(*command, timeout_seconds=LIMIT_SECONDS)
    assert continued.returncode == 0, continued.stderr
    lines = finished_samples(file)
    assert lines[: len(before)] == before  # nothing is sampled twice
    numbers = sorted((sample["index"], sample["first"]) for sample in map(json.loads, lines))
    assert numbers == [(index, number) for index in range(40) for number in range(8)]
    problems = read_sample_file(file)
    for problem in problems:
        assert [s.reward for s in problem.samples] == [float(len(s.text) % 2 == 0) for s in problem.samples]
        assert len({s.text for s in problem.samples}) > 1  # each has its own random numbers
    results = json.loads((output / "results.json").read_text())["benchmarks"]["amc23"]
    rewards = [sample.reward for problem in problems for sample in problem.samples]
    assert results["accuracy"] == pytest.approx(sum(rewards) / 320)
    assert "| Sums | 40 | 8 |" in continued.stdout

    # It fills its cell of the paper's table, which says what is not as in the paper.
    assert main(["table", f"base={output}"]) == 0
    table = capsys.readouterr().out
    assert f"| base |  | {100 * results['accuracy']:.1f} |  |" in table
    assert f"- base, Sums ({output}): 8 samples per problem" in table

    # A finished evaluation is only reported, without engines: in this process, which could not start one unnoticed.
    starts = read_starts(output)
    assert [start["command"] for start in starts] == ["eval", "eval"], "the killed one and the one that continued"
    assert starts[0]["model"]["fingerprint"] == starts[1]["model"]["fingerprint"]
    assert starts[0]["evaluation_sets"]["amc23"]["prompts"] == 40
    logs = (output / "engines").stat().st_mtime_ns, (output / "engines" / "engine_0.log").stat().st_mtime_ns
    evaluate(request)
    assert "| Sums | 40 | 8 |" in capsys.readouterr().out
    assert read_starts(output) == starts
    assert logs == ((output / "engines").stat().st_mtime_ns, (output / "engines" / "engine_0.log").stat().st_mtime_ns)

    with pytest.raises(UserError, match="was made with other settings .*seed: 1 then, 2 now"):
        evaluate(EvaluationRequest(**{**request.__dict__, "overrides": [*ENGINE, "seed=2"]}))
    with pytest.raises(UserError, match="max_response_tokens = 4096 do not fit into the model's 256"):
        evaluate(EvaluationRequest(**{**request.__dict__, "changes": {"max_response_tokens": 4096}}))
    with pytest.raises(UserError, match="temperature 0 is greedy decoding, so 8"):
        evaluate(EvaluationRequest(**{**request.__dict__, "changes": {"temperature": 0.0}}))
