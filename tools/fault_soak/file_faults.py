"""Files of the run that are taken away or damaged. What is missing is made again or noticed, never used."""

import random
import shutil
from pathlib import Path
from typing import ClassVar

from tools.fault_soak.fault import IN_A_STEP, KILLED, USER_ERROR, Fault, Moment, register
from tools.fault_soak.processes import launcher
from tools.fault_soak.training import Training

STOP_SECONDS = 120.0


@register("remove_partial_checkpoint")
class RemovePartialCheckpoint(Fault):
    """While it is being written. The run ends with a message, or the checkpoint turns out damaged when it is needed."""

    moments = (Moment.SAVE,)
    statuses = frozenset({USER_ERROR})

    def apply(self, training: Training) -> str | None:
        partial = training.partial_checkpoints()
        if not partial:
            return None
        shutil.rmtree(partial[0], ignore_errors=True)
        return partial[0].name


class FaultOfFiles(Fault):
    """The run is killed, then its files are changed, then it is started again."""

    statuses = frozenset({KILLED})
    needs_checkpoints: ClassVar[int] = 1
    moments = IN_A_STEP

    def apply(self, training: Training) -> str | None:
        if len(training.checkpoints()) < self.needs_checkpoints or training.status() is not None:
            return None
        for process in training.processes(launcher):
            process.kill()
        return self.change(training) if training.wait_for_end(STOP_SECONDS) == KILLED else None

    def change(self, training: Training) -> str:
        """Change the files of the stopped run; returns which."""
        raise NotImplementedError


@register("remove_export")
class RemoveExport(FaultOfFiles):
    """The newest checkpoint's, once one exists: the run exports that policy before it continues."""

    def change(self, training: Training) -> str:
        self.export = training.folder / "hf" / training.checkpoints()[-1].name
        shutil.rmtree(self.export, ignore_errors=True)
        return str(self.export.relative_to(training.folder))

    def problem(self, training: Training) -> str | None:
        return None if (self.export / "model.safetensors").is_file() else f"{self.export} was not exported again"


@register("damage_checkpoint")
class DamageCheckpoint(FaultOfFiles):
    """The newest one: it is reported, and the one before it is used."""

    needs_checkpoints = 2

    def change(self, training: Training) -> str:
        self.checkpoint = training.checkpoints()[-1]
        return damage(self.checkpoint, self.chance)

    def problem(self, training: Training) -> str | None:
        message = f"checkpoint {self.checkpoint} is damaged and ignored"
        return None if message in training.output() else f"the output lacks the line {message!r}"


@register("damage_all_checkpoints")
class DamageAllCheckpoints(FaultOfFiles):
    """The run refuses to start. As the message says, the folder is then removed, and it starts over."""

    statuses = frozenset({KILLED, USER_ERROR})

    def change(self, training: Training) -> str:
        self.refused = False
        return ", ".join(damage(checkpoint, self.chance) for checkpoint in training.checkpoints())

    def before_restart(self, training: Training, status: int) -> None:
        if status == USER_ERROR:
            self.refused = "remove the folder to start over from the first step" in training.output()
            shutil.rmtree(training.folder / "checkpoints")

    def problem(self, training: Training) -> str | None:
        return None if self.refused else "the run started although all its checkpoints were damaged"


def damage(checkpoint: Path, chance: random.Random) -> str:
    """Remove a file, cut it or change a byte of it; returns what was done."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size > 0)
    file = chance.choice(files)
    what = chance.choice(("removed", "cut", "changed"))
    if what == "removed":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        position = chance.randrange(len(content))
        content[position] ^= 255
        file.write_bytes(content if what == "changed" else content[:position])
    return f"{checkpoint.name}/{file.relative_to(checkpoint)} {what}"
