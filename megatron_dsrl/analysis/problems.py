"""The problems that a run solves, step by step, from its recorded rollouts. Problems are identified by row number.

At a visit a problem is solved, unsolved or mixed as `SampleGroup.outcome` says. The n-th visit of a problem is its
epoch n, which is also the sampler's epoch unless groups were dropped (dynamic sampling). A problem is *newly solved* at
its first visit with a right response, *gained* if it has a right response and had none at the previous visit, and
*lost* in the opposite case.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_dsrl.charts.chart_source import Series, ValueAxis
from megatron_dsrl.charts.charts import Chart, line_chart, stacked_chart
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan
from megatron_dsrl.rollout.sample import Outcome, SampleGroup

PROBLEMS = ValueAxis("problems")


@dataclass(frozen=True)
class Visit:
    """One problem at one step."""

    step: int
    epoch: int
    """Number of this visit of the problem, from 1."""
    problem: int
    outcome: Outcome
    has_right: bool
    """At least one response is right."""
    newly_solved: bool
    """It has a right response for the first time."""
    gained: bool
    """It has a right response and had none at the previous visit."""
    lost: bool
    """It has no right response and had one at the previous visit."""


def visits(steps: Iterable[tuple[int, Sequence[SampleGroup]]]) -> list[Visit]:
    """Every group of the steps as a visit of its problem; the steps must be in order."""
    seen: list[Visit] = []
    last: dict[int, Visit] = {}
    ever: set[int] = set()
    for step, groups in steps:
        for group in groups:
            problem, has = group.prompt.index, any(sample.reward >= 1 for sample in group.samples)
            before = last.get(problem)
            had = before is not None and before.has_right
            visit = Visit(
                step=step,
                epoch=before.epoch + 1 if before else 1,
                problem=problem,
                outcome=group.outcome,
                has_right=has,
                newly_solved=has and problem not in ever,
                gained=before is not None and has and not had,
                lost=had and not has,
            )
            seen.append(visit)
            last[problem] = visit
            ever |= {problem} if has else set()
    return seen


def by_step(all_visits: Sequence[Visit]) -> list[Record]:
    """One record per step: outcomes of the step, and the status of all problems visited so far.

    `now_*` counts every visited problem once, by its latest visit; `solved_at_least_once` counts those that ever had a
    right response.
    """
    records = []
    latest: dict[int, Outcome] = {}
    ever: set[int] = set()
    for step in sorted({visit.step for visit in all_visits}):
        visited = [visit for visit in all_visits if visit.step == step]
        latest |= {visit.problem: visit.outcome for visit in visited}
        ever |= {visit.problem for visit in visited if visit.has_right}
        now = list(latest.values())
        records.append(
            {"step": step, **_counts(visited)}
            | {"visited": len(now), "solved_at_least_once": len(ever)}
            | {f"now_{outcome}": now.count(outcome) for outcome in ("solved", "mixed", "unsolved")}
        )
    return records


def by_epoch(all_visits: Sequence[Visit]) -> list[Record]:
    """One record per epoch: the outcomes of its visits, and the problems newly solved, gained and lost in it."""
    epochs = sorted({visit.epoch for visit in all_visits})
    return [{"epoch": epoch, **_counts([v for v in all_visits if v.epoch == epoch])} for epoch in epochs]


def summary(all_visits: Sequence[Visit]) -> Record:
    """The final status of all visited problems, and the counts of every epoch."""
    steps = by_step(all_visits)
    names = ("visited", "solved_at_least_once", "now_solved", "now_mixed", "now_unsolved")
    return {"steps": len(steps), **{name: steps[-1][name] for name in names}, "epochs": by_epoch(all_visits)}


def charts(records: Sequence[Record], phases: Sequence[PhaseSpan]) -> list[Chart]:
    """Curves over the steps, from the records of `by_step`."""
    series = partial(Series.of_records, records)
    return [
        stacked_chart(
            "Problems by their latest visit",
            "Every problem that was visited so far, once.",
            [
                series("solved", "now_solved", 3),
                series("mixed", "now_mixed", 1),
                series("unsolved", "now_unsolved", 2),
            ],
            phases,
            PROBLEMS,
        ),
        line_chart(
            "Solved at least once",
            "Problems with a right response at any visit so far, of those visited.",
            [series("visited", "visited", 6), series("solved at least once", "solved_at_least_once", 3)],
            phases,
            PROBLEMS,
        ),
        line_chart(
            "Newly solved, gained and lost",
            "Problems of the step against their earlier visits.",
            [series("newly solved", "newly_solved", 3), series("gained", "gained", 1), series("lost", "lost", 2)],
            phases,
            PROBLEMS,
        ),
    ]


def _counts(some: Sequence[Visit]) -> Record:
    outcomes = [visit.outcome for visit in some]
    return {
        "problems": len(some),
        **{outcome: outcomes.count(outcome) for outcome in ("solved", "mixed", "unsolved")},
        "newly_solved": sum(visit.newly_solved for visit in some),
        "gained": sum(visit.gained for visit in some),
        "lost": sum(visit.lost for visit in some),
    }
