"""Exceptions that end a command with one message: mistakes that a user can fix, and failures of the machine."""


class UserError(ValueError):
    """Bad input: a message that names the field or file and says what to do.

    `dsrl` prints it as a single message without a traceback and exits with status 2. Any other exception but
    MachineError is a bug or a crash and keeps its traceback.
    """


class MachineError(RuntimeError):
    """A machine failure that the next start may not meet again.

    `dsrl` prints it as a single message without a traceback and exits with status 1, after which SLURM jobs try again.
    """
