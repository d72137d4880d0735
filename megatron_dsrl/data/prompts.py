"""Prompt sets: from rows of problems and answers to rendered, tokenised prompts.

Local files are read directly, row by row as they are written, so that one file may mix answers such as `27`, `27.0`
and `"27"`; hub names go through HF `datasets`.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from megatron_dsrl.config.data import ChoicesConfig, PromptSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.rows import read_rows
from megatron_dsrl.errors import UserError
from megatron_dsrl.rewards.boxed import last_boxed

Row = Mapping[str, Any]
FieldReader = Callable[[Row, int], Any]
"""From a row and its number to a value."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load_prompts(config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase, section: str = "data") -> list[Prompt]:
    """All prompts of a set, in the order of its rows.

    Args:
        config: where the rows come from and how they become prompts.
        tokenizer: of the model, with a chat template.
        section: path of `config` in the run's configuration, for error messages.

    Raises:
        UserError: for a source that is missing, unreadable or empty, a row without problem or answer, an answer
            pattern or a template that is wrong or does not fit, and a tokenizer without chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{section}: the tokenizer has no chat template, so problems cannot be rendered as prompts.")
    rows: Sequence[Row] = read_rows(config, section)
    if config.choices is not None:
        rows = [with_choices(row, index, config.choices, section) for index, row in enumerate(rows)]
    pattern = _compile(config.answer_pattern, section)
    problem_of = _reader(config.problem_template, config.problem_field, "problem", config, section)
    answer_of = _reader(config.answer_template, config.answer_field, "answer", config, section)
    problems = [_problem(problem_of(row, index), index, config, section) for index, row in enumerate(rows)]
    answers = [_answer(answer_of(row, index), index, config, pattern, section) for index, row in enumerate(rows)]
    texts = [render(problem, config, tokenizer) for problem in problems]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        _prompt(index, text, ids, answer, config.max_prompt_tokens, tokenizer)
        for index, (text, ids, answer) in enumerate(zip(texts, token_ids, answers))
    ]


def render(problem: str, config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat prompt of a problem, up to and including the opening of the assistant's turn."""
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt is not None else []
    return tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": problem}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=config.enable_thinking,
    )


def clean_answer(value: Any) -> str | None:
    """A gold answer as text without surrounding blanks; None if there is none.

    Numbers lose an empty fraction (27.0 -> "27"). A list is its elements with commas between them: all of them are the
    answer. Raises ValueError for anything that is neither text nor number.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = [clean_answer(part) for part in value]
        return ", ".join(part for part in parts if part is not None) or None
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"is a {type(value).__name__}, and a text or a number is needed")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).strip() or None if value is not None else None


def _compile(pattern: str | None, section: str) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{section}.answer_pattern: {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups == 0:
        raise UserError(f"{section}.answer_pattern: {pattern!r} has no group; put the answer's part in parentheses")
    return compiled


def with_choices(row: Row, index: int, choices: ChoicesConfig, section: str = "data") -> Row:
    """The row with `options`, shuffled by their own content, and `answer`, the letter of the right one.

    Raises:
        UserError: a field is missing, or two choices are the same.
    """
    fields = [choices.correct_field, *choices.incorrect_fields]
    options = [str(_value(row, index, field, f"{section}.choices", "the set")).strip() for field in fields]
    if len(set(options)) < len(options):
        raise UserError(f"{section}.choices: row {index} holds the same choice twice: {options!r}")
    right = options[0]
    options.sort()
    random.Random(json.dumps(options)).shuffle(options)
    return {**row, "options": options, "answer": LETTERS[options.index(right)]}


def _reader(template: str | None, field: str, what: str, config: PromptSetConfig, section: str) -> FieldReader:
    """How the problem or the answer is read from a row: by the template if there is one, else from the field."""
    if template is None:
        return lambda row, index: _value(row, index, field, f"{section}.{what}_field", config.source)
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    environment.filters["lettered"] = _lettered
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "ensure_ascii": False}
    setting = f"{section}.{what}_template"
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"{setting}: not a Jinja template: {error}") from error

    def render_row(row: Row, index: int) -> str:
        try:
            return compiled.render(row)
        except (TemplateError, TypeError) as error:
            raise UserError(f"{setting}: row {index} of {config.source} does not fit: {error}") from error

    return render_row


def _lettered(options: Sequence[Any]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def _problem(problem: Any, index: int, config: PromptSetConfig, section: str) -> str:
    if not isinstance(problem, str) or not problem.strip():
        origin = "problem_template" if config.problem_template else f"its field `{config.problem_field}`"
        raise UserError(
            f"{section}: row {index} of {config.source} has no problem: {origin} holds {problem!r}, and a text is "
            "needed"
        )
    return problem


def _answer(
    value: Any, index: int, config: PromptSetConfig, pattern: re.Pattern[str] | None, section: str
) -> str:
    where = f"{section}: row {index} of {config.source}"
    origin = "answer_template" if config.answer_template else f"its field `{config.answer_field}`"
    try:
        answer = clean_answer(value)
    except ValueError as error:
        raise UserError(f"{where} has no usable answer: {origin} {error}") from error
    if answer is None:
        raise UserError(
            f"{where} has no answer: {origin} holds {value!r}. "
            "Every row needs a gold answer; remove the row or fill the field."
        )
    if config.answer_in_box:
        box = last_boxed(answer)
        if not box:
            raise UserError(f"{where}: answer_in_box finds no box in {origin}, which ends in {answer[-80:]!r}")
        answer = box
    if pattern is None:
        return answer
    match = pattern.search(answer)
    if match is None or not (match.group(1) or "").strip():
        raise UserError(
            f"{where}: answer_pattern {pattern.pattern!r} finds no answer in {origin}, which ends "
            f"in {answer[-80:]!r}"
        )
    return match.group(1).strip()


def _value(row: Row, index: int, field: str, setting: str, source: str) -> Any:
    if field not in row:
        raise UserError(
            f"{setting}: row {index} of {source} has no field `{field}`; its fields are "
            f"{', '.join(f'`{name}`' for name in row) or 'none'}"
        )
    return row[field]


def _prompt(
    index: int, text: str, ids: list[int], answer: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> Prompt:
    if len(ids) > max_tokens:
        ids = ids[-max_tokens:]
        text = tokenizer.decode(ids)
    return Prompt(index=index, text=text, token_ids=tuple(ids), answer=answer)
