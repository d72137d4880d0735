"""A ready-made `rollout.generate`: the model calls a tool in its response, and reads what it answers."""

import asyncio
import json
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.custom_generation import async_callable
from megatron_dsrl.rollout.growing_response import GrowingResponse

Tool = Callable[[str], Awaitable[str]]
"""`async def tool(call: str, **options) -> str` answers a call. An exception ends the run."""

TOOLS = {
    "calculator": "megatron_dsrl.rollout.calculator:calculator",
    "python": "megatron_dsrl.rollout.python_tool:PythonTool",
}
"""Ready-made tools by name."""

CUT = "..."
"""Ends a result that was cut."""


@dataclass
class ToolChat:
    """Lets the model write until it ends its response, and answers every call such as `<tool>12*7</tool>`.

    The answer is inserted after it: `<result>84</result>`. If `closing` is a single token, as `</tool_call>` is for
    Qwen3, the model stops right there. Otherwise it keeps writing, and what follows the first complete call is dropped,
    which costs the time to sample it.
    """

    tool: str
    """`calculator`, `python`, or the dotted path of a tool. All responses use the same one."""
    tool_options: Mapping[str, Any] | None = None
    """Keyword arguments of the tool."""
    opening: str = "<tool>"
    closing: str = "</tool>"
    """Text before and after a call."""
    before_result: str = "<result>"
    after_result: str = "</result>"
    """Inserted around the tool's answer; special tokens are recognised."""
    json_argument: str | None = None
    """Calls are JSON objects, and this one of their `arguments` is for the tool: `{"name": "python", "arguments":
    {"code": "print(1)"}}` for `code`. None: the whole call is."""
    max_calls: int = 8
    """Calls that are answered. A response that makes another one ends there and counts as truncated."""
    max_result_tokens: int = 512
    """Longer answers are cut."""
    tool_timeout_seconds: float = 60.0
    """Limit of each call, which is then answered with an error."""

    def __post_init__(self) -> None:
        """Raises UserError if the tool does not exist, is not asynchronous, or refuses its options."""
        if not self.opening or not self.closing:
            raise UserError("opening and closing must not be empty")
        if ":" not in self.tool and self.tool not in TOOLS:
            raise UserError(
                f"tool: {self.tool!r} is neither one of {', '.join(TOOLS)} nor a path `package.module:name`"
            )
        self._tool: Tool = async_callable(TOOLS.get(self.tool, self.tool), self.tool_options or {}, "tool")

    async def __call__(self, response: GrowingResponse) -> None:
        """Write a response."""
        closing_ids = response.encode(self.closing)
        stops = closing_ids if len(closing_ids) == 1 else ()
        for _ in range(self.max_calls):
            call = await self._write_call(response, stops)
            if call is None:
                return
            result = response.plain_tokens(await self._answer(call))
            if len(result) > self.max_result_tokens:
                result = (*result[: self.max_result_tokens], *response.encode(CUT))
            before, after = response.encode(self.before_result), response.encode(self.after_result)
            if not response.insert((*before, *result, *after)):
                return
        if await self._write_call(response, stops) is not None:
            response.is_truncated = True

    async def _write_call(self, response: GrowingResponse, stops: Sequence[int]) -> str | None:
        """Have the model write up to its next complete call; None if it ends without one."""
        start = len(response.token_ids)
        turn = await response.sample(stop_token_ids=stops)

        def has_call(count: int) -> bool:
            return self.closing in response.decode(turn.token_ids[:count])

        if not has_call(len(turn.token_ids)):
            return None
        kept = bisect_left(range(len(turn.token_ids)), True, key=has_call)
        response.keep(start + kept)
        text = response.decode(turn.token_ids[:kept])
        _, opened, inside = text[: text.rindex(self.closing)].rpartition(self.opening)
        return inside if opened else ""

    async def _answer(self, call: str) -> str:
        text = call if self.json_argument is None else _argument(call, self.json_argument)
        if text is None:
            return f'error: a call is a JSON object whose "arguments" have a string "{self.json_argument}"'
        try:
            async with asyncio.timeout(self.tool_timeout_seconds):
                return await self._tool(text)
        except TimeoutError:
            return f"error: no answer within {self.tool_timeout_seconds:g} s"


def _argument(call: str, name: str) -> str | None:
    """The argument of a call in JSON; None if it has no such text."""
    try:
        argument = json.loads(call)["arguments"][name]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return argument if isinstance(argument, str) else None
