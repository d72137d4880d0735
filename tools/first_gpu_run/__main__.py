"""The first run on a machine with GPUs, in stages; stops at the first that fails, with an archive for a bug report.

    python -m tools.first_gpu_run                       all stages that the machine's GPUs allow
    python -m tools.first_gpu_run --from two_gpus_split     continue there, after a fix
    python -m tools.first_gpu_run --dry-run             every stage on a CPU with a tiny model

Nothing is downloaded: all models have random weights. Exit status: 0 if no stage failed, 1 if one did, 2 if the machine
has no GPU or a name is unknown.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.first_gpu_run.stages import Stage, all_stages
from tools.gpu_record.attention_backend import LOGGING

GPUS_OF_A_DRY_RUN = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the stage ends too
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    console = Console(width=None if sys.stdout.isatty() else 112, soft_wrap=True)
    gpus = GPUS_OF_A_DRY_RUN if options.dry_run else _visible_gpus()
    stages = _chosen(all_stages(gpus), options)
    if options.list:
        _print_stages(stages, console)
        return 0
    if gpus == 0:
        console.print("PyTorch sees no CUDA device here; `dsrl doctor` says why. On a CPU, --dry-run tries everything.")
        return 2
    return _run(stages, gpus, options, console)


def _run(stages: Sequence[Stage], gpus: int, options: argparse.Namespace, console: Console) -> int:
    # These import torch.
    from tools.first_gpu_run.bundle import write_bundle
    from tools.first_gpu_run.runner import run_stages
    from tools.gpu_record.machine import describe_machine
    from tools.gpu_record.record import ON_CPU, Record, print_tables

    title = "The first run on CPU (dry run)" if options.dry_run else f"The first run on {gpus} GPU(s)"
    record = Record(title, options.output.resolve(), describe_machine(), on_cpu=options.dry_run)
    if options.only or options.from_stage:
        record.take_earlier_results()
    try:
        failed = run_stages(stages, record, gpus, _variables(options.dry_run), console)
    except KeyboardInterrupt:
        console.print(f"interrupted; nothing is left running. Record so far: {options.output}/record.md")
        return 130
    console.rule("record", align="left")
    print_tables(record, console)
    if options.dry_run:
        console.print(ON_CPU, style="bold")
    if failed is None:
        console.print(f"\nNo stage failed. The record, with figures for others to compare: {options.output}/record.md")
        return 0
    bundle = write_bundle(record.folder, failed.name)
    for line in (
        f"\nStopped at {failed.name}: {failed.reason}. It was meant to prove: {failed.purpose}.",
        f"Its output: {options.output}/{failed.name}/output.log",
        f"For a bug report attach {options.output}/{bundle.name}",
        "(record, logs, configuration, provenance, environment, packages, flight recorder). Tokens, keys and passwords",
        "were removed from it; host names and paths were not, so look through it first.",
        "After a fix continue with: python -m tools.first_gpu_run "
        f"{'--dry-run ' if options.dry_run else ''}--output {options.output} --from {failed.name}",
    ):
        console.print(line, markup=False, highlight=False)
    return 1


def _variables(dry_run: bool) -> dict[str, str]:
    if dry_run:
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {"NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN"), **LOGGING}


def _visible_gpus() -> int:
    from megatron_dsrl.platform import take_inventory

    return len(take_inventory().names)


def _chosen(stages: Sequence[Stage], options: argparse.Namespace) -> list[Stage]:
    """The stages that `--only` or `--from` select."""
    names = [stage.name for stage in stages]
    wanted = options.only.split(",") if options.only else [options.from_stage] if options.from_stage else []
    if unknown := [name for name in wanted if name not in names]:
        print(f"unknown stage {', '.join(unknown)}; the stages are {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    if options.only:
        return [stage for stage in stages if stage.name in wanted]
    return list(stages[names.index(options.from_stage) if options.from_stage else 0 :])


def _print_stages(stages: Sequence[Stage], console: Console) -> None:
    table = Table("stage", "GPUs", "at most, min", "proves", box=None, header_style="bold")
    for stage in stages:
        table.add_row(stage.name, str(stage.gpus), f"{stage.limit_minutes:g}", stage.proves)
    console.print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.first_gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="run every stage on the CPU with a tiny model")
    parser.add_argument("--list", action="store_true", help="list the stages and run none")
    parser.add_argument("--only", metavar="STAGE,...", help="run only these stages")
    parser.add_argument("--from", dest="from_stage", metavar="STAGE", help="begin with this stage")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/first_gpu_run"),
        help="folder for logs, record and archive (default: runs/first_gpu_run)",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
