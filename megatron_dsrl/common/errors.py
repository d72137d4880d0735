"""The one exception type for mistakes that a user can fix."""


class UserError(ValueError):
    """Bad input: a message that names the field or file and says what to do.

    `dsrl` prints it as a single message without a traceback and exits with status 2. Any other exception is a bug or a
    machine failure and keeps its traceback.
    """
