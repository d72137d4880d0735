"""Reward functions and their helpers by the name in the configuration.

Verifiers are imported on demand: math-verify imports sympy, which the trainer does not need.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Protocol, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.config.section import object_at

HERE = "megatron_dsrl.rewards"


class RewardFunction(Protocol):
    """Judges one response. It may raise or take too long: the reward pool handles both.

    A function with a parameter `prompt` is also given the rendered prompt.
    """

    def __call__(self, response: str, answer: str, **options: object) -> float: ...


@dataclass(frozen=True)
class Fields:
    """Where a verifier's name and its options were given, for messages."""

    function: str = "reward.function"
    options: str = "reward.options"


@dataclass(frozen=True)
class BuiltIn:
    """A verifier of this package and its helpers, as paths `package.module:function`."""

    function: str
    check: str | None = None
    """`f(options, fields)` that raises UserError for invalid option values."""
    describe: str | None = None
    """`f(options)`: how this machine runs the verifier, for the line at a run's start and its record."""
    answer: str | None = None
    """`f(response)`: the response's normalised answer, for majority votes."""
    longest_seconds: str | None = None
    """`f(options)`: how long it may take, in seconds, if that can exceed the default `reward.timeout_seconds`."""
    reads_gold: str | None = None
    """`f(answer)`: whether the verifier can compare this gold answer by value, and not only as a string."""


BUILT_IN: dict[str, BuiltIn] = {
    "boxed": BuiltIn(f"{HERE}.boxed:boxed", answer=f"{HERE}.boxed:boxed_answer"),
    "hendrycks": BuiltIn(f"{HERE}.hendrycks:hendrycks", answer=f"{HERE}.hendrycks:hendrycks_answer"),
    "math_verify": BuiltIn(
        f"{HERE}.math_verify:math_verify",
        answer=f"{HERE}.boxed:boxed_answer",
        reads_gold=f"{HERE}.math_verify:is_parsed",
    ),
    "multiple_choice": BuiltIn(
        f"{HERE}.multiple_choice:multiple_choice", answer=f"{HERE}.multiple_choice:chosen_letter"
    ),
    "short_answer": BuiltIn(f"{HERE}.short_answer:short_answer", answer=f"{HERE}.short_answer:stated_answer"),
    "code": BuiltIn(
        f"{HERE}.code:code",
        check=f"{HERE}.sandbox_isolation:check_isolation",
        describe=f"{HERE}.sandbox_isolation:describe_isolation",
    ),
    "remote": BuiltIn(f"{HERE}.remote:remote", check=f"{HERE}.remote:check_url"),
    "judge": BuiltIn(
        f"{HERE}.judge:judge",
        check=f"{HERE}.judge:check_judge",
        describe=f"{HERE}.judge:describe_judge",
        longest_seconds=f"{HERE}.judge:judge_seconds",
    ),
    "combination": BuiltIn(
        f"{HERE}.combination:combination",
        check=f"{HERE}.combination:check_parts",
        longest_seconds=f"{HERE}.combination:longest_seconds_of_parts",
        describe=f"{HERE}.combination:describe_parts",
    ),
    "box_format": BuiltIn(f"{HERE}.shaping:box_format"),
    "length_penalty": BuiltIn(f"{HERE}.shaping:length_penalty"),
    "zero": BuiltIn(f"{HERE}.shaping:zero"),
}


def reward_function(name: str, field: str = Fields.function) -> RewardFunction:
    """The function of a built-in name, or of a dotted path `package.module:function`, which may be `async def`. Raises
    UserError, which names the `field`, if it does not exist."""
    if name in BUILT_IN:
        return resolve_name(BUILT_IN[name].function)
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise UserError(
            f"{field}: unknown verifier {name!r}; use one of {', '.join(sorted(BUILT_IN))} or a path "
            "`package.module:function`"
        )
    try:
        function = object_at(name)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error
    if not callable(function):
        raise UserError(f"{field}: `{module_name}` has no function `{function_name}`")
    return _waiting(function) if inspect.iscoroutinefunction(function) else function


def check_reward(config: RewardConfig, section: str = "reward") -> None:
    """Check a verifier, its options and its time limit; `section` is its place in the configuration. Raises UserError
    if the function does not exist, does not take the options or may take longer than its time limit."""
    check_options(config.function, config.options, Fields(f"{section}.function", f"{section}.options"))
    seconds = longest_seconds(config.function, config.options)
    if seconds >= config.timeout_seconds:
        raise UserError(
            f"{section}.timeout_seconds = {config.timeout_seconds:g} would end {config.function} before its own limit "
            f"of {seconds:g} s (total_seconds in its options); raise the first or lower the second"
        )


def check_options(name: str, options: Mapping[str, Any], fields: Fields = Fields()) -> None:
    """Check the options of a reward function against its signature and its type hints, if it has them. Raises UserError
    if an option is unknown, missing, of the wrong type or has an invalid value."""
    function = reward_function(name, fields.function)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a callable without a signature, such as one written in C
        return
    try:
        signature.bind("", "", **options)
    except TypeError as error:
        raise UserError(
            f"{fields.options}: {name} does not take these options: {error}. It is called as "
            f"f(response, answer, **options), and its parameters are {signature}"
        ) from error
    hints = _type_hints(function)
    for option, value in options.items():
        if option in hints and hints[option] in (str, int, float, bool):
            _check_type(name, value, hints[option], f"{fields.options}.{option}")
    if check := _helper(name, "check"):
        check(options, fields)


def takes_prompt(function: RewardFunction) -> bool:
    """Whether the function has a parameter `prompt`."""
    try:
        return "prompt" in inspect.signature(function).parameters
    except ValueError:  # a callable without a signature
        return False


def longest_seconds(name: str, options: Mapping[str, Any]) -> float:
    """How long a verifier with its own limits may take for a response; 0 if it has none."""
    longest = _helper(name, "longest_seconds")
    return float(longest(options)) if longest else 0.0


def describe_verifier(name: str, options: Mapping[str, Any]) -> str:
    """How this machine runs the verifier; empty for verifiers without such a note."""
    describe = _helper(name, "describe")
    return describe(options) if describe else ""


def describe_verifiers(rewards: Iterable[RewardConfig | None]) -> list[str]:
    """Lines on how this machine runs the verifiers, for a start's output and record; none for most verifiers."""
    lines = (describe_verifier(reward.function, reward.options) for reward in rewards if reward is not None)
    return list(dict.fromkeys(filter(None, lines)))


def answer_of(name: str) -> Callable[[str], str | None] | None:
    """The function that extracts the answer from a response for this verifier; None if it has none."""
    return _helper(name, "answer")


def matched_by_spelling(name: str, answers: Iterable[str]) -> list[str]:
    """Gold answers that this verifier, which normally compares values, can only compare as strings."""
    reads = _helper(name, "reads_gold")
    return [answer for answer in answers if not reads(answer)] if reads else []


def built_in_modules(name: str) -> list[str]:
    """The module of a built-in verifier, for processes that import it early; empty for custom ones."""
    return [BUILT_IN[name].function.partition(":")[0]] if name in BUILT_IN else []


def _waiting(function: Callable[..., Coroutine[Any, Any, float]]) -> RewardFunction:
    """An asynchronous function as one that returns the reward."""

    @functools.wraps(function)
    def wait(response: str, answer: str, **options: object) -> float:
        return _event_loop().run(function(response, answer, **options))

    return wait


@functools.cache
def _event_loop() -> asyncio.Runner:
    """The loop of this process, so that a function may keep connections from one call to the next."""
    return asyncio.Runner()


def _type_hints(function: RewardFunction) -> dict[str, Any]:
    """The hints of its parameters; none if they cannot be resolved, such as names that only type checkers import."""
    try:
        return get_type_hints(function)
    except (NameError, AttributeError, TypeError):
        return {}


def _helper(name: str, kind: str) -> Callable[..., Any] | None:
    """A helper of a built-in verifier by the name of its field; None if it has none, and for custom verifiers."""
    path = getattr(BUILT_IN.get(name), kind, None)
    return resolve_name(path) if path else None


def _check_type(name: str, value: Any, kind: type, field: str) -> None:
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{field}: {name} needs a {kind.__name__}, got {value!r}") from error
