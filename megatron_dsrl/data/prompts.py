"""Prompt sets: from rows of problems and answers to rendered, tokenised prompts.

Local files are read directly, row by row, so that one file may mix answers such as `27`, `27.0` and `"27"`; hub names
are loaded with HF `datasets`. Nothing is dropped silently: unusable rows and overlong prompts are errors, or are
handled as configured and reported.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data import fields
from megatron_dsrl.data.fields import BadRowError, FieldReader, Row
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.rows import read_rows
from megatron_dsrl.data.tokenizer import decode
from megatron_dsrl.rewards.boxed import last_boxed

logger = logging.getLogger(__name__)

Problem = str | list[dict[str, str]]
"""The user's turn, or a whole chat that ends with one."""

Usable = TypeVar("Usable")
"""What a usable row becomes."""
AnyPrompt = TypeVar("AnyPrompt", bound=Prompt)

BAD_ROWS_SHOWN = 5


@dataclass(frozen=True)
class UsableRow:
    """What was read from a row."""

    index: int
    problem: Problem


@dataclass(frozen=True)
class Task(UsableRow):
    """A problem with its answers."""

    answers: tuple[str, ...]
    """Accepted answers, at least one."""


def load_prompts(config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase, section: str = "data") -> list[Prompt]:
    """All prompts of a set, in the order of its rows. `section` is the path of `config` in the run's configuration, for
    messages. Raises UserError for a source that is missing, unreadable or empty, rows without a usable problem or
    answer (`on_bad_row`), prompts that are too long (`on_long_prompt`), an invalid answer pattern or template, and a
    tokenizer without a chat template."""
    tasks = usable_rows(read_rows(config, section), RowReader(config, section), config, section)
    texts, token_ids = rendered_and_tokenised(tasks, config, tokenizer, section)
    prompts = [
        Prompt(task.index, text, ids, task.answers[0], task.answers[1:])
        for task, text, ids in zip(tasks, texts, token_ids, strict=True)
    ]
    return within_limit(prompts, config, tokenizer, section)


def rendered_and_tokenised(
    rows: Sequence[UsableRow], config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase, section: str
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Chat prompts of usable rows as texts and as token ids. Raises UserError if the tokenizer has no chat template, or
    its template does not take a row's chat."""
    if not tokenizer.chat_template:
        raise UserError(f"{section}: the tokenizer has no chat template, so problems cannot be rendered as prompts.")
    texts = []
    for row in rows:
        try:
            texts.append(render(row.problem, config, tokenizer))
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{section}: the model's chat template fails for row {row.index}: {error}. Correct the template or the "
                f"row; a template that takes no system turn needs {section}.system_prompt=null"
            ) from error
    # verbose: it would warn of long prompts, which `within_limit` deals with
    return texts, [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def render(problem: Problem, config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat prompt of a problem, up to and including the opening of the assistant's turn."""
    turns = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
    if config.system_prompt is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system_prompt}, *turns]
    rendered = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=config.enable_thinking
    )
    assert isinstance(rendered, str), "one chat without tokenisation gives one string"
    return rendered


def usable_rows(
    rows: Sequence[Row], read: Callable[[int, Row], Usable], config: PromptSetConfig, section: str
) -> list[Usable]:
    """What `read` makes of every usable row and its number; it raises BadRowError for the others.

    Raises UserError if some rows cannot be used and `on_bad_row` is `error`, or none can be used.
    """
    usable, problems = [], []
    for index, row in enumerate(rows):
        try:
            usable.append(read(index, row))
        except BadRowError as error:
            problems.append(f"row {index}: {error}")
    if problems and (config.on_bad_row == "error" or not usable):
        more = [f"and {len(problems) - BAD_ROWS_SHOWN} more"] if len(problems) > BAD_ROWS_SHOWN else []
        shown = "\n  ".join([*problems[:BAD_ROWS_SHOWN], *more])
        advice = (
            f"or set {section}.on_bad_row=drop to drop them" if usable else f"or the fields of {section} that read them"
        )
        raise UserError(
            f"{section}: {len(problems)} of {len(rows)} rows of {config.source} cannot be used. Correct them, {advice}."
            f"\n  {shown}"
        )
    if problems:
        warn_once(f"{section}: dropped {len(problems)} of {len(rows)} rows, which cannot be used; {problems[0]}")
    return usable


def within_limit(
    prompts: Sequence[AnyPrompt], config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase, section: str
) -> list[AnyPrompt]:
    """The prompts, with those longer than `max_prompt_tokens` dropped or truncated (`on_long_prompt`). Raises UserError
    if some are longer and `on_long_prompt` is `error`, or all would be dropped."""
    limit = config.max_prompt_tokens
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    if not too_long:
        return list(prompts)
    longest = max(len(prompt.token_ids) for prompt in too_long)
    what = (
        f"{section}: {len(too_long)} of {len(prompts)} prompts are longer than {section}.max_prompt_tokens = {limit} "
        f"(the longest has {longest}, row {too_long[0].index} is the first)"
    )
    if config.on_long_prompt == "error" or (config.on_long_prompt == "drop" and len(too_long) == len(prompts)):
        raise UserError(f"{what}. Raise the limit, or set {section}.on_long_prompt to drop or truncate")
    if config.on_long_prompt == "drop":
        warn_once(f"{what} and are dropped")
        return [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    warn_once(f"{what} and are truncated on the left")
    return [_without_beginning(prompt, limit, tokenizer) for prompt in prompts]


class RowReader:
    """Reads problem and answers from rows as configured."""

    def __init__(self, config: PromptSetConfig, section: str) -> None:
        """Raises UserError if a pattern or a template is invalid."""
        self._config = config
        self._section = section
        self._pattern = _compile(config.answer_pattern, section)
        self._problem_of = value_reader(config.problem_template, config.problem_field, "problem", section)
        self._answer_of = value_reader(config.answer_template, config.answer_field, "answer", section)

    def __call__(self, index: int, row: Row) -> Task:
        """Read one row. Raises BadRowError if it has no usable problem or answer."""
        if self._config.choices is not None:
            row = fields.with_choices(row, self._config.choices, self._section)
        return Task(index, self.problem(row), self._answers(row))

    def problem(self, row: Row) -> Problem:
        """The user's turn or the chat of a row. Raises BadRowError if it has none."""
        config = self._config
        if config.messages_field is not None:
            setting = f"{self._section}.messages_field"
            return require_chat_characters(
                fields.chat_messages(fields.field_reader(config.messages_field, setting)(row), setting)
            )
        problem = self._problem_of(row)
        if not isinstance(problem, str) or not problem.strip():
            origin = "problem_template" if config.problem_template else f"its field `{config.problem_field}`"
            raise BadRowError(f"it has no problem: {origin} holds {problem!r:.80}, expected a non-empty string")
        require_characters(problem, "its problem")
        return problem

    def _answers(self, row: Row) -> tuple[str, ...]:
        value = self._answer_of(row)
        if self._config.answer_list == "any":
            listed = fields.parsed(value)
            if isinstance(listed, list) and (accepted := [item for item in listed if item is not None]):
                return tuple(map(self._answer, accepted))
        return (self._answer(value),)

    def _answer(self, value: Any) -> str:
        config = self._config
        origin = "answer_template" if config.answer_template else f"its field `{config.answer_field}`"
        try:
            answer = fields.clean_answer(value)
        except ValueError as error:
            raise BadRowError(f"it has no usable answer: {origin} {error}") from error
        if answer is None:
            raise BadRowError(f"it has no answer: {origin} holds {value!r:.80}")
        require_characters(answer, origin)
        if config.answer_in_box:
            box = last_boxed(answer)
            if not box:
                raise BadRowError(f"answer_in_box finds no box in {origin}, which ends in {answer[-80:]!r}")
            answer = box
        if self._pattern is None:
            return answer
        match = self._pattern.search(answer)
        if match is None or not (match.group(1) or "").strip():
            raise BadRowError(
                f"answer_pattern {self._pattern.pattern!r} finds no answer in {origin}, which ends in {answer[-80:]!r}"
            )
        return match.group(1).strip()


def _compile(pattern: str | None, section: str) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{section}.answer_pattern: {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups == 0:
        raise UserError(f"{section}.answer_pattern: {pattern!r} has no group; put the answer part in parentheses")
    return compiled


def value_reader(template: str | None, field: str, what: str, section: str) -> FieldReader:
    """A reader for the template if it is set, else for the field."""
    if template is None:
        return fields.field_reader(field, f"{section}.{what}_field")
    return fields.template_reader(template, f"{section}.{what}_template")


def require_chat_characters(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The chat itself. Raises BadRowError if a turn holds half a character."""
    for turn in messages:
        require_characters(turn["content"], "its chat")
    return messages


def require_characters(text: str, origin: str) -> None:
    """Raise BadRowError if the text holds half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{origin} holds half a character (a lone surrogate, {text[error.start]!r})") from error


def _without_beginning(prompt: AnyPrompt, limit: int, tokenizer: PreTrainedTokenizerBase) -> AnyPrompt:
    if len(prompt.token_ids) <= limit:
        return prompt
    ids = prompt.token_ids[-limit:]
    text = decode(tokenizer, ids, skip_special_tokens=False)
    return replace(prompt, text=text, token_ids=ids)


def warn_once(text: str) -> None:
    """Log a warning on rank 0 only. Prompts are read before torch.distributed is initialised."""
    if launched_rank() == 0:
        logger.warning(text)
