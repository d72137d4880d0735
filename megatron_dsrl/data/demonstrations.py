"""Demonstrations: prompts with the response to learn, for supervised training.

The prompt is rendered as for sampling. The response is tokenised on its own and closed by the end of the assistant's
turn: these are the tokens that an engine would have to emit after the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data import prompts
from megatron_dsrl.data.fields import BadRowError, Row, chat_messages, field_reader, with_choices
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.rows import read_rows
from megatron_dsrl.data.tokenizer import decode, turn_end


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt with the response to learn. Its gold answer is the response's text."""

    response_ids: tuple[int, ...] = ()
    """At least one token; the last one ends the turn unless the response is cut off."""

    truncated: bool = False
    """Whether the response was cut off at the length limit."""

    @property
    def prompt(self) -> Prompt:
        """The prompt alone."""
        return Prompt(**{field.name: getattr(self, field.name) for field in fields(Prompt)})


@dataclass(frozen=True)
class Pair(prompts.UsableRow):
    """A problem with its response."""

    response: str


def load_demonstrations(
    config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase, max_response_tokens: int, section: str = "data"
) -> list[Demonstration]:
    """All demonstrations of a set, in the order of its rows. Raises UserError like `load_prompts`, and if a row has no
    response or one that is too long (`on_long_response`).

    Args:
        max_response_tokens: length limit of a response, its end included.
        section: path of `config` in the run's configuration, for messages.
    """
    pairs = prompts.usable_rows(read_rows(config, section), PairReader(config, section), config, section)
    texts, token_ids = prompts.rendered_and_tokenised(pairs, config, tokenizer, section)
    end = turn_end(tokenizer)
    texts_to_learn = [pair.response + end for pair in pairs]
    responses = tokenizer(texts_to_learn, add_special_tokens=False, verbose=False)["input_ids"]
    demonstrations = [
        Demonstration(pair.index, text, ids, pair.response, response_ids=tuple(response))
        for pair, text, ids, response in zip(pairs, texts, token_ids, responses, strict=True)
    ]
    short_prompts = prompts.within_limit(demonstrations, config, tokenizer, section)
    return within_response_limit(short_prompts, max_response_tokens, config, tokenizer, section)


def within_response_limit(
    demonstrations: Sequence[Demonstration],
    limit: int,
    config: PromptSetConfig,
    tokenizer: PreTrainedTokenizerBase,
    section: str,
) -> list[Demonstration]:
    """The demonstrations, with those whose responses are longer than `limit` tokens dropped or cut off. Raises
    UserError if some are longer and `on_long_response` is `error`, or all would be dropped."""
    too_long = [one for one in demonstrations if len(one.response_ids) > limit]
    if not too_long:
        return list(demonstrations)
    longest = max(len(one.response_ids) for one in too_long)
    what = (
        f"{section}: {len(too_long)} of {len(demonstrations)} responses are longer than {limit} tokens, the limit of "
        f"rollout.max_response_tokens (the longest has {longest}, row {too_long[0].index} is the first)"
    )
    if config.on_long_response == "error" or (
        config.on_long_response == "drop" and len(too_long) == len(demonstrations)
    ):
        raise UserError(f"{what}. Raise the limit, or set {section}.on_long_response to drop or truncate")
    if config.on_long_response == "drop":
        prompts.warn_once(f"{what} and are dropped")
        return [one for one in demonstrations if len(one.response_ids) <= limit]
    prompts.warn_once(f"{what} and are cut off")
    return [_cut_off(one, limit, tokenizer) for one in demonstrations]


class PairReader:
    """Reads problem and response from rows as configured."""

    def __init__(self, config: PromptSetConfig, section: str) -> None:
        """Raises UserError if a template is invalid."""
        self._config = config
        self._section = section
        self._read_problem = prompts.RowReader(config, section).problem
        self._response_of = prompts.value_reader(config.response_template, config.response_field, "response", section)

    def __call__(self, index: int, row: Row) -> Pair:
        """Read one row. Raises BadRowError if it has no usable problem or response."""
        config = self._config
        if config.choices is not None:
            row = with_choices(row, config.choices, self._section)
        if config.messages_field is not None:
            setting = f"{self._section}.messages_field"
            turns = chat_messages(field_reader(config.messages_field, setting)(row), setting, last_role="assistant")
            *problem, response = prompts.require_chat_characters(turns)
            if not problem:
                raise BadRowError(f"{setting}: the assistant's turn must follow another one")
            return Pair(index, problem, self._response(response["content"], "the last turn"))
        origin = "response_template" if config.response_template else f"its field `{config.response_field}`"
        return Pair(index, self._read_problem(row), self._response(self._response_of(row), origin))

    def _response(self, response: object, origin: str) -> str:
        if not isinstance(response, str) or not response.strip():
            raise BadRowError(f"it has no response: {origin} holds {response!r:.80}, expected a non-empty string")
        prompts.require_characters(response, "its response")
        return response


def _cut_off(one: Demonstration, limit: int, tokenizer: PreTrainedTokenizerBase) -> Demonstration:
    if len(one.response_ids) <= limit:
        return one
    ids = one.response_ids[:limit]
    return replace(one, response_ids=ids, answer=decode(tokenizer, ids), truncated=True)
