"""An environment of the package `verifiers`: the tiny task's sums, asked again after a wrong answer."""

import json
from collections.abc import Iterator
from pathlib import Path

import verifiers.v1 as vf

__all__ = ["SecondTry", "Sums"]


class SumData(vf.TaskData):
    """A row of additions and subtractions."""

    answer: str


class Sum(vf.Task[SumData]):
    """Its last answer counts."""

    def is_right(self, text: str) -> bool:
        """Whether a text has the right answer in its last box."""
        return vf.extract_boxed_answer(text) == self.data.answer

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """1 for a right first answer, 0.5 for a right second one."""
        return float(self.is_right(trace.last_reply)) / trace.num_turns


class SumsConfig(vf.TasksetConfig):
    """Where the problems are."""

    source: Path = Path(".cache/tiny_dsrl/train.jsonl")


class Sums(vf.Taskset[Sum, SumsConfig]):
    """The problems of the tiny task."""

    def load(self) -> Iterator[Sum]:
        """One task per line."""
        for line in self.config.source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield Sum(SumData(prompt=row["problem"], answer=row["answer"]), self.config.task)


class SecondTryConfig(vf.EnvConfig):
    """One agent."""

    student: vf.AgentConfig = vf.AgentConfig()


class SecondTry(vf.Env[SecondTryConfig]):
    """Asks a second time if the first answer is wrong."""

    async def run(self, task: Sum, agents: vf.Agents) -> None:
        """One conversation of one or two turns."""
        async with agents.student.interaction(task) as conversation:
            first = await conversation.turn()
            if not task.is_right(first.last_reply):
                await conversation.turn(task.data.prompt_text)
