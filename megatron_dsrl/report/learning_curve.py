"""The learning curve of a run as one picture, for a README or a slide."""

from pathlib import Path

from megatron_dsrl.charts.chart_axes import WIDE, ValueAxis
from megatron_dsrl.charts.chart_source import SERIES_COLOURS, ChartSource, Series
from megatron_dsrl.charts.charts import Chart, draw
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.run_records import RunRecords, read_run
from megatron_dsrl.report.training_charts import accuracy_series

REWARD_COLOUR = SERIES_COLOURS
"""Grey, because the reward is secondary to the accuracy."""
SHARE = ValueAxis("accuracy", at_least=0.0, at_most=1.0)


def write_learning_curve(run_folder: Path, path: Path) -> Path:
    """Write an SVG file, which follows the reader's light or dark colour scheme, and return its path.

    Raises:
        UserError: the folder is not a run folder, or neither an evaluation nor a reward was recorded.
    """
    chart = learning_curve(read_run(run_folder))
    write_figure([chart], path)
    return path


def learning_curve(run: RunRecords) -> Chart:
    """Accuracy on every held-out set with its standard error, and the mean reward of each step's samples.

    With accuracies on the axis, rewards beyond 0 to 1 are left out.
    """
    accuracies = [
        accuracy_series(f"accuracy on {name}", records, index % (SERIES_COLOURS - 1) + 1)
        for index, (name, records) in enumerate(run.evaluations.items())
    ]
    known = [reward for reward in run.column("reward/mean") if reward is not None]
    is_share = bool(known) and min(known) >= 0 and max(known) <= 1
    rewards = []
    if known and (is_share or not accuracies):
        rewards = [Series("reward of the samples", run.step_numbers, run.column("reward/mean"), REWARD_COLOUR)]
    if not accuracies and not rewards:
        raise UserError(f"{run.folder} has no evaluation and no reward yet, so no curve can be drawn")
    axis = SHARE if is_share or accuracies else ValueAxis("reward")
    return draw(ChartSource("lines", run.name, "", (*accuracies, *rewards), tuple(run.phases), axis), WIDE)
