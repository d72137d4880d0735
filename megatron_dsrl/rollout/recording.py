"""Rollouts on disk: one JSON line per group, those of the step's batch first.

Groups that were sampled but not trained on (dynamic sampling) have `in_batch` false. Reading returns exactly what was
written.

Encoding holds Python's interpreter lock, so doing it in a thread slows concurrent training. orjson takes a thirtieth
of the time of `json` over `dataclasses.asdict`; tools/benchmark_recording.py compares them.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_dsrl.common.disk import replacing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.sample import Sample, SampleGroup


def rollout_file(run_folder: Path, step: int) -> Path:
    """File of a step's rollouts (steps count from 1) in a run folder."""
    return run_folder / "rollouts" / f"step_{step:06d}.jsonl"


def write_groups(file: Path, groups: Sequence[SampleGroup], others: Sequence[SampleGroup] = ()) -> None:
    """Write the batch of a step, in order, and `others`, which were not trained on. The file appears complete or not at
    all; its folder is created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        for in_batch, part in ((True, groups), (False, others)):
            for group in part:
                line = {"prompt": group.prompt, "samples": group.samples, "in_batch": in_batch}
                stream.write(as_json_line(line))


def as_json_line(record: dict[str, Any]) -> bytes:
    """A line with dataclasses and compact arrays as JSON. Floats have as few digits as identify their float32."""
    return orjson.dumps(record, default=np.asarray, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


class RolloutRecorder:
    """Writes the rollouts of steps in a background thread; at most one step is being written at a time.

    A context manager: when it exits, everything is on disk.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._in_flight: Future[None] | None = None

    def record(self, step: int, groups: Sequence[SampleGroup], others: Sequence[SampleGroup] = ()) -> None:
        """Start writing the rollouts of a step, as `write_groups` does, after a `flush` of the previous step's."""
        self.flush()
        self._in_flight = self._thread.submit(self._write, step, groups, others)

    def flush(self) -> None:
        """Wait until everything recorded is on disk. Raises UserError if it could not be written."""
        write, self._in_flight = self._in_flight, None
        if write is not None:
            write.result()

    def __enter__(self) -> "RolloutRecorder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._thread.shutdown()
        if error is None:
            self.flush()

    def _write(self, step: int, groups: Sequence[SampleGroup], others: Sequence[SampleGroup]) -> None:
        file = rollout_file(self._run_folder, step)
        try:
            write_groups(file, groups, others)
        except OSError as error:
            raise UserError(
                f"the rollouts of step {step} could not be written to {file}: {error}. Free space, or turn off "
                "observability.save_rollouts; the run continues from its newest checkpoint when restarted"
            ) from error


def read_groups(file: Path) -> list[SampleGroup]:
    """All groups that were sampled for a step. Raises UserError if the file is missing, or a line is not a group."""
    return [group for group, _ in _read(file)]


def read_batch(file: Path) -> tuple[list[SampleGroup], list[SampleGroup]]:
    """The groups that were trained on, in their order, and the others; raises like `read_groups`."""
    groups = _read(file)
    return [group for group, in_batch in groups if in_batch], [group for group, in_batch in groups if not in_batch]


def _read(file: Path) -> list[tuple[SampleGroup, bool]]:
    try:
        with open(file, "rb") as stream:
            lines = list(stream)
    except FileNotFoundError as error:
        raise UserError(f"no saved rollouts: {file} does not exist") from error
    groups = []
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
            groups.append((group_of_record(record), record["in_batch"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: not a group of saved rollouts ({error!r})") from error
    return groups


def group_of_record(record: dict[str, Any]) -> SampleGroup:
    """A group from its decoded JSON."""
    return SampleGroup(
        prompt=prompt_of_record(record["prompt"]),
        samples=tuple(_sample(sample) for sample in record["samples"]),
    )


def prompt_of_record(record: dict[str, Any]) -> Prompt:
    """A prompt from its decoded JSON."""
    return Prompt(**record | {name: tuple(record[name]) for name in ("token_ids", "other_answers")})


def _sample(record: dict[str, Any]) -> Sample:
    pairs = {name: tuple(map(tuple, record[name])) for name in ("older_versions", "turn_rewards")}
    scored = record["scored"] and tuple(record["scored"])
    return Sample(**record | pairs | {"scored": scored})
