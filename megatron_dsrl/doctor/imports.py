"""Whether a module can be imported, tried in a separate process.

Metadata cannot tell whether a compiled extension loads: it may miss a symbol, which is an error of the import, or crash
the interpreter.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping

LIMIT_SECONDS = 600


def import_problem(module: str, then: str = "", variables: Mapping[str, str] | None = None) -> str | None:
    """Import a module in a new process.

    Args:
        module: its full name.
        then: statement that must not raise; `module` is the imported module.
        variables: added to the environment.

    Returns:
        None if it works; otherwise the end of the traceback, or the signal that ended the process.
    """
    # torch first: extensions are linked to its libraries without saying where they are.
    code = f"import importlib, torch; module = importlib.import_module({module!r}); {then}"
    command = [sys.executable, "-c", code]
    environment = os.environ | dict(variables or {})
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not imported within {LIMIT_SECONDS} s"
    if finished.returncode == 0:
        return None
    lines = finished.stderr.strip().splitlines()[-8:]
    if finished.returncode < 0:
        lines.append(f"its import was ended by {signal.Signals(-finished.returncode).name}")
    return "\n".join(lines)
