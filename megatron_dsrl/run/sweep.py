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
    def log(self) -> Path:
        """What its process printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def arguments(self) -> list[str]:
        """Arguments of `dsrl train`."""
        return [*map(str, self.configs), *self.settings]

    @property
    def settings(self) -> list[str]:
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


def run_sweep(runs: Sequence[SweepRun], processes: int) -> list[SweepRun]:
    """Run everything that is not finished, `processes` runs at a time.

    Returns:
        The runs that failed.

    Raises:
        UserError: one of the configurations is wrong; nothing has been started.
    """
    missing = [run for run in runs if not _is_finished(run)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    with ThreadPoolExecutor(processes) as pool:
        return [run for run, status in zip(missing, pool.map(_train, missing)) if status != 0]


def with_results(runs: Sequence[SweepRun]) -> dict[str, list[Path]]:
    """Folders of the runs that have results, by method."""
    by_method: dict[str, list[Path]] = {}
    for run in runs:
        if (run.folder / METRICS_FILE).exists():
            by_method.setdefault(run.method, []).append(run.folder)
    return by_method


def _train(run: SweepRun) -> int:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a", encoding="utf-8") as log:
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


def _as_folder_name(method: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in method)
