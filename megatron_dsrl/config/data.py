"""Prompt sets and rewards."""

from typing import Any

from pydantic import Field

from megatron_dsrl.config.section import Section


class PromptSetConfig(Section):
    """One set of problems with answers, and how a problem becomes a prompt."""

    source: str
    """A local `.jsonl`, `.json` or `.parquet` file, or a hub name for HF `datasets`."""

    subset: str | None = None
    """Hub configuration name (`main` for `openai/gsm8k`); only for hub names."""

    split: str = "train"
    """Hub split; ignored for local files."""

    problem_field: str = "problem"
    """Row field that holds the problem text."""

    answer_field: str = "answer"
    """Row field that holds the gold answer. A row without one is an error, not a skipped row."""

    answer_pattern: str | None = None
    """Regular expression whose first group cuts the gold answer out of `answer_field` (GSM8K: `#### (.+)$`)."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""

    system_prompt: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message; null for none."""

    enable_thinking: bool = False
    """Passed to Qwen3's chat template."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts are truncated on the left."""


class RewardConfig(Section):
    """How a response is judged."""

    function: str = "boxed"
    """A built-in verifier (`boxed`, `math_verify`, `multiple_choice`, `short_answer`, `code`, `remote`, `combination`,
    `box_format`, `length_penalty`), or the dotted path `package.module:function` of `f(response, answer, **options)`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function; checked against its signature before the run starts."""

    workers: int = Field(default=2, ge=1)
    """Verifier processes."""

    timeout_seconds: float = Field(default=10.0, gt=0)
    """Hard limit for one response; its process is then killed, the sample scores 0 and is counted."""

    memory_megabytes: int = Field(default=4096, ge=256)
    """Address space of one verifier process; more makes the verifier fail, the sample scores 0 and is counted."""
