"""The weighted sum of several verifiers."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.section import Section
from megatron_dsrl.rewards import registry
from megatron_dsrl.rewards.score import FallbackReward


class Part(Section):
    """One term of the sum."""

    function: str
    """A built-in verifier or a dotted path, as in the reward section."""

    weight: float = 1.0
    """Factor of this term's reward."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function."""


PARTS = TypeAdapter(list[Part])


def combination(response: str, answer: str, parts: Sequence[Mapping[str, Any]], prompt: str = "") -> float:
    """Sum of weight x reward over the parts. If a part fails, so does the whole.

    Args:
        parts: `{function, weight, options}` of each term.
        prompt: the rendered prompt, for the parts that read it.
    """

    def reward(part: Part) -> float:
        function = registry.reward_function(part.function)
        context = {"prompt": prompt} if registry.takes_prompt(function) else {}
        return function(response, answer, **context | part.options)

    rewards = [(part.weight, reward(part)) for part in PARTS.validate_python(list(parts))]
    total = sum(weight * value for weight, value in rewards)
    fallbacks = [value.why for _, value in rewards if isinstance(value, FallbackReward)]
    return FallbackReward(total, fallbacks[0]) if fallbacks else total


def check_parts(options: Mapping[str, Any], fields: registry.Fields) -> None:
    """Raise UserError if a part is malformed, its function does not exist or does not take its options."""
    place = f"{fields.options}.parts"
    try:
        parts = PARTS.validate_python(options["parts"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}.{where}: {first['msg']}") from error
    if not parts:
        raise UserError(f"{place}: a combination needs at least one part")
    for number, part in enumerate(parts):
        one = registry.Fields(f"{place}.{number}.function", f"{place}.{number}.options")
        registry.check_options(part.function, part.options, one)


def longest_seconds_of_parts(options: Mapping[str, Any]) -> float:
    """How long the parts with their own limits may take together, in seconds."""
    return sum(
        registry.longest_seconds(part.function, part.options) for part in PARTS.validate_python(options["parts"])
    )


def describe_parts(options: Mapping[str, Any]) -> str:
    """How this machine runs the parts; empty for parts without such a note."""
    descriptions = [
        registry.describe_verifier(part.function, part.options) for part in PARTS.validate_python(options["parts"])
    ]
    return "; ".join(dict.fromkeys(filter(None, descriptions)))
