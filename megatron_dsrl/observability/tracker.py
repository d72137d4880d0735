"""Records that rank 0 writes during a run: metrics.jsonl, evaluation.jsonl with some responses, and TensorBoard.

The JSON-lines files are the source of truth (the report takes all numbers from them); TensorBoard is a view, and so are
the experiment trackers, which follow the files (`trackers/`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_dsrl.common.disk import writing
from megatron_dsrl.observability import records
from megatron_dsrl.observability.records import Record

WHAT_IS_SAFE = "The records and checkpoints of earlier steps are untouched"


class Tracker:
    """Writes step and evaluation records of one run; every record is on disk when the call returns.

    Opening an existing run folder repairs a half-written last line and continues after the last record. To resume
    from a checkpoint, call `truncate_after` with the checkpoint's step first. Only rank 0 has a tracker.
    """

    def __init__(self, run_folder: Path, tensorboard: bool = True) -> None:
        """Open the files in `run_folder`, which is created if missing.

        Raises UserError when a file of the folder is damaged other than by a half-written last line. All methods raise
        it when the disk is full or fails; a line that is then half-written is removed when the folder is opened again.
        """
        with writing(run_folder, WHAT_IS_SAFE):
            run_folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _RecordFile(run_folder / records.METRICS_FILE)
        self._evaluations = _RecordFile(run_folder / records.EVALUATION_FILE)
        self._responses = _RecordFile(run_folder / records.RESPONSES_FILE)
        self._config_file = run_folder / records.CONFIG_FILE
        self._tensorboard_folder = run_folder / "tensorboard" if tensorboard else None
        self._writer = self._open_writer(purge_step=None)

    @property
    def last_step(self) -> int:
        """Step of the last step record; 0 before the first one."""
        return self._metrics.last_step

    def log_step(self, record: Record) -> None:
        """Record one training step. `record["step"]` counts from 1 and exceeds every step recorded before."""
        assert record["step"] > self.last_step, f"step {record['step']} after step {self.last_step}"
        record = records.plain_record(record)
        self._metrics.append(record)
        self._add_scalars(record)

    def log_evaluation(self, record: Record, responses: Sequence[Record] = ()) -> None:
        """Record the evaluation of one set with some of its responses; step 0 is before training.

        The set's name is `record["set"]`. The responses are written first, so an evaluation on disk always has them.
        """
        record = records.plain_record(record)
        if responses:
            self._responses.append({"step": record["step"], "set": record["set"], "responses": list(responses)})
        self._evaluations.append(record)
        self._add_scalars(record)

    def evaluated_sets(self, step: int) -> set[str]:
        """Names of the sets whose evaluation after this step is recorded."""
        return {record["set"] for record in self._evaluations.read() if record["step"] == step}

    def truncate_after(self, step: int) -> None:
        """Forget every step and evaluation record after `step`, as when a run resumes from the checkpoint of `step`.

        TensorBoard hides its later scalars. -1 forgets everything.
        """
        self._metrics.truncate_after(step)
        self._evaluations.truncate_after(step)
        self._responses.truncate_after(step)
        self._close_writer()
        self._writer = self._open_writer(purge_step=step + 1)

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        self._metrics.close()
        self._evaluations.close()
        self._responses.close()
        self._close_writer()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _writing(self) -> AbstractContextManager[None]:
        assert self._tensorboard_folder is not None
        return writing(self._tensorboard_folder, WHAT_IS_SAFE)

    def _open_writer(self, purge_step: int | None) -> SummaryWriter | None:
        if self._tensorboard_folder is None:
            return None
        with self._writing():
            writer = SummaryWriter(str(self._tensorboard_folder), purge_step=purge_step)
            if self._config_file.is_file():
                text = self._config_file.read_text(encoding="utf-8")
                writer.add_text("config", f"```yaml\n{text}```", max((purge_step or 0) - 1, 0))
            return writer

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing():
                writer.close()

    def _add_scalars(self, record: Record) -> None:
        if self._writer is None:
            return
        with self._writing():
            for key, value in records.shown_metrics(record).items():
                self._writer.add_scalar(key, value, record["step"])
            self._writer.flush()


class _RecordFile:
    """One JSON-lines file, open for append."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path, WHAT_IS_SAFE):
            self.last_step = _last_step(records.repair_records(path))
            self._file = self._open()

    def append(self, record: Record) -> None:
        """Write one record. Raises UserError, with the file's name, if the disk refuses it."""
        records.append_record(self._file, record, WHAT_IS_SAFE)
        self.last_step = max(record["step"], self.last_step)

    def read(self) -> list[Record]:
        """All records, in the order of the file."""
        return records.read_records(self._path)

    def truncate_after(self, step: int) -> None:
        """Drop the records after `step`; the file is replaced atomically."""
        self._file.close()
        kept = [record for record in records.repair_records(self._path) if record["step"] <= step]
        with writing(self._path, WHAT_IS_SAFE):
            records.replace_records(self._path, kept)
            self._file = self._open()
        self.last_step = _last_step(kept)

    def close(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        return self._path.open("ab", buffering=0)


def _last_step(written: list[Record]) -> int:
    return max((record["step"] for record in written), default=0)
