"""A disk without room, for one rank: the kernel refuses to let its files grow beyond a limit (RLIMIT_FSIZE).

Unlike a small file system this needs no root, and spares the disk of the machine. The error is EFBIG instead of
ENOSPC; both are OSErrors, in every call that writes. tests/test_resume.py has a file system that fills up.
"""

import psutil

from tools.fault_soak.fault import USER_ERROR, register
from tools.fault_soak.process_faults import ProcessFault
from tools.fault_soak.processes import ranks

KIBIBYTES = (0, 16)
"""Nothing can be written; only small files can."""


@register("fill_disk")
class FillDisk(ProcessFault):
    """The run ends with the name of the file, and can be continued once the disk has room. Ranks other than 0 write
    checkpoints only; a run with small enough remaining files continues."""

    role = staticmethod(ranks)
    statuses = frozenset({USER_ERROR})

    def disturb(self, process: psutil.Process) -> None:
        _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (2**10 * self.chance.choice(KIBIBYTES), hard))
