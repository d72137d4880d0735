"""Measure what one GPU can show, on a machine that may lack SGLang and Transformer Engine.

    python -m tools.gpu_probe --output gpu_probe
    python -m tools.gpu_probe --dry-run              every part on a CPU with a tiny model

Needs PyTorch and the packages in tools/gpu_probe/requirements.txt; installs and downloads nothing. Every part is a
process with a time limit. One that fails is in the record with its output, and the next one runs. The record is saved
after every part, so an interrupted call keeps what it has. Exit status: 0 if no part failed, 1 if one did, 2 without
a GPU, or if a name is unknown.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from tools.gpu_probe.parts import Part


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the part ends too
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    from megatron_dsrl.platform import take_inventory
    from tools.gpu_probe.parts import parts
    from tools.gpu_probe.runner import run_part
    from tools.gpu_record.machine import describe_machine
    from tools.gpu_record.record import ON_CPU, Record, print_tables

    console = Console(width=None if sys.stdout.isatty() else 112, soft_wrap=True)
    on_cpu = take_inventory().platform == "cpu"
    if on_cpu and not options.dry_run:
        console.print("PyTorch sees no CUDA device here. On a CPU, --dry-run tries every part with a tiny model.")
        return 2
    folder = options.output.resolve()
    record = Record("Probe of one device", folder, describe_machine(options.commit), on_cpu)
    for part in _chosen(parts(str(folder)), options.only):
        console.print(f"{part.name}: {part.measures}; at most {part.limit_minutes:g} min", highlight=False)
        result = run_part(part, record)
        record.add(result)
        console.print(f"  {result.status}, {result.seconds:.0f} s {result.reason or ''}", markup=False, highlight=False)
    console.rule("record", align="left")
    print_tables(record, console)
    if on_cpu:
        console.print(ON_CPU, style="bold")
    console.print(f"record: {options.output}/record.md")
    return 1 if record.failed else 0


def _chosen(parts: Sequence["Part"], only: str | None) -> Sequence["Part"]:
    """The parts that `--only` names; all without it."""
    if only is None:
        return parts
    names = [part.name for part in parts]
    if unknown := [name for name in only.split(",") if name not in names]:
        print(f"unknown part {', '.join(unknown)}; the parts are {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    return [part for part in parts if part.name in only.split(",")]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_probe"), help="folder (default: runs/gpu_probe)")
    parser.add_argument("--dry-run", action="store_true", help="run every part on the CPU with a tiny model")
    parser.add_argument("--only", metavar="PART,...", help="run only these parts")
    parser.add_argument("--commit", help="for the record, if the files are not in a git checkout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
