"""Which program is taken from a response, and whether it passes."""

import json

import pytest

from megatron_dsrl.rewards.code import code, complete_program
from megatron_dsrl.rewards.sandbox_isolation import missing_isolation


@pytest.fixture(autouse=True)
def isolation() -> None:
    """Skips tests where programs cannot be isolated."""
    if problem := missing_isolation():
        pytest.skip(problem)


PROMPT = 'from typing import List\n\n\ndef double(numbers: List[int]) -> List[int]:\n    """Twice each."""\n'
TEST = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
ANSWER = json.dumps({"prompt": PROMPT, "entry_point": "double", "test": TEST})
RIGHT = "    return [2 * n for n in numbers]\n"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (f"```python\n{PROMPT}{RIGHT}```", 1.0),
        (f"Here it is:\n```python\ndef double(numbers):\n{RIGHT}```\nIt doubles.", 1.0),
        (f"```python\n{RIGHT}```", 1.0),
        ("```\nreturn [2 * n for n in numbers]\n```", 1.0),
        (RIGHT, 1.0),
        (f"```python\ndef double(numbers):\n{RIGHT}```\nFor example:\n```python\nprint(double([1]))\n```", 1.0),
        (f"```python\ndef double(numbers): pass\n```\nor\n```python\ndef double(numbers):\n{RIGHT}```", 1.0),
        ("```python\ndef double(numbers):\n    return numbers\n```", 0.0),
        ("```python\nimport sys\nsys.exit(0)\n```", 0.0),
        (f"<think>```python\ndef double(numbers):\n{RIGHT}```</think> Done.", 0.0),
        (f"```python\ndef double(numbers):\n{RIGHT}", 0.0),  # never closed: cut off
        ("I cannot.", 0.0),
        ("", 0.0),
    ],
)
def test_code(response, reward) -> None:
    assert code(response, ANSWER) == reward


@pytest.mark.parametrize("stub", ["def double(numbers):\n", "def double(numbers):\n    # Twice each.\n", ""])
@pytest.mark.parametrize(
    "response",
    [f"```\ndef double(numbers):\n{RIGHT}```", f"```python\nimport math\ndef double(numbers):\n{RIGHT}```"],
)
def test_a_stub_without_a_docstring_may_be_completed_or_repeated(stub: str, response: str) -> None:
    answer = json.dumps({"prompt": stub, "entry_point": "double", "test": TEST})
    assert code(response, answer) == 1.0
    assert code(RIGHT, answer) == float(bool(stub))


FIND_THE_JUDGE = """
import gc, os, sys
def double(numbers):
    frame = sys._getframe()
    while frame:
        scope = {**frame.f_globals, **frame.f_locals}
        tokens = [scope.get("token", ""), scope.get("task", {}).get("token", "")]
        for descriptor in range(64):
            for token in tokens:
                try:
                    os.write(descriptor, f"{token} passed\\n".encode())
                except OSError:
                    pass
        frame = frame.f_back
    os._exit(0)
"""
READ_THE_TESTS = """
import gc, sys
def double(numbers):
    frame, found = sys._getframe(), list(gc.get_objects())
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    texts = [text for each in found for text in (each.values() if isinstance(each, dict) else [each])]
    mark = "assert cand" + "idate(["
    for text in texts:
        if isinstance(text, str) and mark in text:
            return eval(text.split(mark)[1].split("==")[1].splitlines()[0])
"""
EQUAL_TO_EVERYTHING = """
class Anything(list):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
def double(numbers):
    return Anything()
"""
CHANGED_BUILTINS = """
import builtins
class AlwaysTrue(list):
    __eq__ = lambda self, other: True
builtins.list, builtins.exec, builtins.AssertionError = AlwaysTrue, print, KeyError
def double(numbers):
    return AlwaysTrue()
"""


@pytest.mark.parametrize("program", [FIND_THE_JUDGE, READ_THE_TESTS, EQUAL_TO_EVERYTHING, CHANGED_BUILTINS])
def test_a_program_that_tampers_with_its_tests_does_not_pass(program) -> None:
    assert code(f"```python\n{program}```", ANSWER) == 0.0


def test_a_helper_of_the_prompt_stays_available() -> None:
    prompt = 'def helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Two more."""\n'
    program = complete_program("```python\ndef f(x):\n    return helper(helper(x))\n```", prompt, "f")
    scope = {}
    exec(program, scope)
    assert scope["f"](1) == 3
    test = "def check(candidate):\n    assert candidate(1) == helper(helper(1))\n"  # and the tests may use it
    answer = json.dumps({"prompt": prompt, "entry_point": "f", "test": test})
    assert code("```python\ndef f(x):\n    return helper(helper(x))\n```", answer) == 1.0
    assert code("```python\ndef f(x):\n    return helper(x)\n```", answer) == 0.0


def test_a_gold_answer_of_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be a JSON object with prompt, entry_point and test"):
        code("x", "42")
