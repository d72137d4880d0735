"""Generated Python code, judged by running the problem's tests on it in the sandbox.

Problems have HumanEval's form (arXiv 2107.03374): the beginning of a program that ends inside a function, and tests
that define `check(candidate)`. Differences: a chat model's answer is the last code block that defines the function, and
only text without any code block is taken as a continuation of the prompt. The tests run in a separate process, and the
function takes and returns plain data by value (`sandbox.UnitTests`); tests that depend on anything else, such as an
argument changed in place, fail.
"""

import json
import re
import textwrap

from megatron_dsrl.rewards.boxed import after_thinking
from megatron_dsrl.rewards.sandbox import Limits, UnitTests, run_program
from megatron_dsrl.rewards.sandbox_isolation import missing_isolation

CODE_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def code(
    response: str,
    answer: str,
    wall_seconds: float = 5.0,
    cpu_seconds: int = 5,
    memory_megabytes: int = 1024,
    folder_megabytes: int = 64,
    allow_unsafe: bool = False,
) -> float:
    """1.0 when the program passes its tests within the limits, else 0.0.

    Args:
        answer: JSON object with the strings `prompt`, `entry_point` and `test`.
        wall_seconds: limit of wall-clock time. Must be below the pool's `reward.timeout_seconds`.
        cpu_seconds: limit of processor time.
        memory_megabytes: limit of address space.
        folder_megabytes: limit of the files that it writes, which are in memory too.
        allow_unsafe: if the kernel does not permit isolation, run the program anyway. It can then reach files
            of the user and fill the disk.

    Raises:
        ValueError: the gold answer is not such an object, or the program cannot be isolated.
    """
    problem = _problem(answer)
    program = complete_program(response, problem["prompt"], problem["entry_point"])
    if program is None:
        return 0.0
    tests = UnitTests(
        entry_point=problem["entry_point"],
        source=f"{problem['test']}\n\ncheck({problem['entry_point']})\n",
        preparation=_whole_prompt(problem["prompt"]),
    )
    limits = Limits(
        wall_seconds=wall_seconds,
        cpu_seconds=cpu_seconds,
        memory_bytes=memory_megabytes * 2**20,
        folder_bytes=folder_megabytes * 2**20,
    )
    isolated = not allow_unsafe or missing_isolation() is None
    return float(run_program(program, limits, tests, isolated).passed)


def complete_program(response: str, prompt: str, entry_point: str) -> str | None:
    """The prompt completed by the response; None if the response has no code."""
    text = after_thinking(response)
    blocks = CODE_BLOCK.findall(text) or ([] if "```" in text else [text])
    if not any(block.strip() for block in blocks):
        return None
    definition = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    whole = [block for block in blocks if definition.search(block)]
    if whole:
        # The prompt's imports and definitions stay available; its stub of the function is redefined.
        return f"{_whole_prompt(prompt)}\n\n{textwrap.dedent(whole[-1])}"
    return prompt.rstrip(" ") + _as_body(blocks[-1])


def _whole_prompt(prompt: str) -> str:
    """The prompt as a complete program: a function at its end may not have a body yet."""
    try:
        compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"
    return prompt


def _as_body(lines: str) -> str:
    """Lines as the body of a function, indented by four spaces unless they are indented already."""
    lines = lines.strip("\n")
    if lines.startswith((" ", "\t")):
        return lines
    return textwrap.indent(lines, "    ")


def _problem(answer: str) -> dict[str, str]:
    try:
        problem = json.loads(answer)
        return {name: problem[name] for name in ("prompt", "entry_point", "test")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the gold answer of a code problem must be a JSON object with prompt, entry_point and test: {error!r}"
        ) from error
