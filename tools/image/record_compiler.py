#!/usr/bin/env python3
"""Stands in for a compiler: records what it is called with, and leaves an empty file as its output.

check_sources.py copies it to files named after the compilers. The folder COMPILER_CALLS receives a JSON file per call:
the compiler's name, the working directory, and the arguments. A call without output, such as one that asks for the
version, goes to the compiler of that name on PATH.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if "-o" not in arguments:
        os.execvp(name, [name, *arguments])
    with tempfile.NamedTemporaryFile(
        "w", dir=os.environ["COMPILER_CALLS"], suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump([name, os.getcwd(), *arguments], file)
    Path(arguments[arguments.index("-o") + 1]).touch()
