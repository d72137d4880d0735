"""Prompt sets and rewards."""

from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_dsrl.config.function_name import FunctionName
from megatron_dsrl.config.section import Section


class ChoicesConfig(Section):
    """Multiple choice from one right and several wrong texts per row.

    The row gets a field `options`, the texts in an order that depends on nothing but them, and a field `answer`, the
    letter of the right one.
    """

    correct_field: str
    """Row field that holds the right choice."""

    incorrect_fields: list[str] = Field(min_length=1)
    """Row fields that hold the wrong ones."""


class PromptSetConfig(Section):
    """One set of problems with answers, and how a problem becomes a prompt."""

    source: str
    """A local file: `.jsonl` or `.ndjson`, `.json` (a list, or one object per line), `.csv`, `.tsv` or `.parquet` (all
    but the last also with `.gz`; `*` in the name takes all that match); a folder of `datasets`' `save_to_disk`; or a
    hub name for HF `datasets`."""

    subset: str | list[str] | None = None
    """Hub configuration name (`main` for `openai/gsm8k`), or several in a row; only for hub names."""

    split: str = "train"
    """Hub split; ignored for local files."""

    problem_field: str = "problem"
    """Row field that holds the problem text. A dotted path reaches into objects and lists: `prompt.0.content`."""

    messages_field: str | None = None
    """Row field that holds a chat in place of the problem: a list of objects with `role` and `content`, the user's turn
    last. A system turn of its own replaces `system_prompt`."""

    answer_field: str = "answer"
    """Row field that holds the gold answer: a text, a number, or a list of them. A dotted path reaches into objects and
    lists: `reward_model.ground_truth`."""

    answer_list: Literal["all", "any"] = "all"
    """What a list in `answer_field` means. `all`: its items together are the answer. `any`: each item is an accepted
    answer."""

    on_bad_row: Literal["error", "drop"] = "error"
    """What happens to rows without a usable problem or answer: the run is refused, or they are left out and counted."""

    rows_field: str | None = None
    """Field of a `.json` file that holds the list of rows; null where the file is that list."""

    choices: ChoicesConfig | None = None
    """For rows that hold a right and several wrong texts."""

    problem_template: str | None = None
    """Jinja template that makes the problem's text out of the row's fields, in place of `problem_field`. The filter
    `lettered` writes a list as lines `A. ...`, `B. ...`."""

    answer_template: str | None = None
    """Jinja template that makes the gold answer out of the row's fields, in place of `answer_field`."""

    answer_in_box: bool = False
    """The gold answer is the content of the last box in `answer_field`, such as a worked solution."""

    answer_pattern: str | None = None
    """Regular expression whose first group cuts the gold answer out of `answer_field` (GSM8K: `#### (.+)$`)."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""

    system_prompt: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message; null for none."""

    enable_thinking: bool = False
    """Passed to Qwen3's chat template."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt."""

    on_long_prompt: Literal["error", "drop", "truncate"] = "truncate"
    """What happens to longer prompts: the run is refused; they are left out; or they lose their beginning, the system
    turn included, as in the paper's configuration. The number is printed."""


class OverlongConfig(Section):
    """DAPO's soft punishment of long responses (arXiv 2503.14476, on overlong reward shaping): nothing up to
    `rollout.max_response_tokens` - `buffer_tokens`, then a penalty that grows linearly up to the limit."""

    buffer_tokens: int = Field(ge=1)
    """Length of the last part of a response in which the penalty grows; DAPO has 4,096 of 20,480 tokens."""

    penalty: float = Field(default=1.0, gt=0)
    """Taken off the reward of a response that reaches the limit."""


class RewardConfig(Section):
    """How a response is judged."""

    function: Annotated[str, FunctionName("verifier", "megatron_dsrl.rewards.registry:BUILT_IN")] = "boxed"
    """A built-in verifier, or the dotted path `package.module:function` of your own `f(response, answer,
    **options)`."""

    overlong: OverlongConfig | None = None
    """Take something off the training reward of responses that come near the length limit; null: nothing. Recorded
    rewards and evaluations stay the verifier's own."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function; checked against its signature before the run starts."""

    workers: int = Field(default=2, ge=1)
    """Verifier processes."""

    timeout_seconds: float = Field(default=10.0, gt=0)
    """Hard limit for one response; its process is then killed, the sample scores 0 and is counted."""

    memory_megabytes: int = Field(default=4096, ge=256)
    """Address space of one verifier process; more makes the verifier fail, the sample scores 0 and is counted."""

    max_consecutive_errors: int | None = Field(default=256, ge=1)
    """A verifier that raises, dies or does not return a number on this many responses in a row ends the run: the
    mistake is in the function. Time-outs do not count. null: no limit."""
