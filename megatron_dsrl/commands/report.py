"""What a run has recorded: `dsrl report`, `trace`, `compare` and `upload`. Heavy modules are only imported when one
runs."""

import argparse
from pathlib import Path

from megatron_dsrl.commands.arguments import Commands, add_command, labelled_folders
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted


def add_report(commands: Commands) -> None:
    parser = add_command(commands, "report", _report, "write an HTML report of one run, or compare several")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, such as runs/tiny_dsrl")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the page to this file instead")
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help="write the learning curve as an SVG file instead of the page"
    )


def _report(options: argparse.Namespace) -> int:
    """Write one self-contained HTML page with charts to RUN/report.html, even while the run is still going. For several
    runs, write a comparison to comparison.html in the first folder."""
    from megatron_dsrl.report.comparison import write_learning_curve
    from megatron_dsrl.report.report import write_report

    if options.figure is None:
        print(write_report(*options.runs, output=options.output))
    elif len(options.runs) == 1 and options.output is None:
        print(write_learning_curve(options.runs[0], options.figure))
    else:
        raise UserError("--figure draws one run: pass one RUN and no --output, or use `dsrl compare` for several runs")
    return 0


def add_trace(commands: Commands) -> None:
    parser = add_command(
        commands, "trace", _trace, "write a timeline of all ranks and engines for ui.perfetto.dev, and print a summary"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/tiny_dsrl")
    parser.add_argument("--output", metavar="FILE", type=Path, help="output file (default: RUN/trace/trace.json)")


def _trace(options: argparse.Namespace) -> int:
    """Join the timelines of all ranks and engines into one file for ui.perfetto.dev or chrome://tracing, and print a
    summary. Works while the run is still going and after it was killed."""
    from rich.console import Console

    from megatron_dsrl.observability.timeline import TRACE_FOLDER, profile_files
    from megatron_dsrl.report.timeline import print_summary, read_timelines
    from megatron_dsrl.report.trace_events import write_trace

    timelines = read_timelines(options.run)
    target = options.output or options.run / TRACE_FOLDER / "trace.json"
    profiles = profile_files(options.run)
    write_trace(timelines, target, profiles)
    print_summary(timelines, Console())
    if profiles:
        steps = ", ".join(map(str, sorted({profile.step for profile in profiles})))
        print(f"with {counted(len(profiles), 'profile')} of torch.profiler: step {steps}")
    print(f"written to {target}: open it in https://ui.perfetto.dev")
    return 0


def add_compare(commands: Commands) -> None:
    parser = add_command(
        commands, "compare", _compare, "compare methods with several runs each in a table and learning curves"
    )
    parser.add_argument(
        "methods", metavar="LABEL=RUN,RUN", nargs="+", help="a method and its run folders, one per seed; or a RUN"
    )
    parser.add_argument("--baseline", metavar="LABEL", help="method to compare the others with (default: the first)")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/comparison"),
        help="output folder (default: runs/comparison)",
    )


def _compare(options: argparse.Namespace) -> int:
    """Write comparison.md (held-out results with 95 % intervals over runs, and tests against the baseline) and
    comparison.svg (learning curves)."""
    from megatron_dsrl.report.comparison import FIGURE_FILE, TABLE_FILE, write_comparison

    methods = labelled_folders(options.methods)
    baseline = options.baseline or next(iter(methods))
    if baseline not in methods:
        raise UserError(f"--baseline: `{baseline}` is not one of the methods {', '.join(methods)}")
    print(write_comparison(methods, baseline, options.output))
    print(f"written to {options.output / TABLE_FILE} and {options.output / FIGURE_FILE}")
    return 0


def add_upload(commands: Commands) -> None:
    parser = add_command(
        commands,
        "upload",
        _upload,
        "send a run folder to experiment trackers, for example after running without a network",
        epilog="example: dsrl upload runs/tiny_dsrl --to mlflow tracking_uri=http://127.0.0.1:5000",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/tiny_dsrl")
    parser.add_argument(
        "overrides", metavar="OPTION=VALUE", nargs="*", help="set an option of the tracker, such as project=mine"
    )
    parser.add_argument(
        "--to",
        metavar="NAME",
        action="append",
        default=[],
        help="wandb, mlflow, swanlab, trackio or package.module:Class; may be repeated (default: the run's "
        "observability.trackers)",
    )


def _upload(options: argparse.Namespace) -> int:
    """Send the steps, evaluations and responses of a run folder to W&B, MLflow, SwanLab, Trackio or your own tracker.
    Only sends what the tracker does not have yet, so you can repeat it while the run is going."""
    from megatron_dsrl.observability.trackers.upload import chosen_trackers, upload

    trackers = chosen_trackers(options.run, options.to, options.overrides)
    for tracker in trackers:
        print(upload(options.run, tracker), flush=True)
    return 0
