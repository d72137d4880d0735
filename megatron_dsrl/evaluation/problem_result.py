"""What an evaluation keeps of a problem: its samples, judged. No token ids and no log-probs."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_dsrl.rollout.sample import Group


@dataclass(frozen=True)
class SampleResult:
    """One judged response."""

    text: str
    tokens: int
    """Of the response, its end token included."""
    truncated: bool
    """It reached the length limit."""
    reward: float
    verdict: str
    """`ok`, or how the verifier failed; see `rewards.pool.Judgement`."""

    @property
    def right(self) -> bool:
        """Full reward. Verifiers of answers give 1 or 0."""
        return self.reward >= 1.0


@dataclass(frozen=True)
class ProblemResult:
    """One problem with all its samples."""

    index: int
    """Row number in its set."""
    prompt: str
    answer: str
    """Gold answer."""
    samples: tuple[SampleResult, ...]

    @classmethod
    def of_group(cls, group: Group) -> "ProblemResult":
        """What is kept of a group."""
        samples = tuple(
            SampleResult(
                sample.text, len(sample.response_ids), sample.finish_reason == "length", sample.reward, sample.verdict
            )
            for sample in group.samples
        )
        return cls(group.prompt.index, group.prompt.text, group.prompt.answer, samples)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "ProblemResult":
        """The inverse of `as_record`. Raises KeyError or TypeError for anything else."""
        return cls(**{**record, "samples": tuple(SampleResult(**sample) for sample in record["samples"])})

    def as_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
