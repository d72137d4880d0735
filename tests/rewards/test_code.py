"""Which program a response stands for, and whether it passes."""

import json

import pytest

from megatron_dsrl.rewards.code import code, complete_program

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
def test_code(response, reward):
    assert code(response, ANSWER) == reward


def test_a_helper_of_the_prompt_stays_available():
    prompt = 'def helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Two more."""\n'
    program = complete_program("```python\ndef f(x):\n    return helper(helper(x))\n```", prompt, "f")
    scope = {}
    exec(program, scope)
    assert scope["f"](1) == 3


def test_a_gold_answer_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="must be a JSON object with prompt, entry_point and test"):
        code("x", "42")
