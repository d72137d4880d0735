"""Run several configurations with several seeds and compare them: `dsrl sweep`.

Each run is a separate `dsrl train` process with its own log. Finished runs are skipped, an interrupted one continues
from its checkpoint, and one that fails does not stop the others.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.sweep import SweepConfig
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import parse_yaml
from megatron_dsrl.observability.console_lines import duration
from megatron_dsrl.observability.records import METRICS_FILE, read_records
from megatron_dsrl.report.comparison import FIGURE_FILE, TABLE_FILE, write_comparison
from megatron_dsrl.run.results import has_results


@dataclass(frozen=True)
class SweepRun:
    """One process of a sweep."""

    method: str
    seed: int
    configs: tuple[Path, ...]
    folder: Path
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """Arguments of `dsrl train`."""
        return [*map(str, self.configs), *self.settings]

    @property
    def settings(self) -> list[str]:
        """All overrides."""
        place = [f"output_dir={self.folder.parent}", f"name={self.folder.name}", f"seed={self.seed}"]
        return [*self.overrides, *place]


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep file.

    Raises:
        UserError: it is missing, or not a sweep; every wrong field is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read this sweep file: {error.strerror}") from error
    data, lines = parse_yaml(text, str(path))
    places = {key_path: f"{path}:{line}" for key_path, line in lines.items()}
    sweep = validated(SweepConfig, {} if data is None else data, places, str(path), "sweep")
    if sweep.baseline not in sweep.runs:
        raise UserError(f"{path}: baseline: `{sweep.baseline}` is not one of the runs {', '.join(sweep.runs)}")
    return sweep


def runs_of(sweep: SweepConfig, folder: Path) -> list[SweepRun]:
    """Every method with every seed, seed by seed, so that an interrupted sweep has whole rounds to compare.

    Args:
        folder: folder of the sweep's file; configuration paths are relative to it.
    """
    return [
        SweepRun(
            method=method,
            seed=seed,
            configs=tuple(folder / file for file in ([run.config] if isinstance(run.config, str) else run.config)),
            folder=Path(sweep.output_dir) / f"{_as_folder_name(method)}_seed{seed}",
            overrides=(*sweep.overrides, *run.overrides),
        )
        for seed in sweep.seeds
        for method, run in sweep.runs.items()
    ]


def run_sweep(path: Path, processes: int) -> int:
    """Run everything that is not finished, `processes` runs at a time, then compare all runs that have results.

    Returns:
        The exit status: 0, or 1 if a run failed.

    Raises:
        UserError: the sweep or one of its configurations is wrong; nothing has been started.
    """
    sweep = load_sweep(path)
    runs = runs_of(sweep, path.parent)
    missing = [run for run in runs if not _is_finished(run)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    with ThreadPoolExecutor(processes) as pool:
        failed = [run for run, status in zip(missing, pool.map(_train, missing)) if status != 0]
    compare_sweep(sweep, runs)
    for run in failed:
        print(f"failed: {run.method}, seed {run.seed}: see {_log_of(run)}", file=sys.stderr)
    return 1 if failed else 0


def compare_sweep(sweep: SweepConfig, runs: Sequence[SweepRun]) -> None:
    """Write table and figure of the runs that have results."""
    by_method = {
        method: [run.folder for run in runs if run.method == method and (run.folder / METRICS_FILE).exists()]
        for method in sweep.runs
    }
    by_method = {method: folders for method, folders in by_method.items() if folders}
    if sweep.baseline in by_method:
        folder = Path(sweep.output_dir)
        print(write_comparison(by_method, sweep.baseline, folder))
        print(f"written to {folder / TABLE_FILE} and {folder / FIGURE_FILE}")


def _train(run: SweepRun) -> int:
    _log_of(run).parent.mkdir(parents=True, exist_ok=True)
    with open(_log_of(run), "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dsrl.cli", "train", *run.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            status = process.wait()
        finally:
            process.terminate()  # an interrupted sweep lets its runs save their state
            process.wait()
    seconds = sum(record["seconds/step"] for record in read_records(run.folder / METRICS_FILE))
    outcome = f"{duration(seconds)} of training" if status == 0 else f"failed with status {status}"
    print(f"{run.method}, seed {run.seed}: {outcome}", flush=True)
    return status


def _is_finished(run: SweepRun) -> bool:
    config = load_config(run.configs, run.settings)
    done = max((record["step"] for record in read_records(run.folder / METRICS_FILE)), default=0)
    return done >= config.steps and has_results(run.folder, config.evaluation, config.steps)


def _log_of(run: SweepRun) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def _as_folder_name(method: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in method)
