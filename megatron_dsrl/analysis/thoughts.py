"""Transition and reflection thoughts of a response, counted by word lists (those of SEAL, arXiv 2504.07986).

A response is split into thoughts at blank lines. A thought is a *reflection* if it begins with "wait" or contains one
of `REFLECTION_PHRASES`; else it is a *transition* if it begins with "alternatively" or contains one of
`TRANSITION_PHRASES`. Case is ignored; phrases also match inside words ("verify" in "reverifying"). Only words count,
not their meaning: "I will not verify this" is a reflection.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from megatron_dsrl.analysis.responses import RecordedResponse
from megatron_dsrl.charts.chart_source import Series, ValueAxis
from megatron_dsrl.charts.charts import Chart, line_chart
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan

PER_RESPONSE = ValueAxis("per response")
REFLECTION_PREFIX = "wait"
REFLECTION_PHRASES = (
    "verify",
    "make sure",
    "hold on",
    "think again",
    "'s correct",
    "'s incorrect",
    "let me check",
    "seems right",
)
TRANSITION_PREFIX = "alternatively"
TRANSITION_PHRASES = (
    "another way",
    "another approach",
    "another method",
    "another solution",
    "another strategy",
    "another technique",
    "think differently",
)
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True)
class ThoughtCounts:
    """Counts for one response."""

    thoughts: int
    """All thoughts, including reflections and transitions."""
    reflections: int
    transitions: int


def split_thoughts(text: str) -> list[str]:
    """The parts between blank lines, stripped; empty ones are dropped."""
    return [part.strip() for part in _BLANK_LINES.split(text) if part.strip()]


def count_thoughts(text: str) -> ThoughtCounts:
    """Count the thoughts of a response; each is a reflection, a transition, or neither."""
    thoughts = [thought.lower() for thought in split_thoughts(text)]
    reflects = [_is_kind(thought, REFLECTION_PREFIX, REFLECTION_PHRASES) for thought in thoughts]
    transitions = sum(
        not reflecting and _is_kind(thought, TRANSITION_PREFIX, TRANSITION_PHRASES)
        for thought, reflecting in zip(thoughts, reflects)
    )
    return ThoughtCounts(len(thoughts), sum(reflects), transitions)


def thoughts_of_step(step: int, responses: Sequence[RecordedResponse]) -> Record:
    """Means per response of one step, overall and for right and other responses separately; None without responses."""
    counts = [count_thoughts(response.text) for response in responses]
    right = [count for count, response in zip(counts, responses) if response.right]
    others = [count for count, response in zip(counts, responses) if not response.right]
    return {
        "step": step,
        "responses": len(responses),
        "thoughts": _mean(count.thoughts for count in counts),
        "reflections": _mean(count.reflections for count in counts),
        "transitions": _mean(count.transitions for count in counts),
        "reflections_of_right": _mean(count.reflections for count in right),
        "transitions_of_right": _mean(count.transitions for count in right),
        "reflections_of_others": _mean(count.reflections for count in others),
        "transitions_of_others": _mean(count.transitions for count in others),
    }


def summary(records: Sequence[Record]) -> Record:
    """Means per response at the first and last step, and their ratio, the growth (the paper reports it after 20
    steps); None if the first mean is zero."""
    first, last = records[0], records[-1]
    figures: Record = {"first_step": first["step"], "last_step": last["step"]}
    for kind in ("reflections", "transitions"):
        growth = last[kind] / first[kind] if first[kind] and last[kind] is not None else None
        figures |= {f"{kind}_first": first[kind], f"{kind}_last": last[kind], f"{kind}_growth": growth}
    return figures


def charts(records: Sequence[Record], phases: Sequence[PhaseSpan]) -> list[Chart]:
    """Curves over the steps; the records must be ordered by step."""
    series = partial(Series.of_records, records)
    explanation = "Mean number per response, counted by word lists."
    return [
        line_chart(
            "Reflection and transition thoughts",
            explanation,
            [series("reflections", "reflections", 1), series("transitions", "transitions", 2)],
            phases,
            PER_RESPONSE,
        ),
        line_chart(
            "Reflections of right and other responses",
            explanation,
            [series("right", "reflections_of_right", 3), series("others", "reflections_of_others", 2)],
            phases,
            PER_RESPONSE,
        ),
        line_chart("Thoughts", "Parts between blank lines.", [series("thoughts", "thoughts", 4)], phases, PER_RESPONSE),
    ]


def _is_kind(thought: str, prefix: str, phrases: Sequence[str]) -> bool:
    return thought.startswith(prefix) or any(phrase in thought for phrase in phrases)


def _mean(values: Iterable[int]) -> float | None:
    values = list(values)
    return fmean(values) if values else None
