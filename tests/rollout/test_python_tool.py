"""The Python tool answers with what a program printed, and its limits hold."""

import asyncio

import pytest

from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.tokenizer import decode, encode
from megatron_dsrl.rollout.growing_response import GrowingResponse
from megatron_dsrl.rollout.python_tool import PythonTool
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.tool_chat import ToolChat
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.usefixtures("isolation")


def answers(*programs: str, **options: object) -> list[str]:
    tool = PythonTool(**{"wall_seconds": 30.0, **options})

    async def ask() -> list[str]:
        return await asyncio.gather(*map(tool, programs))

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("print(6 * 7)", "42"),
        ("x = 6\nx * 7", "42"),
        ("import sys\nprint('a', file=sys.stderr)\nprint('ü')\nNone", "a\nü"),
        ("def f(n):\n    return n * f(n - 1) if n else 1\nf(10)", "3628800"),
        ("print('a')\nimport sys\nsys.exit(1)", "a"),
        ("", ""),
        ("print('a')\nprint(1 / 0)", "a\nerror: ZeroDivisionError: division by zero (line 2)"),
        ("def f():\n    raise KeyError\n\nf()", "error: KeyError (line 2)"),
        ("x = (", "error: SyntaxError: '(' was never closed (line 1)"),
        ("import json\njson.loads('[')", "error: JSONDecodeError: Expecting value: line 1 column 2 (char 1) (line 2)"),
        ("bytearray(2**31)", "error: MemoryError (line 1)"),
        ("import os; os._exit(3)", "error: exited with status 3"),
        ("import socket; socket.socket()", "error: PermissionError: [Errno 1] Operation not permitted (line 1)"),
        (
            "open('/etc/passwd')",
            "error: FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd' (line 1)",
        ),
    ],
)
def test_what_a_program_printed(program: str, answer: str) -> None:
    assert answers(program) == [answer]


def test_output_and_time_are_limited() -> None:
    assert answers("print('abc' * 1000)\n1 / 0", max_characters=5) == [
        "abcab... (2996 more characters)\nerror: ZeroDivisionError: division by zero (line 2)"
    ]
    endless = "print('lost', flush=True)\nwhile True: pass"
    assert answers(endless, wall_seconds=1.0) == ["error: no result within 1 s"]
    (longest,) = answers("print('\\U0001f600' * 20_000)", max_characters=9000)
    assert longest == "\U0001f600" * 9000 + "... (11001 more characters)"
    with pytest.raises(UserError, match="max_characters = 10000 must be between 1 and 9400"):
        PythonTool(max_characters=10000)


def test_every_call_starts_from_nothing() -> None:
    leave_behind = "x = 1\nopen('file', 'w').write('x')"
    look = "import os\nos.listdir('.'), 'x' in globals()"
    assert answers(leave_behind, look) == ["1", "([], False)"]


def test_a_chat_with_python() -> None:
    tokenizer = build_tokenizer()
    turns = [encode(tokenizer, turn) for turn in ("<tool>for n in range(2):\n    print(n)</tool>", "done<|im_end|>")]
    engine = ScriptedEngine(lambda request: turns[len(engine.requests) - 1])
    response = GrowingResponse(
        Prompt(0, text="", token_ids=(1,), answer=""),
        1,
        engine,
        SamplingParameters(200, (tokenizer.eos_token_id,)),
        lambda text: encode(tokenizer, text),
        lambda ids: decode(tokenizer, ids),
    )
    asyncio.run(ToolChat("python", {"wall_seconds": 30.0})(response))
    assert response.text == "<tool>for n in range(2):\n    print(n)</tool><result>0\n1</result>done"
