"""A problem's judged samples as an evaluation saves them, without token ids or log-probs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.sample import Sample, SampleGroup


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
    """One problem with all its samples, or with consecutive ones."""

    index: int
    """Row number in its set."""
    prompt: str
    answer: str
    """Gold answer."""
    samples: tuple[SampleResult, ...]
    first: int = 0
    """Number of the first of these samples among all samples of the problem."""
    other_answers: tuple[str, ...] = ()
    """Further gold answers; any of them is accepted."""

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
        return cls(**{**record, "samples": samples, "other_answers": tuple(record.get("other_answers", ()))})

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
