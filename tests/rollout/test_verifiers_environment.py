"""Environments of the package `verifiers`: the guide's, with the real package, where it is installed.

It is not among the tests' packages, because it needs other versions than SGLang pins. To run these tests, install it in
a copy of the environment: pip install 'verifiers>=0.4'.
"""

import asyncio
import json
import sys

import pytest

from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.tokenizer import decode, encode
from megatron_dsrl.rollout.growing_response import GrowingResponse
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.verifiers_environment import VerifiersEnvironment, import_verifiers, write_tasks
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_run import REPOSITORY

ROWS = [{"problem": "1+2+3+4=?", "answer": "10"}, {"problem": "9-1-1-1=?", "answer": "6"}]
RIGHT, WRONG, END = "\\boxed{10}<|im_end|>", "\\boxed{11}<|im_end|>", "<|im_end|>"


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(UserError, match="pip install 'verifiers>=0.4'"):
        import_verifiers()


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """Configuration of the guide's environment, with two problems."""
    pytest.importorskip("verifiers.v1", reason="needs the package verifiers")
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "verifiers"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"taskset": {"source": str(tmp_path / "problems.jsonl")}}


def play(environment: VerifiersEnvironment, key: str, *turns: str, tokens: int = 100) -> GrowingResponse:
    """The response of a model that writes these turns."""
    tokenizer = build_tokenizer()
    ids = [encode(tokenizer, turn) for turn in turns]
    engine = ScriptedEngine(lambda request: ids[len(engine.requests) - 1])
    response = GrowingResponse(
        Prompt(0, text="", token_ids=(1,), answer=key),
        1,
        engine,
        SamplingParameters(tokens, (tokenizer.eos_token_id,)),
        lambda text: encode(tokenizer, text),
        lambda ids: decode(tokenizer, ids),
    )
    asyncio.run(environment(response))
    return response


def test_the_environment_leads_the_conversation_and_judges_it(config, tmp_path) -> None:
    assert write_tasks("second_try", tmp_path / "rows.jsonl", config, skip=0, limit=1) == 1
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["messages"] == [{"role": "user", "content": "1+2+3+4=?"}]
    environment = VerifiersEnvironment("second_try", config)

    def rewards(*turns: str, **limits: int) -> tuple[str, list[float], str]:
        response = play(environment, row["answer"], *turns, **limits)
        completion = response.as_completion()
        return response.text, [value for _, value in completion.turn_rewards], completion.finish_reason

    asked_again = "\nuser\n1+2+3+4=?\nassistant\n"
    assert rewards(RIGHT) == ("\\boxed{10}", [1.0], "stop")
    assert rewards(WRONG, RIGHT) == (f"\\boxed{{11}}{asked_again}\\boxed{{10}}", [0.5], "stop")
    assert rewards(WRONG, WRONG) == (f"\\boxed{{11}}{asked_again}\\boxed{{11}}", [0.0], "stop")
    assert rewards(WRONG, RIGHT, tokens=10) == ("\\boxed{11}", [0.0], "length")  # no room to ask again
    response = play(environment, row["answer"], WRONG, RIGHT)
    scored = response.as_completion().scored
    model_wrote = [token for token, own in zip(response.token_ids, scored, strict=True) if own]
    assert decode(build_tokenizer(), model_wrote, skip_special_tokens=False) == WRONG + RIGHT

    with pytest.raises(UserError, match="not the key of a task of this environment"):
        play(environment, "another", RIGHT)


def test_a_conversation_ends_with_the_agents_limit_of_turns(config) -> None:
    environment = VerifiersEnvironment("second_try", config | {"student": {"max_turns": 1}})
    (key, *_) = environment._tasks
    assert play(environment, key, WRONG).text == "\\boxed{11}"


WITH_TOOLS = """
import verifiers.v1 as vf
__all__ = ["Tasks"]
class Clock(vf.Toolset):
    @vf.tool
    async def now(self) -> str:
        "The time."
        return "noon"
class Task(vf.Task[vf.TaskData]):
    @classmethod
    def toolsets(cls, config):
        return [Clock(vf.ToolsetConfig())]
    @vf.reward
    async def good(self, trace, runtime) -> float:
        return 1.0
class Tasks(vf.Taskset[Task]):
    def load(self):
        yield Task(vf.TaskData(prompt="What time is it?"), self.config.task)
"""
ENDLESS = """
import verifiers.v1 as vf
__all__ = ["Tasks"]
class Tasks(vf.Taskset[vf.Task]):
    INFINITE = True
    def load(self):
        while True:
            yield vf.Task(vf.TaskData(prompt="Hello"))
"""


def test_what_is_not_supported_is_refused_at_the_start(config, tmp_path) -> None:
    (tmp_path / "environment_with_tools.py").write_text(WITH_TOOLS)
    (tmp_path / "endless_environment.py").write_text(ENDLESS)
    with pytest.raises(UserError, match="'environment_with_tools' needs tools, a runtime for good: not supported"):
        VerifiersEnvironment("environment_with_tools")
    with pytest.raises(UserError, match="tasks are endless; limit them with max_tasks"):
        VerifiersEnvironment("endless_environment")
    assert len(VerifiersEnvironment("endless_environment", max_tasks=3)._tasks) == 3
    with pytest.raises(UserError, match=r"several agents \(assistant, user\); only one can be the model"):
        VerifiersEnvironment("second_try", config | {"id": "user-sim"})
    with pytest.raises(UserError, match="cannot load the environment 'no_such_environment'"):
        VerifiersEnvironment("no_such_environment")
