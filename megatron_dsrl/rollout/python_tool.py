"""A Python interpreter for code that a model wrote, in the sandbox of the verifier `code`."""

import asyncio
import logging

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rewards.sandbox import LONGEST_REPORT, Limits, UnitTests, run_program
from megatron_dsrl.rewards.sandbox_isolation import require_isolation

logger = logging.getLogger(__name__)

LONGEST_ERROR = 300
"""Characters."""

SESSION = '''
import ast, io, sys

class Beginning(io.TextIOBase):
    """Keeps the beginning of what is written to it."""

    def __init__(self):
        self.text, self.left_out = "", 0

    def writable(self):
        return True

    def write(self, text):
        kept = text[: {limit} - len(self.text)]
        self.text += kept
        self.left_out += len(text) - len(kept)
        return len(text)

def execute(code, namespace):
    tree = ast.parse(code, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), namespace)
        if value is not None:
            print(repr(value))

def line_of(error):
    """The last line of the code that took part in an error; empty if none did."""
    lines, frame = [], error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<code>":
            lines.append(frame.tb_lineno)
        frame = frame.tb_next
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f" (line {{line}})" if line else ""

def run():
    output = sys.stdout = sys.stderr = Beginning()
    problem = ""
    try:
        execute({code!r}, {{"__name__": "__main__"}})
    except SystemExit:
        pass
    except BaseException as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        what = ": ".join(filter(None, (type(error).__name__, message[:{longest_error}])))
        problem = f"error: {{what}}{{line_of(error)}}"
    if output.left_out:
        output.text += f"... ({{output.left_out}} more characters)"
    return "\\n".join(filter(None, (output.text.rstrip("\\n"), problem)))
'''
"""Runs code as an interactive session does: what it prints, and the value of its last expression."""


class PythonTool:
    """Runs Python code, with the standard library only, and answers with what it printed.

    The value of an expression in the last line is printed too. Every call is a new process that knows nothing of
    earlier ones. A call that fails is answered with `error: ...` after what it had printed.
    """

    def __init__(
        self,
        wall_seconds: float = 5.0,
        cpu_seconds: int = 5,
        memory_megabytes: int = 1024,
        folder_megabytes: int = 64,
        max_characters: int = 2000,
        allow_unsafe: bool = False,
    ) -> None:
        """Raise UserError if code cannot be isolated on this machine, or the output could not be passed on.

        Args:
            wall_seconds, cpu_seconds: limits of wall-clock and processor time of each call.
            memory_megabytes: limit of address space.
            folder_megabytes: limit of the files that it writes, which are in memory too.
            max_characters: of the output; what comes after them is left out.
            allow_unsafe: if the kernel does not permit isolation, run code anyway. It can then reach files of the user
                and fill the disk.
        """
        longest = LONGEST_REPORT - 2 * LONGEST_ERROR
        if not 1 <= max_characters <= longest:
            raise UserError(f"the Python tool: max_characters = {max_characters} must be between 1 and {longest}")
        self._isolated = require_isolation("the Python tool", allow_unsafe)
        if not self._isolated:
            logger.warning("the Python tool runs code UNSAFELY (allow_unsafe): it can reach your files")
        self._max_characters = max_characters
        self._limits = Limits(
            wall_seconds=wall_seconds,
            cpu_seconds=cpu_seconds,
            memory_bytes=memory_megabytes * 2**20,
            folder_bytes=folder_megabytes * 2**20,
        )

    async def __call__(self, code: str) -> str:
        """What the code printed."""
        program = SESSION.format(code=code, limit=self._max_characters, longest_error=LONGEST_ERROR)
        tests = UnitTests(entry_point="run", source="report = run()\n")
        outcome = await asyncio.to_thread(run_program, program, self._limits, tests, self._isolated)
        if outcome.passed:
            return outcome.report
        if outcome.reason == "timeout":
            return f"error: no result within {self._limits.wall_seconds:g} s"
        return f"error: {outcome.reason}"
