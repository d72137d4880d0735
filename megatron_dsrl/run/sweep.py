"""Run several configurations with several seeds and compare them: `dsrl sweep`.

Each run is a separate `dsrl train` process with its own log. Finished runs are skipped, an interrupted one continues
from its checkpoint, and one that fails does not stop the others.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import LAUNCHER_VARIABLE
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import SweepConfig
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import parse_yaml, read_text
from megatron_dsrl.observability.console import duration
from megatron_dsrl.observability.records import METRICS_FILE, read_records
from megatron_dsrl.run.preemption import PREEMPTED_STATUS
from megatron_dsrl.run.preflight import preflight
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
    """Read a sweep file. Raises UserError if it is missing, or not a sweep; every wrong field is named."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot read this sweep file: {error}") from error
    data, lines = parse_yaml(text, str(path))
    places = {key_path: f"{path}:{line}" for key_path, line in lines.items()}
    sweep = validated(SweepConfig, {} if data is None else data, places, str(path), "sweep")
    if sweep.baseline not in sweep.runs:
        raise UserError(f"{path}: baseline: `{sweep.baseline}` is not one of the runs {', '.join(sweep.runs)}")
    _require_own_folders(runs_of(sweep, path.parent), path)
    return sweep


def runs_of(sweep: SweepConfig, folder: Path) -> list[SweepRun]:
    """Every method with every seed, seed by seed, so that an interrupted sweep has whole rounds to compare. `folder` is
    that of the sweep's file; configuration paths are relative to it."""
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
        UserError: one of the runs cannot start; nothing has been started.
        KeyboardInterrupt: Ctrl-C or a signal; the runs have been asked to stop, and have saved their state.
    """
    missing = [run for run in runs if not _is_finished(run)]
    for run in {run.method: run for run in missing}.values():  # seeds share model and data
        _check(run)
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    trainings = _Trainings()
    with ThreadPoolExecutor(processes) as pool:
        try:
            return [run for run, status in zip(missing, pool.map(trainings.run, missing)) if status != 0]
        except BaseException:
            trainings.stop()
            raise


def with_results(runs: Sequence[SweepRun]) -> dict[str, list[Path]]:
    """Folders of the runs that have results, by method."""
    by_method: dict[str, list[Path]] = {}
    for run in runs:
        if (run.folder / METRICS_FILE).exists():
            by_method.setdefault(run.method, []).append(run.folder)
    return by_method


class _Trainings:
    """The processes of the runs, which are asked to stop together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: list[subprocess.Popen[bytes]] = []
        """Started, and their end not reported yet."""
        self._is_stopped = False

    def run(self, run: SweepRun) -> int:
        """Train one run, say how it ended, and return its exit status."""
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "a", encoding="utf-8") as log:
            began = log.tell()  # the log may have the output of earlier starts
            process = self._start(run, log)
        if process is None:
            return PREEMPTED_STATUS
        try:
            status = process.wait()
            if status != 0 and self._is_stopped:  # a run that is still starting has nothing to save, and just ends
                status = PREEMPTED_STATUS
            print(f"{run.method}, seed {run.seed}: {_outcome(run, status, began)}", flush=True)
        finally:
            with self._changed:
                self._running.remove(process)
                self._changed.notify_all()
        return status

    def stop(self) -> None:
        """Ask all to save their state and to exit, and wait for them; no more are started."""
        with self._changed:
            self._is_stopped = True
            for process in self._running:
                process.terminate()  # does nothing for one that has ended
            # Ctrl-C may have come while the pool was starting a thread, for which it then does not wait
            self._changed.wait_for(lambda: not self._running)

    def _start(self, run: SweepRun, log: TextIO) -> "subprocess.Popen[bytes] | None":
        with self._changed:
            if self._is_stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dsrl.cli", "train", *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1", LAUNCHER_VARIABLE: str(os.getpid())},
                start_new_session=True,  # Ctrl-C in a terminal would end it before its state is saved
            )
            self._running.append(process)
            return process


def _check(run: SweepRun) -> None:
    """Raise UserError if the run cannot start, or has no evaluations to compare."""
    config = load_config(run.configs, run.settings)
    try:
        preflight(config, world_size=1)
    except UserError as error:
        raise UserError(f"runs.{run.method}: {error}") from error
    if not config.evaluation.sets:
        raise UserError(f"runs.{run.method}: evaluation.sets: is empty, but a sweep compares evaluations; add a set")


def _outcome(run: SweepRun, status: int, began: int) -> str:
    """How a run ended, whose output begins at this byte of its log."""
    if status == PREEMPTED_STATUS:
        return "stopped; the same command continues it"
    if status != 0:
        lines = run.log.read_bytes()[began:].decode(errors="replace").splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("dsrl: ")), f"status {status}")
        return f"failed: {reason.removeprefix('dsrl: ')}; see {run.log}"
    seconds = sum(record["seconds/step"] for record in read_records(run.folder / METRICS_FILE))
    return f"{duration(seconds)} of training"


def _is_finished(run: SweepRun) -> bool:
    config = load_config(run.configs, run.settings)
    done = max((record["step"] for record in read_records(run.folder / METRICS_FILE)), default=0)
    return done >= config.steps and has_results(run.folder, config.evaluation, config.steps)


def _require_own_folders(runs: Sequence[SweepRun], path: Path) -> None:
    """Raise UserError if two runs would have the same folder."""
    by_folder: dict[Path, SweepRun] = {}
    for run in runs:
        other = by_folder.setdefault(run.folder, run)
        if other.method != run.method:
            raise UserError(f"{path}: runs: `{other.method}` and `{run.method}` have the same folder; rename one")
        if other is not run:
            raise UserError(f"{path}: seeds: {run.seed} is named twice; remove one")


def _as_folder_name(method: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in method)
