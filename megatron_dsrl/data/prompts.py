"""Prompt sets: from rows of problems and answers to rendered, tokenised prompts.

Local files are read directly, row by row as they are written, so that one file may mix answers such as `27`, `27.0`
and `"27"`; hub names go through HF `datasets`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.rows import read_rows
from megatron_dsrl.errors import UserError


def load_prompts(config: PromptSetConfig, tokenizer: PreTrainedTokenizerBase, section: str = "data") -> list[Prompt]:
    """All prompts of a set, in the order of its rows.

    Args:
        config: where the rows come from and how they become prompts.
        tokenizer: of the model, with a chat template.
        section: path of `config` in the run's configuration, for error messages.

    Raises:
        UserError: for a source that is missing, unreadable or empty, a row without problem or answer, an answer
            pattern that is wrong or does not match, and a tokenizer without chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{section}: the tokenizer has no chat template, so problems cannot be rendered as prompts.")
    rows = read_rows(config, section)
    pattern = _compile(config.answer_pattern, section)
    problems = [_problem(row, index, config, section) for index, row in enumerate(rows)]
    answers = [_answer(row, index, config, pattern, section) for index, row in enumerate(rows)]
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

    Numbers lose an empty fraction (27.0 -> "27"), a list of one element is that element. Raises ValueError for
    anything that is not one text or number.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) > 1:
            raise ValueError(f"holds {len(value)} answers, and one is needed")
        return clean_answer(value[0]) if value else None
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


def _problem(row: Mapping[str, Any], index: int, config: PromptSetConfig, section: str) -> str:
    problem = _value(row, index, config.problem_field, f"{section}.problem_field", config.source)
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(
            f"{section}: row {index} of {config.source} has no problem: its field `{config.problem_field}` holds "
            f"{problem!r}, and a text is needed"
        )
    return problem


def _answer(
    row: Mapping[str, Any], index: int, config: PromptSetConfig, pattern: re.Pattern[str] | None, section: str
) -> str:
    value = _value(row, index, config.answer_field, f"{section}.answer_field", config.source)
    where = f"{section}: row {index} of {config.source}"
    try:
        answer = clean_answer(value)
    except ValueError as error:
        raise UserError(f"{where} has no usable answer: its field `{config.answer_field}` {error}") from error
    if answer is None:
        raise UserError(
            f"{where} has no answer: its field `{config.answer_field}` holds {value!r}. "
            "Every row needs a gold answer; remove the row or fill the field."
        )
    if pattern is None:
        return answer
    match = pattern.search(answer)
    if match is None or not (match.group(1) or "").strip():
        raise UserError(
            f"{where}: answer_pattern {pattern.pattern!r} finds no answer in field `{config.answer_field}`, which ends "
            f"in {answer[-80:]!r}"
        )
    return match.group(1).strip()


def _value(row: Mapping[str, Any], index: int, field: str, setting: str, source: str) -> Any:
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
