"""The record stored with a converted checkpoint, and the check that config.json still matches it.

Weights do not reveal their RoPE base, norm epsilon or head dimension: with a different config.json they load without an
error and produce gibberish. Therefore the architecture is recorded when a checkpoint is written.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dsrl.common.checksum import changed_file
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.architecture import Architecture

RECORD_FILE = "megatron_dsrl.json"
FORMAT_VERSION = 1
CHECKED_FILES = (".metadata", "common.pt", "metadata.json")
"""The files of a checkpoint whose checksums are recorded. The weight files contain their own checksums."""


@dataclass(frozen=True)
class CheckpointRecord:
    """Contents of the record file."""

    architecture: dict[str, Any]
    """The architecture, from `architecture_fields`."""
    dtype: str
    """Dtype of the weights."""
    layout: dict[str, int]
    """The layout the chunks were cut for."""
    source: str
    """Folder or hub name the checkpoint was converted from."""
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Size in bytes and CRC-32 of `CHECKED_FILES`, by name."""
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """A flat dictionary of all shapes and constants that affect what the model computes."""
    fields = asdict(architecture)
    fields["family"] = architecture.family.hf_name
    fields |= fields.pop("experts") or {}
    kind = getattr(architecture.rope_scaling, "rope_type", "")
    fields |= {f"{kind}_{name}": value for name, value in (fields.pop("rope_scaling") or {}).items()}
    del fields["initializer_range"]
    return fields


def read_record(folder: Path) -> CheckpointRecord | None:
    """The record of a checkpoint; None if another program wrote the checkpoint. Raises UserError if the record is
    damaged or of a newer version."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = CheckpointRecord(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if record.format_version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {record.format_version}; this program reads version {FORMAT_VERSION}"
        )
    return record


def check_record(folder: Path, architecture: Architecture) -> None:
    """Check an architecture, such as that of the current config.json, against a checkpoint's record, if it has one, and
    the checkpoint's index files against their recorded checksums.

    Raises UserError, which names every field that differs, or a damaged file.
    """
    record = read_record(folder)
    if record is not None:
        if (problem := changed_file(folder, record.files, record.files)) is not None:
            raise UserError(f"{folder} is damaged: {problem}. Convert or copy it again")
        refuse_drift(record.architecture, architecture_fields(architecture), f"{folder / RECORD_FILE}", "config.json")


def refuse_drift(expected: dict[str, Any], found: dict[str, Any], expected_by: str, found_in: str) -> None:
    """Raise UserError if two architectures differ; the message names every field that does."""
    differing = [
        f"{field} is {found.get(field)!r} in {found_in}, {expected.get(field)!r} in {expected_by}"
        for field in {**expected, **found}
        if expected.get(field) != found.get(field)
    ]
    if differing:
        raise UserError("the model is not the expected one: " + "; ".join(differing))
