"""Environments of the package `verifiers` (0.4 and later) as a `rollout.generate`.

The environment's own code runs the conversation and judges it; the model's turns come from this run's engines, token by
token, so that the trainer scores exactly what was sampled. The package is imported when it is needed.

    python -m megatron_dsrl.rollout.verifiers_environment ENVIRONMENT --output prompts.jsonl

writes the environment's tasks as a data set; `answer` holds a task's key.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from inspect import Parameter, isawaitable, signature
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.growing_response import GrowingResponse

BEFORE_MESSAGE = "\n<|im_start|>user\n"
AFTER_MESSAGE = "<|im_end|>\n<|im_start|>assistant\n"
"""Around a message of the environment, after the model's turn, in ChatML."""


class VerifiersEnvironment:
    """Plays each response as an episode of an environment, whose reward is recorded for it.

    Environments with one agent, whose task or `Env.run` talks to it in text. Refused: tools, several agents,
    containers, `@intercept`, and rewards that need a runtime.
    """

    def __init__(
        self,
        environment: str,
        config: Mapping[str, Any] | None = None,
        max_tasks: int | None = None,
        before_message: str = BEFORE_MESSAGE,
        after_message: str = AFTER_MESSAGE,
    ) -> None:
        """Raise UserError if the package or environment is missing, or needs what is refused.

        Args:
            environment: id of the taskset: its installed package, or a module on PYTHONPATH.
            config: of the environment (`EnvConfig`) besides that, such as `{taskset: {...}, agent: {max_turns: 4}}`.
            max_tasks: tasks that are read; needed for endless tasksets.
            before_message, after_message: inserted around a message of the environment; special tokens are recognised.
        """
        self._vf = import_verifiers()
        self._environment = load_environment(self._vf, environment, config)
        self._seat = _only_seat(self._vf, self._environment)
        self._tasks = {task.key: task for task in tasks_of(self._environment, max_tasks)}
        self._around_messages = before_message, after_message
        for task in islice(self._tasks.values(), 1):
            _require_text_only(self._vf, self._environment, task)

    async def __call__(self, response: GrowingResponse) -> None:
        """Write a response and record its reward. Raises UserError if the prompt is not a task of the environment."""
        vf, environment = self._vf, self._environment
        task = self._tasks.get(response.prompt.answer)
        if task is None:
            raise UserError("the prompt's answer is not the key of a task of this environment; write its data again")
        seat = _Seat(vf, self._seat, environment.config, response, self._around_messages)
        agents = vf.Agents(environment.config, seat.take)
        episode = vf.Episode(env=vf.EnvInfo(id=environment.config.env_id), task=_about(vf, task))
        timeout = environment.config.timeout
        await environment.setup(agents)
        async with asyncio.timeout(timeout.episode):
            await environment.run(task, agents)
        if seat.trace is None:
            raise UserError(f"{type(environment).__name__}.run() did not run its agent {self._seat!r}")
        episode.traces.append(seat.trace)
        episode.ok = seat.trace.ok
        async with asyncio.timeout(timeout.finalize):
            await environment.finalize(task, episode)
        response.reward(seat.trace.reward)


class _Seat:
    """The only agent of one episode. Its conversation is the response."""

    def __init__(
        self, vf: ModuleType, name: str, config: Any, response: GrowingResponse, around_messages: tuple[str, str]
    ) -> None:
        self.trace: Any = None
        """Trace of the conversation, once it has ended."""
        self.name, self.trainable = name, True
        self._vf, self._response, self._around_messages = vf, response, around_messages
        self.config = getattr(config, name)
        self._taken = False

    def take(self, name: str, config: Any) -> "_Seat":
        """As `vf.Agents` makes its agents."""
        self.config = config
        return self

    async def run(self, task: Any, **_: Any) -> Any:
        """The model's answer to the task's prompt, judged."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @asynccontextmanager
    async def interaction(self, task: Any, **_: Any) -> AsyncIterator[Any]:
        """A conversation of several turns; when it ends it is judged."""
        if self._taken:
            raise UserError(
                f"the environment talks to its agent {self.name!r} twice, and a response is one conversation"
            )
        if task.data.prompt is None:
            raise UserError("the environment opens the conversation itself; its tasks need a prompt")
        self._taken = True
        conversation = _Conversation(self._vf, task, self.config, self._response, self._around_messages)
        await _call(task.setup, trace=conversation.trace, runtime=None)
        interaction = self._vf.Interaction(conversation)
        yield interaction
        self.trace = await interaction.close()


class _Conversation:
    """What drives `vf.Interaction`, in place of the package's `Rollout`: the model's turns come from the response."""

    def __init__(
        self, vf: ModuleType, task: Any, config: Any, response: GrowingResponse, around_messages: tuple[str, str]
    ) -> None:
        from verifiers.v1.state import state_cls

        self.closed = False
        self._vf, self._task, self._response = vf, task, response
        self._before, self._after = around_messages
        self._max_turns = config.max_turns
        state = state_cls(type(task))()
        self.trace = vf.Trace(task=_about(vf, task), state=state, agent=vf.AgentInfo(config=config))
        self._messages = list(messages_of(task))

    @property
    def ok(self) -> bool:
        """Whether the conversation can go on."""
        return self.trace.stop_condition is None

    async def step(self, messages: list[Any] | None = None, **_: Any) -> bool:
        """The environment's messages and the model's next turn; whether the conversation can go on."""
        if not self.ok or (messages and not self._insert(messages)):
            return False
        turn = await self._response.sample()
        text = self._response.decode(turn.token_ids)
        self._commit(text, turn.finish_reason)
        if turn.finish_reason == "length":
            self.trace.stop("max_response_tokens")
        elif self._max_turns is not None and self.trace.num_turns >= self._max_turns:
            self.trace.stop("max_turns")
        for condition in self._task.hooks("stop"):
            if self.ok and await _call(condition, trace=self.trace):
                self.trace.stop(condition.__name__)
        return self.ok

    async def close(self) -> Any:
        """Judge the conversation."""
        self.closed = True
        await _call(self._task.finalize, trace=self.trace, runtime=None)
        await self._task.score(self.trace)
        self.trace.is_completed = self.trace.ok = True
        return self.trace

    def _insert(self, messages: list[Any]) -> bool:
        """Add the environment's messages; False if they do not fit."""
        for message in messages:
            if message.role != "user" or not isinstance(message.content, str):
                raise UserError(f"the environment sends a {message.role} message; only text from the user is supported")
        text = "\n\n".join(message.content for message in messages)
        response = self._response
        tokens = (*response.encode(self._before), *response.plain_tokens(text), *response.encode(self._after))
        if not response.insert(tokens):
            self.trace.stop("max_response_tokens")
            return False
        self._messages += messages
        return True

    def _commit(self, text: str, finish_reason: str) -> None:
        from verifiers.v1 import graph

        answer = self._vf.AssistantMessage(content=text)
        turn = graph.prepare_turn(self.trace, list(self._messages))
        turn.commit(self._vf.Response(id="", created=0, model="policy", message=answer, finish_reason=finish_reason))
        self._messages.append(answer)
        self.trace.root_reply = text


def import_verifiers() -> ModuleType:
    """The package's interface. Raises UserError if it is not installed, or too old."""
    try:
        import verifiers.v1 as vf

        vf.Interaction, vf.load_environment, vf.resolve_env_config  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"environments of `verifiers` need the package, from version 0.4: pip install 'verifiers>=0.4' ({error})"
        ) from error
    return vf


def load_environment(vf: ModuleType, environment: str, config: Mapping[str, Any] | None) -> Any:
    """The environment of a taskset. Raises UserError if it does not exist, or does not take this configuration."""
    settings = dict(config or {})
    settings["taskset"] = {**settings.get("taskset", {}), "id": environment}
    try:
        return vf.load_environment(vf.resolve_env_config(settings))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"cannot load the environment {environment!r} of `verifiers`: {error}") from error


def tasks_of(environment: Any, max_tasks: int | None) -> Iterator[Any]:
    """The environment's tasks. Raises UserError if they are endless and not limited."""
    if max_tasks is None and not environment.taskset.bounded:
        raise UserError("the environment's tasks are endless; limit them with max_tasks")
    return islice(environment.taskset, max_tasks)


def messages_of(task: Any) -> list[Any]:
    """The messages that open a task's conversation."""
    vf = import_verifiers()
    prompt, system = task.data.prompt, task.data.system_prompt
    messages = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or ())
    return messages if system is None else [vf.SystemMessage(content=system), *messages]


def _about(vf: ModuleType, task: Any) -> Any:
    return vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)


def _only_seat(vf: ModuleType, environment: Any) -> str:
    seats = [name for name, value in environment.config if isinstance(value, vf.AgentConfig)]
    if len(seats) != 1:
        raise UserError(f"the environment has several agents ({', '.join(seats)}); only one can be the model")
    return seats[0]


def _require_text_only(vf: ModuleType, environment: Any, task: Any) -> None:
    """Refuse what needs more than messages; the tasks of a taskset are of one class."""
    cls, start = type(task), (type(environment).start, type(environment).stop)
    rewards = [fn for kind in ("reward", "metric") for fn in task.hooks(kind)]
    required = [
        fn.__name__
        for fn in rewards
        if (runtime := signature(fn).parameters.get("runtime")) is not None and runtime.default is Parameter.empty
    ]
    problems = {
        "tools": bool(cls.toolsets(task.config) or environment.taskset.toolsets(environment.taskset.config)),
        "a container": cls.NEEDS_CONTAINER or task.data.image is not None,
        "@intercept": any(hasattr(member, "intercept") for member in vars(cls).values()),
        f"a runtime for {', '.join(required)}": bool(required),
        "Env.start() and stop()": start != (vf.Env.start, vf.Env.stop),
    }
    if found := [what for what, is_needed in problems.items() if is_needed]:
        raise UserError(f"the environment {environment.config.taskset.id!r} needs {', '.join(found)}: not supported")


async def _call(function: Callable[..., Any], **available: Any) -> Any:
    """Call a hook with the arguments that it names."""
    result = function(**{name: available[name] for name in signature(function).parameters if name in available})
    return await result if isawaitable(result) else result


def write_tasks(environment: str, output: Path, config: Mapping[str, Any] | None, skip: int, limit: int | None) -> int:
    """Write at most `limit` tasks after the first `skip` as rows `messages` and `answer`, the key; returns their
    number."""
    loaded = load_environment(import_verifiers(), environment, config)
    tasks = islice(tasks_of(loaded, None if limit is None else skip + limit), skip, None)
    rows = [
        {"messages": [{"role": each.role, "content": each.content} for each in messages_of(task)], "answer": task.key}
        for task in tasks
    ]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the tasks of a verifiers environment as a data set.")
    parser.add_argument("environment", help="id of the taskset")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--config", type=json.loads, help="of the environment, as JSON")
    parser.add_argument("--skip", type=int, default=0, help="tasks left out at the beginning")
    parser.add_argument("--limit", type=int, help="number of tasks (default: all)")
    options = parser.parse_args()
    try:
        count = write_tasks(options.environment, options.output, options.config, options.skip, options.limit)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{count} tasks in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
