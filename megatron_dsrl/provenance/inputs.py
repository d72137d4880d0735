"""Hashes of a run's inputs: base model, prompts, held-out sets.

Small files are hashed whole. Of a large model the fingerprint is taken, which reads a few megabytes per file: a start
must not wait for 16 GB to be read. Files that were not read whole have null hashes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dsrl.common.checksum import fingerprint
from megatron_dsrl.config.data import DataConfig, PromptSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.rows import local_files

MODEL_BYTES_READ = 2**28
"""A model folder's files are hashed whole, the smallest first, until this many bytes have been read."""
DATA_BYTES_READ = 2**30
"""The same for the files of a prompt set."""

FileHashes = dict[str, dict[str, Any]]
"""`bytes` and `sha256` (None if the file was not read) by file name."""


def describe_model(path: str, folder: Path) -> dict[str, Any]:
    """The base model of a run.

    Args:
        path: as the configuration or the command line names it.
        folder: its HF folder, hub snapshot or Megatron checkpoint.

    Returns:
        `path`, `folder`, `hub_commit` (None for a folder that is not a hub snapshot), `fingerprint` (see
        `common/checksum.py`) and `files`.
    """
    real = folder.resolve()
    files = [file for file in folder.iterdir() if file.is_file()]
    return {
        "path": path,
        "folder": str(real),
        "hub_commit": real.name if real.parent.name == "snapshots" else None,
        "fingerprint": fingerprint(folder),
        "files": hash_files(files, MODEL_BYTES_READ),
    }


def describe_prompts(config: PromptSetConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A prompt set: where it comes from, and what was taken from there.

    Returns:
        `source`, `subset` and `split` of a hub data set (else None), `files` of a local one, `prompts` (how many) and
        `prompts_sha256` (over the rendered prompts and their answers, in order).
    """
    files = local_files(config.source)
    return {
        "source": config.source,
        "subset": config.subset if files is None else None,
        "split": config.split if files is None else None,
        "files": hash_files(files or [], DATA_BYTES_READ),
        "prompts": len(prompts),
        "prompts_sha256": _hash_prompts(prompts),
    }


def describe_training_sets(config: DataConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The training prompts of a run, as from `describe_prompts`, with a mixture's other sets in `mixed_with`."""
    if not config.mixed_with:
        return describe_prompts(config, prompts)
    first, *others = (describe_prompts(one, [p for p in prompts if p.prompt_set == one.name]) for one in config.sets)
    return {**first, "mixed_with": others}


def hash_files(files: Sequence[Path], bytes_read: int) -> FileHashes:
    """Hash files whole, the smallest first, up to `bytes_read` in total."""
    found: FileHashes = {}
    for size, file in sorted((file.stat().st_size, file) for file in files):
        bytes_read -= size
        found[file.name] = {"bytes": size, "sha256": None}
        if bytes_read >= 0:
            with file.open("rb") as stream:
                found[file.name]["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return dict(sorted(found.items()))


def _hash_prompts(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        for text in (prompt.text, prompt.answer):
            digest.update(text.encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()
