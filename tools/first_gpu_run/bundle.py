"""One archive to attach to a bug report: record, logs, environment, flight recorder, provenance; without secrets."""

import io
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path

from tools.first_gpu_run.secrets import environment_lines, without_secrets

TEXT_BYTES = 5 * 2**20
"""Longer text files are cut to their ends, which say how it failed."""
RECORDER_BYTES = 64 * 2**20
"""Larger dumps of the flight recorder are left out."""
TEXT_FILES = ("*.log", "*.json", "*.jsonl", "*.yaml", "*.md", "*.txt")
LEFT_OUT = {"rollouts", "model", "tensorboard", "hf", "checkpoints"}
"""Folders with weights, tokenizer and samples."""
SYSTEM_COMMANDS = (
    ("nvidia-smi",),
    ("nvidia-smi", "topo", "-m"),
    ("nvidia-smi", "-q", "-d", "MEMORY,ECC,PERFORMANCE,COMPUTE"),
    ("df", "-h", "/tmp", "/dev/shm"),
    ("free", "-g"),
    ("lsb_release", "-a"),
)
"""Their output is in the archive if they exist."""
COMMAND_SECONDS = 30


def write_bundle(folder: Path, stage: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Write `bug_report.tar.gz` into the folder of a first run; returns it.

    Args:
        folder: with the record, and a folder for each stage.
        stage: the one that failed. Of the others only their outputs are taken.
        environment: variables of this process.
    """
    target = folder / "bug_report.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for name, text in _described(environment):
            _add(archive, name, without_secrets(text, environment).encode())
        for file in _texts(folder, stage):
            _add(archive, _name(file, folder), _end_of(file, environment))
        for file in sorted((folder / stage).rglob("collectives/*")):
            if file.is_file() and file.stat().st_size <= RECORDER_BYTES:
                archive.add(file, f"bug_report/{_name(file, folder)}", recursive=False)
    return target


def contents(archive: Path) -> list[str]:
    """Names of the files in an archive."""
    with tarfile.open(archive) as opened:
        return opened.getnames()


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"bug_report/{name}")
    entry.size, entry.mode = len(content), 0o644
    archive.addfile(entry, io.BytesIO(content))


def _texts(folder: Path, stage: str) -> Iterator[Path]:
    """The record, all output of the stage, and the output of the other stages."""
    yield from (file for pattern in TEXT_FILES for file in sorted(folder.glob(pattern)))
    yield from sorted(file for file in folder.glob("*/output.log") if file.parent.name != stage)
    for pattern in TEXT_FILES:
        for file in sorted((folder / stage).rglob(pattern)):
            if not LEFT_OUT & set(file.relative_to(folder).parts):
                yield file


def _end_of(file: Path, environment: Mapping[str, str]) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TEXT_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return without_secrets(text, environment).encode()


def _described(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield "environment.txt", "\n".join(environment_lines(environment)) + "\n"
    installed = sorted({f"{each.metadata['Name']}=={each.version}" for each in distributions()}, key=str.lower)
    yield "packages.txt", "\n".join(installed) + "\n"
    lines = [f"{platform.platform()}, Python {sys.version}"]
    for command in SYSTEM_COMMANDS:
        lines += ["", f"$ {' '.join(command)}", _output(command)]
    yield "system.txt", "\n".join(lines) + "\n"


def _output(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stdout + done.stderr
