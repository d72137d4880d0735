"""`dsrl report`."""

import argparse
from pathlib import Path

from megatron_dsrl.commands.arguments import Commands, add_command
from megatron_dsrl.common.errors import UserError


def add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        help="write an HTML report of one run, or compare several",
        description="Write one self-contained HTML page with charts to RUN/report.html, even while the run is still "
        "going. For several runs, write a comparison to comparison.html in the first folder.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, such as runs/tiny_dsrl")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the page to this file instead")
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help="write the learning curve as an SVG file instead of the page"
    )


def _report(options: argparse.Namespace) -> int:
    from megatron_dsrl.report.report import write_report
    from megatron_dsrl.report.training_charts import write_learning_curve

    if options.figure is None:
        print(write_report(*options.runs, output=options.output))
    elif len(options.runs) == 1 and options.output is None:
        print(write_learning_curve(options.runs[0], options.figure))
    else:
        raise UserError("--figure draws one run: pass one RUN and no --output, or use `dsrl compare` for several runs")
    return 0
