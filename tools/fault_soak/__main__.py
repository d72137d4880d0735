"""Train a tiny model twice, once disturbed by faults at random moments, and compare the two runs bit for bit.

The training is real: Megatron, SGLang on CPU, reward workers, checkpoints. Both runs sample deterministically. Faults
concern processes and files of the disturbed run only. Exit status 1 says that something differs or hangs, or that a run
ended as it should not; what it printed and wrote is then kept.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from megatron_dsrl.rewards.sandbox_kernel import adopt_orphans
from tests.support.compare_runs import differences
from tests.support.tiny_run import write_tiny_run
from tools.fault_soak.fault import Fault, all_faults
from tools.fault_soak.report import print_faults
from tools.fault_soak.schedule import choose_faults
from tools.fault_soak.soak import Soak
from tools.fault_soak.training import SoakFailure, Training

OPTIONS = (
    "phases.0.until_step=2",
    "rollout.deterministic=true",
    "rollout.step_timeout_seconds=120",
    "checkpoint.save_every_steps=1",
    "checkpoint.export_hf_every_steps=1",
    "engine.health_check_seconds=0.5",
    "engine.health_timeout_seconds=20",
    "engine.update_timeout_seconds=30",
    "engine.max_restarts=100",
    "reward.workers=2",
    "reward.timeout_seconds=60",  # else a paused worker counts as a verifier that hangs, and its response scores 0
    "parallel.collective_timeout_seconds=300",
)
SHOWN = 20
"""Differences that are printed: after the first, everything differs."""
SEVERAL_PROCESSES = ("parallel.distributed_optimizer=true",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; the run would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans()
    disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="fault_soak_")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    try:
        problems = _soak(options, folder, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left running")
        return 130
    finally:
        if options.folder is None and not problems:
            shutil.rmtree(folder, ignore_errors=True)
    if problems:
        console.print(f"logs, records and checkpoints: {folder}", soft_wrap=True)
    return 1 if problems else 0


def _soak(options: argparse.Namespace, folder: Path, console: Console) -> list[str]:
    """Rounds until the time is up, or until one has problems; returns these."""
    end = time.monotonic() + 60 * options.minutes
    config = write_tiny_run(folder)
    settings = (f"steps={options.steps}", f"checkpoint.keep_last={options.steps}", *OPTIONS)
    if options.processes > 1:
        settings += SEVERAL_PROCESSES
    console.print(f"training {options.steps} steps undisturbed, {options.processes} process(es)")
    undisturbed = Training(config, folder / "runs" / "undisturbed", settings, options.processes)
    try:
        undisturbed.folder.parent.mkdir(exist_ok=True)
        undisturbed.start()
        status = undisturbed.wait_for_end(options.limit_seconds)
        if status != 0:
            return _reported(console, [f"undisturbed, it exited with status {status}:\n{undisturbed.tail()}"])
    finally:
        undisturbed.kill()
    problems: list[str] = []
    seed = options.seed
    while not problems:
        disturbed = Training(config, folder / "runs" / f"seed_{seed}", settings, options.processes)
        problems = _round(options, seed, disturbed, undisturbed.folder, console)
        if time.monotonic() > end:
            break
        seed += 1
    return problems


def _round(
    options: argparse.Namespace, seed: int, training: Training, undisturbed: Path, console: Console
) -> list[str]:
    """One disturbed training, its table and its differences from the undisturbed one."""
    if training.folder.exists():
        return _reported(console, [f"{training.folder} exists; remove it, or choose another --seed or --folder"])
    plan = choose_faults(seed, options.steps, options.faults, options.kinds)
    soak = Soak(training, plan, options.limit_seconds)
    started = time.time()
    problems: list[str] = []
    console.print(f"seed {seed}: {', '.join(planned.name for planned in plan)}", soft_wrap=True)
    try:
        soak.run()
    except SoakFailure as failure:
        problems = [str(failure)]
    finally:
        training.kill()
        print_faults(console, soak.injections, started)
    problems = problems or differences(training.folder, undisturbed, options.steps)
    if not problems:
        missed = len(plan) - len(soak.injections)
        without = f" ({missed} not reached before the end)" if missed else ""
        console.print(f"seed {seed}: {len(soak.injections)} faults{without}, and the same run bit for bit")
    only = f" --only {','.join(options.kinds)}" if options.only else ""
    return _reported(
        console,
        problems,
        f"repeat with: python -m tools.fault_soak --seed {seed} --steps {options.steps} "
        f"--processes {options.processes} --faults {options.faults}{only}",
    )


def _reported(console: Console, problems: list[str], *hints: str) -> list[str]:
    more = [f"and {len(problems) - SHOWN} more differences"] if len(problems) > SHOWN else []
    for line in (*problems[:SHOWN], *more, *hints) if problems else ():
        console.print(line, soft_wrap=True, markup=False)
    return problems


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fault_soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of faults, moments and targets (default: 0)")
    parser.add_argument("--steps", type=int, default=8, help="of either run (default: 8)")
    parser.add_argument("--processes", type=int, default=1, help="trainer ranks, each with an engine (default: 1)")
    parser.add_argument("--faults", type=int, metavar="N", help="faults per run (default: one for every step but one)")
    parser.add_argument(
        "--minutes", type=float, default=0, help="continue with the next seeds for this long (default: one seed)"
    )
    parser.add_argument("--only", metavar="KIND,...", help=f"of: {_described(all_faults())}")
    parser.add_argument("--folder", help="for both runs; kept (default: a temporary one, kept if problems are found)")
    parser.add_argument(
        "--limit-seconds", type=float, default=900, help="for every wait; longer is a hang (default: 900)"
    )
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps: at least 2, so that a step follows the fault")
    options.faults = options.steps - 1 if options.faults is None else options.faults
    options.kinds = _chosen(options.only, parser)
    return options


def _chosen(only: str | None, parser: argparse.ArgumentParser) -> dict[str, type[Fault]]:
    kinds = all_faults()
    if only is None:
        return {name: kind for name, kind in kinds.items() if not kind.takes_minutes}
    names = only.split(",")
    if unknown := [name for name in names if name not in kinds]:
        parser.error(f"--only: unknown fault {', '.join(unknown)}; the faults are {', '.join(kinds)}")
    return {name: kinds[name] for name in names}


def _described(kinds: dict[str, type[Fault]]) -> str:
    return ", ".join(f"{name} (only if named)" if kind.takes_minutes else name for name, kind in kinds.items())


if __name__ == "__main__":
    sys.exit(main())
