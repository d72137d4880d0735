"""Which problems are solved over training: three steps of two problems each, followed by hand."""

from megatron_dsrl.analysis.problems import by_epoch, by_step, summary, visits
from tests.observability.synthetic_run import make_group

STEPS = [
    (1, [make_group([1, 0], index=7), make_group([0, 0], index=8)]),
    (2, [make_group([1, 1], index=9), make_group([0, 0], index=7)]),  # 7 again: its second epoch, and lost
    (5, [make_group([0, 1], index=8), make_group([1, 1], index=7)]),  # 8 newly solved, 7 gained
]


def test_every_visit_knows_what_was_before() -> None:
    seen = visits(STEPS)

    assert [(v.step, v.problem, v.epoch, v.outcome) for v in seen] == [
        (1, 7, 1, "mixed"),
        (1, 8, 1, "unsolved"),
        (2, 9, 1, "solved"),
        (2, 7, 2, "unsolved"),
        (5, 8, 2, "mixed"),
        (5, 7, 3, "solved"),
    ]
    assert [v.problem for v in seen if v.newly_solved] == [7, 9, 8]
    assert [(v.step, v.problem) for v in seen if v.gained] == [(5, 8), (5, 7)]
    assert [(v.step, v.problem) for v in seen if v.lost] == [(2, 7)]


def test_steps_count_every_visited_problem_once_by_its_latest_visit() -> None:
    names = ("step", "visited", "solved_at_least_once", "now_solved", "now_mixed", "now_unsolved", "newly_solved")

    assert [tuple(record[name] for name in names) for record in by_step(visits(STEPS))] == [
        (1, 2, 1, 0, 1, 1, 1),
        (2, 3, 2, 1, 0, 2, 1),  # 7 stays solved at least once
        (5, 3, 3, 2, 1, 0, 1),
    ]


def test_epochs_and_summary() -> None:
    epochs = by_epoch(visits(STEPS))

    names = ("epoch", "problems", "solved", "mixed", "unsolved", "newly_solved", "gained", "lost")
    assert [tuple(record[name] for name in names) for record in epochs] == [
        (1, 3, 1, 1, 1, 2, 0, 0),
        (2, 2, 0, 1, 1, 1, 1, 1),
        (3, 1, 1, 0, 0, 0, 1, 0),
    ]
    assert summary(visits(STEPS))["epochs"] == epochs


def test_partial_credit_is_neither_right_nor_unsolved() -> None:
    (visit,) = visits([(1, [make_group([0.5, 0.0], index=1)])])

    assert (visit.outcome, visit.has_right, visit.newly_solved) == ("mixed", False, False)
