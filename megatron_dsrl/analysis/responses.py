"""The responses to analyse: a run's recorded rollouts, or a sample file of `dsrl eval`.

Read one step at a time, since the rollouts of a single step can take hundreds of megabytes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.evaluation.sample_file import read_sample_file
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import SampleGroup

Item = TypeVar("Item")


@dataclass(frozen=True)
class RecordedResponse:
    """One judged response."""

    step: int
    """Step of the run that sampled it; 0 for a sample file."""
    problem: int
    """Row number of the prompt in its set."""
    number: int
    """Number of the sample within its group, from 0."""
    prompt: str
    """The rendered chat prompt."""
    text: str
    """The response without special tokens."""
    reward: float
    tokens: int
    """Response tokens, including the end token."""

    @property
    def right(self) -> bool:
        """Whether it has the full reward, as in `rollout_metrics`."""
        return self.reward >= 1


def recorded_steps(run_folder: Path) -> list[int]:
    """The steps whose rollouts a run has recorded, in order. Raises UserError if the run has not recorded any
    rollouts."""
    if not run_folder.is_dir():
        raise UserError(f"no such folder: {run_folder}; give the folder of a run, <output_dir>/<name>")
    steps = list(by_step(run_folder / "rollouts", ".jsonl"))
    if not steps:
        raise UserError(
            f"{run_folder} has no recorded rollouts (rollouts/step_000001.jsonl ...): give the folder of a run with "
            "observability.save_rollouts=true"
        )
    return steps


def read_steps(run_folder: Path, steps: Sequence[int] | None = None) -> Iterator[tuple[int, list[SampleGroup]]]:
    """Yield steps and their groups, in order. `steps` are those to read; None: all that are recorded. Raises UserError
    if a step was not recorded, or nothing was."""
    recorded = recorded_steps(run_folder)
    missing = sorted(set(steps or ()) - set(recorded))
    if missing:
        raise UserError(f"{run_folder} has no rollouts of step {missing[0]}; it has {_span(recorded)}")
    for step in sorted(set(steps)) if steps else recorded:
        yield step, read_groups(rollout_file(run_folder, step))


def responses_of_step(step: int, groups: Sequence[SampleGroup]) -> list[RecordedResponse]:
    """All samples of a step's groups, in order."""
    return [
        RecordedResponse(
            step,
            group.prompt.index,
            number,
            group.prompt.text,
            sample.text,
            sample.reward,
            len(sample.response_ids),
        )
        for group in groups
        for number, sample in enumerate(group.samples)
    ]


def read_responses(source: Path, steps: Sequence[int] | None = None) -> Iterator[tuple[int, list[RecordedResponse]]]:
    """Yield steps and their responses. Raises UserError if the source is neither, or a step is missing.

    Args:
        source: run folder, or sample file (its only step is 0).
        steps: steps of a run; None: all.
    """
    if source.is_dir():
        for step, groups in read_steps(source, steps):
            yield step, responses_of_step(step, groups)
    else:
        yield (
            0,
            [
                RecordedResponse(0, problem.index, number, problem.prompt, sample.text, sample.reward, sample.tokens)
                for problem in read_sample_file(source)
                for number, sample in enumerate(problem.samples)
            ],
        )


def choose(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` items, drawn without replacement and kept in order; the same seed draws the same items."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def _span(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
