"""What the tool prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tools.fault_soak.soak import Injection


def print_faults(console: Console, injections: Sequence[Injection], started: float) -> None:
    """One row for every fault that was injected.

    Args:
        console: where to.
        injections: in the order in which they happened.
        started: when the training was started, in seconds since 1970.
    """
    columns = ("at (s)", "step", "when", "fault", "target", "what happened", "next step (s)")
    table = Table(*columns, box=None, pad_edge=False)
    for injection in injections:
        planned, waited = injection.planned, injection.seconds_to_next_step
        table.add_row(
            f"{injection.time - started:.1f}",
            str(injection.step),
            planned.moment,
            planned.name,
            injection.target,
            "; ".join(injection.outcome),
            "-" if waited is None else f"{waited:.1f}",
        )
    console.print(table)
