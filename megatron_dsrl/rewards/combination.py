"""The weighted sum of several verifiers."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.section import Section
from megatron_dsrl.rewards.registry import check_options, reward_function


class Part(Section):
    """One term of the sum."""

    function: str
    """A built-in verifier or a dotted path, as in the reward section."""

    weight: float = 1.0
    """Factor of its reward."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function."""


PARTS = TypeAdapter(list[Part])


def combination(response: str, answer: str, parts: Sequence[Mapping[str, Any]]) -> float:
    """Sum of weight x reward over the parts. A part that fails fails the whole.

    Args:
        response: The model's text.
        answer: The gold answer.
        parts: `{function, weight, options}` of each term.
    """
    return sum(
        part.weight * reward_function(part.function)(response, answer, **part.options)
        for part in PARTS.validate_python(list(parts))
    )


def check_parts(options: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: A part is ill-formed, has no such function, or gives it options that it does not take.
    """
    try:
        parts = PARTS.validate_python(options["parts"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"reward.options.parts.{where}: {first['msg']}") from error
    if not parts:
        raise UserError("reward.options.parts: a combination needs at least one part")
    for number, part in enumerate(parts):
        check_options(part.function, part.options, f"reward.options.parts.{number}")
