"""The samples of a benchmark on disk: one JSON line per finished sample, written immediately.

The first line has the evaluation's settings, which must be the same when it continues. Each other line has a problem
with one sample, or with consecutive ones, in the order in which they finished.

Written lines survive the death of all processes. fsync is called at most once a second, since it takes tens of
milliseconds on shared file systems: only a machine failure can lose that second.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dsrl.common.disk import writing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.observability.records import append_record, read_records, repair_records
from megatron_dsrl.rollout.sample import Sample, SampleGroup

SYNC_SECONDS = 1.0
WHAT_IS_SAFE = "No finished sample is lost"


@dataclass(frozen=True)
class SampleResult:
    """One judged response."""

    text: str
    tokens: int
    """Response tokens, including the end token."""
    truncated: bool
    """Whether it reached the length limit."""
    reward: float
    verdict: str
    """`ok`, or how the verifier failed; see `rewards.pool.Judgement`."""

    @property
    def right(self) -> bool:
        """Whether it has the full reward; verifiers of answers return 1 or 0."""
        return self.reward >= 1.0

    @classmethod
    def of_sample(cls, sample: Sample) -> "SampleResult":
        """Keep the fields that an evaluation saves."""
        tokens, truncated = len(sample.response_ids), sample.finish_reason == "length"
        return cls(sample.text, tokens, truncated, sample.reward, sample.verdict)


@dataclass(frozen=True)
class ProblemResult:
    """One problem with all its samples, or with consecutive ones, without token ids or log-probs."""

    index: int
    """Row number in its set."""
    prompt: str
    answer: str
    """Gold answer."""
    samples: tuple[SampleResult, ...]
    first: int = 0
    """Number of the first of these samples among all samples of the problem."""
    other_answers: tuple[str, ...] = ()
    """Other gold answers that are accepted."""

    @classmethod
    def of_group(cls, group: SampleGroup) -> "ProblemResult":
        """The result of a group."""
        samples = tuple(map(SampleResult.of_sample, group.samples))
        prompt = group.prompt
        return cls(prompt.index, prompt.text, prompt.answer, samples, other_answers=prompt.other_answers)

    @classmethod
    def of_sample(cls, prompt: Prompt, number: int, sample: Sample) -> "ProblemResult":
        """The result of a single sample with this number."""
        samples = (SampleResult.of_sample(sample),)
        return cls(prompt.index, prompt.text, prompt.answer, samples, number, prompt.other_answers)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "ProblemResult":
        """The inverse of `as_record`. Raises KeyError or TypeError for other records."""
        samples = tuple(SampleResult(**sample) for sample in record["samples"])
        return cls(**{**record, "samples": samples, "other_answers": tuple(record["other_answers"])})

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.samples))

    def as_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def first_responses(problems: Sequence[ProblemResult], count: int) -> list[dict[str, Any]]:
    """The first sample of each of the first problems, as plain values: the same ones at every evaluation of a set."""
    return [
        {"problem": problem.index, "prompt": problem.prompt, "answer": problem.answer, "response": sample.text}
        | {"reward": sample.reward, "tokens": sample.tokens, "truncated": sample.truncated, "verdict": sample.verdict}
        for problem in problems[:count]
        for sample in problem.samples[:1]
    ]


def joined(parts: Sequence[ProblemResult]) -> ProblemResult:
    """Merge the parts of one problem, with its samples in the order of their numbers."""
    samples = {number: sample for part in parts for number, sample in zip(part.numbers, part.samples, strict=True)}
    return replace(parts[0], samples=tuple(samples[number] for number in sorted(samples)), first=0)


class SampleFile:
    """A sample file open for appending; a context manager."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read the existing file, or create it. `settings` are everything that determines the samples. Raises UserError
        if the file was made with other settings, or is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        before, *records = repair_records(path) or [plain]
        if records:
            _check_settings(before, plain, path)
        self._parts = _parts(records, path)
        self._path = path
        self._stream = path.open("ab" if records else "wb", buffering=0)
        self._synced = 0.0
        if not records:  # a file with settings only is written again
            self._write(plain)

    @property
    def problems(self) -> dict[int, ProblemResult]:
        """Problems, by row number, with their samples so far."""
        return {index: joined(parts) for index, parts in self._parts.items()}

    def numbers(self, index: int) -> set[int]:
        """Numbers of a problem's samples so far."""
        return {number for part in self._parts.get(index, ()) for number in part.numbers}

    def add(self, result: ProblemResult) -> None:
        """Append finished samples of a problem. They are in the file when this returns."""
        assert self.numbers(result.index).isdisjoint(result.numbers), f"problem {result.index}: sampled twice"
        self._parts.setdefault(result.index, []).append(result)
        self._write(result.as_record())

    def close(self) -> None:
        """Close the file. All samples are on disk when this returns."""
        self._sync()
        self._stream.close()

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        append_record(self._stream, dict(record), WHAT_IS_SAFE)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        with writing(self._path, WHAT_IS_SAFE):
            os.fsync(self._stream.fileno())
        self._synced = time.monotonic()


def read_sample_file(path: Path) -> list[ProblemResult]:
    """The problems of a sample file, `<evaluation>/samples/<benchmark>.jsonl`, that have all their samples. Raises
    UserError if the file does not exist or is damaged."""
    if not path.is_file():
        raise UserError(f"{path} is neither a run folder nor a sample file of `dsrl eval`")
    settings, *records = read_records(path) or [{}]
    samples_per_prompt = settings.get("benchmark", {}).get("samples_per_prompt", 1)
    problems = [joined(parts) for parts in _parts(records, path).values()]
    problems = [problem for problem in problems if len(problem.samples) >= samples_per_prompt]
    if not problems:
        raise UserError(f"{path} has no finished problem yet")
    return problems


def read_settings(path: Path) -> dict[str, Any]:
    """The evaluation's settings, from the first line of a sample file."""
    return (read_records(path) or [{}])[0]


def _parts(records: list[dict[str, Any]], path: Path) -> dict[int, list[ProblemResult]]:
    """The saved parts of every problem, by row number."""
    parts: dict[int, list[ProblemResult]] = {}
    try:
        for part in map(ProblemResult.of_record, records):
            parts.setdefault(part.index, []).append(part)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a line is not a valid sample ({error!r}); delete the file to start over") from error
    return parts


def _check_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        changes = "; ".join(f"{key}: {before.get(key)!r:.80} then, {now.get(key)!r:.80} now" for key in different)
        raise UserError(
            f"{path} was made with other settings ({changes}). Choose another folder with --output, or delete the file."
        )
