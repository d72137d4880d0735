"""`dsrl push`: an exported policy with its model card, to the hub."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import kinds_of_causes
from megatron_dsrl.evaluation.find_model import EvaluatedModel, find_model
from megatron_dsrl.publishing.base_model import base_model_name
from megatron_dsrl.publishing.card import CARD_FILE, is_generated, model_card, without_private_places
from megatron_dsrl.weights.hf_writer import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, COMPANIONS

AS_THEY_ARE = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *COMPANIONS,
    "LICENSE*",
    f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}",
)
"""The files of an HF folder to upload unchanged. Others stay local, such as `provenance.jsonl`, which contains folder
and host names."""
DRY_RUN_FOLDER = "upload"
"""Where `--dry-run` writes, within the folder of the policy. `AS_THEY_ARE` does not match it."""


@dataclass(frozen=True)
class Upload:
    """What to upload, and where."""

    folder: Path
    files: list[Path]
    """Files in the folder, to upload as they are."""
    texts: Mapping[str, str]
    """Text of the other files by their name in the upload: the card, which may not be on disk yet, and the
    configuration of LoRA adapters, which on disk may name a folder of this machine."""
    message: str
    """Message of the commit."""


def prepare_upload(name: str, base_model: str | None) -> Upload:
    """Collect what `dsrl push` would upload. Changes nothing and needs no network. Raises UserError if no policy has
    been exported, or it has no card.

    Args:
        name: folder of a run (its newest policy), of one of its exports, or any HF folder with a card.
        base_model: the hub's name of the model that the run began with; None: found if possible.
    """
    model = _exported_model(name)
    files = sorted({file for pattern in AS_THEY_ARE for file in model.folder.glob(pattern) if file.is_file()})
    if model.run_folder is not None and is_generated(model.folder):
        card = model_card(model.run_folder, model.step or 0, base_model)
    elif (model.folder / CARD_FILE).is_file():
        if base_model:
            raise UserError(f"--base-model: {model.folder / CARD_FILE} stays as it is; set base_model there")
        card = (model.folder / CARD_FILE).read_text(encoding="utf-8")
    else:
        raise UserError(f"{model.folder} has no model card: write {CARD_FILE} there, or push the run that made it")
    step = "" if model.step is None else f" after step {model.step}"
    texts = {CARD_FILE: card, **_adapter_config(model.folder / ADAPTER_FOLDER / ADAPTER_CONFIG, base_model)}
    return Upload(model.folder, files, texts, f"Policy{step}, by megatron-dsrl")


def _adapter_config(file: Path, base_model: str | None) -> dict[str, str]:
    """PEFT's configuration with the hub's name of the base model, or else without its folder; nothing without LoRA."""
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    config["base_model_name_or_path"] = base_model or base_model_name(base) or without_private_places(base)
    return {f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def push(upload: Upload, repository: str, private: bool, report: Callable[[str], None]) -> str:
    """Create the repository if necessary and upload everything in one commit. Returns the model's address on the hub.
    Raises UserError if the token is missing, the hub refuses, cannot be reached, or the repository is public.

    Args:
        upload: what `prepare_upload` has found. The card is written into its folder.
        repository: `OWNER/NAME`.
        private: make a new repository private, and refuse an existing public one.
        report: called with a line before the upload begins.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UserError(
            "no token for the hub: set HF_TOKEN to one that may write (its settings, Access Tokens), or run "
            "`hf auth login`"
        )
    api = HfApi()
    with _asking_to_write(repository, api.endpoint):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        is_private = api.repo_info(repository).private
        if private and not is_private:
            raise UserError(f"--private: {address} exists and is public; make it private there, or choose another name")
        visibility = "private" if is_private else "public"
        report(f"uploading {describe_files(upload.files)} and the card to {address} ({visibility})")
        (upload.folder / CARD_FILE).write_text(upload.texts[CARD_FILE], encoding="utf-8")
        contents: dict[str, bytes | Path] = {name: text.encode() for name, text in upload.texts.items()}
        contents |= {file.relative_to(upload.folder).as_posix(): file for file in upload.files}
        operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        api.create_commit(repository, operations, commit_message=upload.message)
    return str(address)


def write_upload(upload: Upload) -> Path:
    """Write what `push` would upload, and nothing else, to `DRY_RUN_FOLDER` within the folder of the policy.

    Files are hard links if the file system supports them, otherwise copies. An earlier dry run is overwritten. Returns
    the folder written. Raises UserError if the folder holds other files or cannot be written.
    """
    folder = upload.folder / DRY_RUN_FOLDER
    try:
        targets = {folder / file.relative_to(upload.folder): file for file in upload.files}
        texts = {folder / name: text for name, text in upload.texts.items()}
        others = {file for file in folder.rglob("*") if not file.is_dir()} - {*targets, *texts}
        if others:
            other = min(others).relative_to(folder)
            raise UserError(f"{folder} has files that do not belong to the upload ({other}); remove the folder")
        for target in (*targets, *texts):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
        for target, file in targets.items():
            _link_or_copy(file, target)
        for target, text in texts.items():
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--dry-run: {folder} cannot be written: {error}") from error
    return folder


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def check_repository(repository: str) -> None:
    """Raise UserError if it is not `OWNER/NAME` as the hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"`{repository}` is not a valid name on the hub: {error}") from error
    if repository.count("/") != 1:
        raise UserError(f"`{repository}`: name the owner too, as in OWNER/NAME")


def describe_files(files: Sequence[Path]) -> str:
    """Number and total size."""
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB"


def _exported_model(name: str) -> EvaluatedModel:
    if not Path(name).is_dir():
        raise UserError(f"no such folder: {name}; name a run, one of its exports (RUN/hf/step_...) or an HF folder")
    model = find_model(name)
    if model.is_megatron:
        raise UserError(
            f"{model.folder} is a Megatron checkpoint, and the hub's libraries load HF folders: write one with `dsrl "
            f"convert megatron-to-hf {name} TARGET` and push TARGET, or name an older export (RUN/hf/step_...)"
        )
    return model


@contextmanager
def _asking_to_write(repository: str, endpoint: str) -> Iterator[None]:
    """Raise UserError instead of what the hub's clients raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many types, see `hub.asking_hub`
        raise UserError(f"{repository} could not be uploaded: {_explain(error, endpoint)}") from error


def _explain(error: Exception, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{endpoint} rejects the token (HF_TOKEN, or of `hf auth login`); create one with write access"
    if status == 403:
        return "the token cannot write there: it needs write access, and its account must belong to the owner"
    if kinds_of_causes(error) & {"ConnectionError", "TransportError", "OfflineModeIsEnabled"}:
        return (
            f"{endpoint} cannot be reached from here, or HF_HUB_OFFLINE is set; copy the folder to a machine "
            "with a network and push it from there (HF_ENDPOINT is the address of another hub)"
        )
    return f"{type(error).__name__}: {error}"
