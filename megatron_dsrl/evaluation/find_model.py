"""Finds the weights named by the MODEL of `dsrl eval` and the SOURCE of `dsrl convert megatron-to-hf`.

A name may be an HF folder, a hub name or a Megatron checkpoint of `dsrl convert`. A run folder (`runs/X`) means its
newest policy, exported or in a checkpoint; `runs/X/hf/step_000050`, `runs/X/checkpoints/step_000050` and
`runs/X/checkpoints/step_000050/megatron` mean the policy after that step. A run's checkpoints have neither config.json
nor tokenizer: both come from the model that the run trained.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dsrl.checkpoint.compatibility import check_same_model
from megatron_dsrl.checkpoint.state import STATE_FILE, WEIGHTS_FOLDER, SavedState
from megatron_dsrl.common.checksum import changed_file
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.step_names import by_step, step_of
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import hub_name_of, resolve_model_folder
from megatron_dsrl.observability.records import CHECKPOINTS_FOLDER, CONFIG_FILE, EXPORTS_FOLDER
from megatron_dsrl.weights.megatron_checkpoint import is_megatron_checkpoint


@dataclass(frozen=True)
class EvaluatedModel:
    """Weights with their configuration, tokenizer and origin."""

    folder: Path
    """HF folder or Megatron checkpoint."""
    companions: Path
    """Folder of config.json and tokenizer; the same folder except for a run's checkpoints."""
    run_folder: Path | None = None
    """Folder of the run that trained them; None for other models."""
    step: int | None = None
    """Step of that run after which they were saved."""

    @property
    def name(self) -> str:
        """Its hub name, or the path of its folder."""
        named = hub_name_of(self.folder) or str(self.folder)
        return str(self.folder.resolve()) if named in (".", "..") else named

    @property
    def is_megatron(self) -> bool:
        """Whether the weights must be converted before an engine loads them."""
        return is_megatron_checkpoint(self.folder)


def find_model(name: str) -> EvaluatedModel:
    """The weights that a folder or hub name refers to. Raises UserError if the weights are missing or incomplete."""
    folder = resolve_model_folder(name, "MODEL")
    if (folder / CONFIG_FILE).is_file():
        return _newest_of_run(folder)
    if folder.name in (CHECKPOINTS_FOLDER, EXPORTS_FOLDER) and (folder.parent / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds the policies of several steps: name one of them, or {folder.parent}")
    checkpoint = _checkpoint_of(folder)
    return _of_model_folder(folder) if checkpoint is None else _of_checkpoint(checkpoint)


def find_checkpoint(folder: Path, companions: Path | None = None) -> EvaluatedModel:
    """The Megatron checkpoint that a folder refers to. Does not check that it is one. Raises UserError if the
    checkpoint is missing, or a run's checkpoint is incomplete or does not match the companions' model.

    Args:
        folder: a Megatron checkpoint, a run's checkpoint, or a run, for its newest checkpoint.
        companions: folder of config.json and tokenizer; None: the checkpoint's own, or the run's.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if (folder / CONFIG_FILE).is_file():
        checkpoints = _steps(folder, CHECKPOINTS_FOLDER, STATE_FILE)
        if not checkpoints:
            raise UserError(f"{folder} has no checkpoint ({CHECKPOINTS_FOLDER}/step_...) yet")
        return _of_checkpoint(max(checkpoints)[1], companions)
    checkpoint = _checkpoint_of(folder)
    return (
        EvaluatedModel(folder, companions or folder) if checkpoint is None else _of_checkpoint(checkpoint, companions)
    )


def _checkpoint_of(folder: Path) -> Path | None:
    """The run's checkpoint, for a checkpoint's folder or its `megatron` folder; None for other folders."""
    if (folder / STATE_FILE).is_file():
        return folder
    if not (folder.parent / STATE_FILE).is_file():
        return None
    if folder.name != WEIGHTS_FOLDER:
        raise UserError(f"{folder} is not the policy of its checkpoint: that is {folder.parent / WEIGHTS_FOLDER}")
    return folder.parent


def _newest_of_run(run_folder: Path) -> EvaluatedModel:
    """A run's newest policy. An export is preferred to a checkpoint of the same step: it needs no conversion."""
    exports = _steps(run_folder, EXPORTS_FOLDER, "config.json")
    checkpoints = _steps(run_folder, CHECKPOINTS_FOLDER, STATE_FILE)
    found = [(step, places is exports, folder) for places in (exports, checkpoints) for step, folder in places]
    if not found:
        raise UserError(
            f"{run_folder} has neither an exported policy ({EXPORTS_FOLDER}/step_...) nor a checkpoint "
            f"({CHECKPOINTS_FOLDER}/step_...) yet"
        )
    _, is_export, newest = max(found)
    return _of_model_folder(newest) if is_export else _of_checkpoint(newest)


def _steps(run_folder: Path, kind: str, complete: str) -> list[tuple[int, Path]]:
    """Steps of a run's exports or checkpoints, and their folders."""
    return [(step, folder) for step, folder in by_step(run_folder / kind).items() if (folder / complete).is_file()]


def _of_model_folder(folder: Path) -> EvaluatedModel:
    """An HF folder, which a run may have exported, or a checkpoint of `dsrl convert`."""
    if not is_megatron_checkpoint(folder) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no weights: it is not an HF model, a Megatron checkpoint or a run folder")
    step, run_folder = step_of(folder.resolve().name), _run_of(folder)
    if step is not None and folder.resolve().parent.name == EXPORTS_FOLDER and (run_folder / CONFIG_FILE).is_file():
        return EvaluatedModel(folder, folder, run_folder, step)
    return EvaluatedModel(folder, folder)


def _of_checkpoint(checkpoint: Path, companions: Path | None = None) -> EvaluatedModel:
    try:
        saved = SavedState.read(checkpoint / STATE_FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / STATE_FILE} cannot be read: {error}") from error
    _check_files(checkpoint, saved)
    run_folder = _run_of(checkpoint)
    if saved.run.config.get("actor", {}).get("lora"):
        raise UserError(
            f"{checkpoint} holds LoRA adapters only; name an exported policy ({run_folder / EXPORTS_FOLDER}/step_...). "
            "A run exports after its last step, and with checkpoint.export_hf_every_steps earlier"
        )
    companions = companions or _model_of_run(run_folder, saved)
    check_same_model(saved.run.model, asdict(read_architecture(companions)), str(checkpoint))
    return EvaluatedModel(checkpoint / WEIGHTS_FOLDER, companions, run_folder, saved.run.step)


def _run_of(policy: Path) -> Path:
    """The run folder of an export or checkpoint, which may be named `.` or by a link."""
    named, real = policy.parent.parent, policy.resolve().parent.parent
    return named if named.resolve() == real else real


def _check_files(checkpoint: Path, saved: SavedState) -> None:
    """Compare the policy's files with what was written: the sizes of weight files, size and CRC-32 of the others.

    Tensors in weight files have their own CRC-32, compared when they are read (weights/megatron_checkpoint.py).
    """
    policy = {name: entry for name, entry in saved.files.items() if name.startswith(f"{WEIGHTS_FOLDER}/")}
    for name, (size, _) in policy.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{checkpoint} is damaged: {name} is not the file of {size:,} bytes that was written")
    index_files = [name for name in policy if not name.endswith(".distcp")]
    if (problem := changed_file(checkpoint, policy, index_files)) is not None:
        raise UserError(f"{checkpoint} is damaged: {problem}")


def _model_of_run(run_folder: Path, saved: SavedState) -> Path:
    """The model that the run started from; if it is gone, an export, which has the same configuration and tokenizer."""
    path = saved.run.config["model"]["path"]
    try:
        return resolve_model_folder(path, f"{run_folder / CONFIG_FILE}: model.path")
    except UserError as error:
        if exports := _steps(run_folder, EXPORTS_FOLDER, "config.json"):
            return exports[-1][1]
        raise UserError(
            f"{error}. The run's checkpoints need its config.json and tokenizer: start the command where that path "
            "leads to the model"
        ) from error
