"""Prompt sets and rewards."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_dsrl.config.choices import SAMPLERS
from megatron_dsrl.config.registry import FunctionName, Options
from megatron_dsrl.config.section import FolderPath, Section

if TYPE_CHECKING:
    from megatron_dsrl.data.samplers import SamplerOptions
else:  # imported only when a choice is validated
    SamplerOptions = Annotated[Options, SAMPLERS]


class ChoicesConfig(Section):
    """Multiple choice from one right and several wrong texts per row.

    The row gets a field `options`, the texts in an order that depends only on the texts, and a field `answer`, the
    letter of the right one.
    """

    correct_field: str
    """Row field with the right choice."""

    incorrect_fields: list[str] = Field(min_length=1)
    """Row fields with the wrong choices."""


class PromptSetConfig(Section):
    """A set of problems with answers, and how a problem becomes a prompt."""

    source: str
    """A local file: `.jsonl` or `.ndjson`, `.json` (a list, or one object per line), `.csv`, `.tsv` or `.parquet`
    (all but the last also with `.gz`; `*` matches several files, `**` in all folders); a folder of `datasets`'
    `save_to_disk`, or of data files as in a repository of the hub; or a hub name for HF `datasets`."""

    subset: str | list[str] | None = None
    """Hub configuration name (`main` for `openai/gsm8k`), or several to concatenate; only for hub names."""

    split: str = "train"
    """Hub split; ignored for local files."""

    problem_field: str = "problem"
    """Row field with the problem text. A dotted path reaches into objects and lists: `prompt.0.content`."""

    messages_field: str | None = None
    """Row field with a chat instead of a problem: a list of objects with `role` and `content`, the user's turn last.
    A system turn in it replaces `system_prompt`. With `rollout.source: dataset` the assistant's turn comes last: it is
    the response."""

    answer_field: str = "answer"
    """Row field with the gold answer: a text, a number, or a list of them. A dotted path reaches into objects and
    lists: `reward_model.ground_truth`."""

    response_field: str = "response"
    """Row field with the response to learn, for `rollout.source: dataset`. The end of the assistant's turn is appended.
    With `messages_field`, the chat's last turn is the response instead."""

    response_template: str | None = None
    """Jinja template that builds the response from the row's fields, instead of `response_field`."""

    on_long_response: Literal["error", "drop", "truncate"] = "error"
    """What to do with responses of a data set longer than the limit (`rollout.max_response_tokens`): refuse the run,
    drop the rows, or cut the responses off, without an end of turn. Their number is printed."""

    answer_list: Literal["all", "any"] = "all"
    """What a list in `answer_field` means. `all`: its items together are the answer. `any`: each item is an accepted
    answer."""

    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with rows without a usable problem or answer: refuse the run, or drop and count them."""

    rows_field: str | None = None
    """Field of a `.json` file with the list of rows; null if the file is that list."""

    choices: ChoicesConfig | None = None
    """For rows with one right and several wrong texts."""

    problem_template: str | None = None
    """Jinja template that builds the problem text from the row's fields, instead of `problem_field`. The filter
    `lettered` formats a list as lines `A. ...`, `B. ...`."""

    answer_template: str | None = None
    """Jinja template that builds the gold answer from the row's fields, instead of `answer_field`."""

    answer_in_box: bool = False
    """Take the content of the last box in `answer_field`, for example in a worked solution, as the gold answer."""

    answer_pattern: str | None = None
    """Regular expression whose first group extracts the gold answer from `answer_field` (GSM8K: `#### (.+)$`)."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first n rows."""

    system_prompt: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message; null for none."""

    enable_thinking: bool = False
    """Passed to Qwen3's chat template."""

    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longest prompt."""

    on_long_prompt: Literal["error", "drop", "truncate"] = "truncate"
    """What to do with longer prompts: refuse the run, drop them, or truncate them on the left, including the system
    turn, as in the paper's configuration. Their number is printed."""


class OverlongConfig(Section):
    """DAPO's soft penalty for long responses (arXiv 2503.14476, overlong reward shaping): none up to
    `rollout.max_response_tokens` - `buffer_tokens`, then a penalty that grows linearly up to the limit."""

    buffer_tokens: int = Field(ge=1)
    """Number of tokens before the limit over which the penalty grows; DAPO uses 4,096 of 20,480 tokens."""

    penalty: float = Field(default=1.0, gt=0)
    """Subtracted from the reward of a response that reaches the limit."""


class RewardConfig(Section):
    """How responses are scored."""

    function: Annotated[str, FunctionName("verifier", "megatron_dsrl.rewards.registry:BUILT_IN")] = "boxed"
    """A built-in verifier, or the dotted path `package.module:function` of your own `f(response, answer,
    **options)`."""

    overlong: OverlongConfig | None = None
    """Penalise responses close to the length limit in the training reward; null: no penalty. Recorded rewards and
    evaluations remain the verifier's."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function; checked against its signature before the run starts."""

    workers: int = Field(default=2, ge=1)
    """Verifier processes."""

    timeout_seconds: float = Field(default=10.0, gt=0)
    """Hard limit for one response. When it expires, the process is killed and the sample scores 0 and is counted."""

    memory_megabytes: int = Field(default=4096, ge=256)
    """Address space of one verifier process. If the verifier needs more it fails, and the sample scores 0 and is
    counted."""

    max_consecutive_errors: int | None = Field(default=256, ge=1)
    """End the run if the verifier raises, dies or does not return a number on this many responses in a row, because
    then the function is broken. Time-outs do not count. null: no limit."""


class PlacedReward(NamedTuple):
    """A reward section and its place in the configuration, for messages."""

    section: str
    config: RewardConfig


class TrainingSetConfig(PromptSetConfig):
    """A prompt set to train on."""

    name: str = Field(default="main", pattern=r"^[a-z][a-z0-9_]*$")
    """Name in a mixture, for its metrics (`sets/<name>/...`): lower-case letters, digits and `_`."""

    weight: float = Field(default=1.0, gt=0)
    """Share of a mixture, relative to the other sets' weights."""

    pass_rates_from: FolderPath | None = None
    """Folder of a run with recorded rollouts of these prompts, such as one of `dsrl rollout`: the share of right
    responses to each prompt there is its pass rate. It is read again on resuming, so name a finished run. null: pass
    rates are unknown."""

    min_pass_rate: float = Field(default=0.0, ge=0, le=1)
    """Drop prompts with a lower pass rate; above 0, also prompts without a known one."""

    max_pass_rate: float = Field(default=1.0, ge=0, le=1)
    """Drop prompts with a higher pass rate; below 1, also prompts without a known one."""

    @property
    def filters_by_pass_rate(self) -> bool:
        """Whether some pass rates are excluded."""
        return self.min_pass_rate > 0 or self.max_pass_rate < 1

    @model_validator(mode="after")
    def _pass_rates_are_known(self) -> "TrainingSetConfig":
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError("min_pass_rate is greater than max_pass_rate; no prompt would be left")
        if self.filters_by_pass_rate and self.pass_rates_from is None:
            raise ValueError("min_pass_rate and max_pass_rate need pass_rates_from, the folder of a recorded run")
        return self


class MixedSetConfig(TrainingSetConfig):
    """An additional prompt set of a mixture."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name for its metrics (`sets/<name>/...`): lower-case letters, digits and `_`."""

    reward: RewardConfig | None = None
    """Verifier of this set; null: the run's. Workers and their memory are the run's."""


class DataConfig(TrainingSetConfig):
    """The prompts to train on: one set, or a mixture of several."""

    mixed_with: list[MixedSetConfig] = Field(default_factory=list)
    """Additional sets. Every batch contains prompts of all sets in proportion to their weights; each set has its own
    epochs."""

    sampler: SamplerOptions = Field(default_factory=partial(SAMPLERS.build, "shuffled"))
    """Order of the prompts of a set."""

    @property
    def sets(self) -> list[TrainingSetConfig]:
        """All sets, the first one first."""
        return [self, *self.mixed_with]

    @property
    def sets_by_section(self) -> dict[str, TrainingSetConfig]:
        """The sets by their place in a run's configuration, for messages: `data`, `data.mixed_with.0` and so on."""
        return {"data": self, **{f"data.mixed_with.{position}": one for position, one in enumerate(self.mixed_with)}}

    @property
    def set_rewards(self) -> dict[str, PlacedReward]:
        """Verifiers of the sets that have their own, by the set's name."""
        return {
            one.name: PlacedReward(f"data.mixed_with.{position}.reward", one.reward)
            for position, one in enumerate(self.mixed_with)
            if one.reward is not None
        }

    @model_validator(mode="after")
    def _sets_fit_together(self) -> "DataConfig":
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"mixed_with: the sets' names must differ, got {', '.join(names)}; the first is data.name")
        for position, one in enumerate(self.mixed_with):
            if one.max_prompt_tokens > self.max_prompt_tokens:
                raise ValueError(
                    f"mixed_with.{position}.max_prompt_tokens: {one.max_prompt_tokens} is more than the first set's "
                    f"{self.max_prompt_tokens}, which the engines are sized for; raise data.max_prompt_tokens"
                )
            if one.reward is not None and one.reward.overlong is not None:
                raise ValueError(
                    f"mixed_with.{position}.reward.overlong: all sets share the penalty of reward.overlong; leave this "
                    "one out"
                )
        return self
