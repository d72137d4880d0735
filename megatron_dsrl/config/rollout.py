"""The generation side: SGLang engines and sampling."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_dsrl.config.section import DOTTED_PATH, FolderPath, Section, ServerUrl

MAX_REPLAYED_EXPERTS = 256
"""Experts that `rollout.routing_replay` can name: one byte each."""


class DynamicSamplingConfig(Section):
    """Sample until every group of the batch has different rewards (DAPO). Other groups are replaced one by one; with
    `deterministic`, in rounds that each request the missing number."""

    max_rounds: int = Field(default=10, ge=1)
    """A step starts at most this many times `prompts_per_step` groups (times `oversampling`); with `deterministic`,
    the number of rounds. After that it continues with the mixed groups it has; a metric counts the missing ones."""

    oversampling: float = Field(default=1.0, ge=1)
    """Groups in flight per missing group. Above 1 a step ends earlier: when it has enough groups, the surplus is
    aborted and dropped. Long responses finish last, so they are then under-represented; `partial_rollouts` continues
    them instead. At 1 nothing is aborted. With `deterministic`, the number of prompts a round requests per missing
    group, and nothing is aborted either."""


class PartialRolloutConfig(Section):
    """End a step's generation when it has its groups, and continue the others in the next step."""

    oversampling: float = Field(default=1.5, gt=1)
    """Groups in flight per group that the step still needs."""

    max_weight_versions: int = Field(default=3, ge=2)
    """Maximum number of weight versions mixed in one group. A group that would need more is restarted."""


class RolloutConfig(Section):
    """What is sampled at every step."""

    prompts_per_step: int = Field(default=128, ge=1)
    """Prompts of one rollout batch."""

    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses per prompt: the group size G."""

    max_response_tokens: int = Field(default=8192, ge=1)
    """Length limit of a response; a response that reaches it is marked truncated."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer also divides its logits by it."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off. Below 1 the engine samples from a different distribution than the trainer scores."""

    top_k: int = Field(default=-1, ge=-1)
    """Top-k sampling; -1 is off."""

    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace all-right and all-wrong groups with new prompts; null: keep them."""

    partial_rollouts: PartialRolloutConfig | None = None
    """Do not wait for the longest responses but carry unfinished ones over to the next step. Older tokens keep the
    log-probs they were sampled with as their old log-probs. With `dynamic_sampling` only mixed groups count, and its
    `oversampling` has no effect. null: a step waits for all its responses."""

    max_staleness: int = Field(default=0, ge=0)
    """Train asynchronously: engines sample all the time, at most this many steps ahead. A sample begun with the weights
    of step s is trained on no later than step s + `max_staleness`. New weights reach the engines in the middle of
    responses; every token keeps the log-prob it was sampled with, which the loss's ratio compares with. Needs engines
    on their own devices (`engine.urls`). See examples/asynchronous. 0: training and sampling take turns."""

    generate: str | None = Field(default=None, pattern=DOTTED_PATH)
    """Function that writes each response together with the model, by its dotted path `package.module:function`:
    `async def generate(response, **options)`, or a class that takes the options and has
    `async def __call__(self, response)`. Tokens that it inserts (tool results, turns of an environment) count towards
    `max_response_tokens` and are not scored. Evaluations use it too. See examples/own_generation;
    `megatron_dsrl.rollout.tool_chat:ToolChat` is ready-made. null: the engine alone writes responses."""

    generate_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of `generate`."""

    deterministic: bool = False
    """The same seed and weights give the same tokens and log-probs, bit for bit. Each sample always has its own
    seed, but requests that are batched differently differ by rounding, which occasionally changes a token. If true,
    prompts are assigned to fixed engines, each engine gets its part of the batch in one message and keeps no prefix
    cache, and rewards are computed after generation. On CUDA this turns on SGLang's
    `enable_deterministic_inference`, without which CUDA engines ignore seeds."""

    routing_replay: bool = False
    """For a mixture of experts: the trainer routes every token to the experts the engine used (rollout routing
    replay, R3, arXiv 2510.11370), so that rounding in a router does not make the two score with different experts.
    Applies to the policy in post-train space. The routers choose for reference and critic, and in pre-train space,
    because the engine never sees its context. Samples grow by layers x experts per token x 4/3 bytes per token."""

    step_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Limit for a whole rollout batch, including the prompts that dynamic sampling adds (with `deterministic`: for
    each of its rounds). The error names the prompts that were still running, and for how long."""

    request_timeout_seconds: float | None = Field(default=None, gt=0)
    """Limit for one request to an engine, which is a prompt with all its samples, or with `generate` one turn of a
    sample; null: only the batch's limit. A request that takes longer counts as failed."""

    request_attempts: int = Field(default=3, ge=1)
    """Attempts for a request, as long as the engine itself is healthy, before its failure ends the run. Retries come
    after 1, 2, 4, ... seconds. Requests that were running when their engine died are repeated without being counted."""

    source: Literal["engine", "dataset"] = "engine"
    """Where responses come from. `engine`: the policy samples them. `dataset`: the rows of `data` hold them
    (`data.response_field`), and no engine is started; `dsrl sft` sets it."""

    replay_from: FolderPath | None = None
    """Run folder whose saved rollouts are used instead of sampling (train-only runs, layout comparisons). Every step
    trains on the same samples in the same order, however they were sampled. `dynamic_sampling` and
    `partial_rollouts` then have no effect."""

    @property
    def needs_engines(self) -> bool:
        """Whether the policy samples, instead of training on responses that exist already."""
        return self.source == "engine" and self.replay_from is None

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def carries_over(self) -> bool:
        """Whether a step may leave samples for the next one."""
        return self.partial_rollouts is not None or self.max_staleness > 0

    @property
    def oversampling(self) -> float:
        """Groups in flight per group that a step still needs, if the step ends once it has enough."""
        section = self.partial_rollouts or self.dynamic_sampling
        return section.oversampling if section else 1.0

    @property
    def max_batches(self) -> int:
        """Maximum number of batches that a step samples in sequence."""
        return self.dynamic_sampling.max_rounds if self.dynamic_sampling and self.deterministic else 1

    @model_validator(mode="after")
    def _samples_in_one_way(self) -> "RolloutConfig":
        if self.deterministic and self.partial_rollouts:
            raise ValueError("deterministic: which responses partial_rollouts cuts depends on timing; turn one off")
        sampling = ("replay_from", "dynamic_sampling", "partial_rollouts", "max_staleness", "routing_replay")
        if self.source == "dataset" and (given := [name for name in sampling if getattr(self, name)]):
            raise ValueError(f"source: dataset cannot be combined with {', '.join(given)}; leave it out")
        reasons = {
            "deterministic": "which weights generate a token depends on timing",
            "partial_rollouts": "asynchronous sampling continues unfinished responses in later steps anyway",
            "replay_from": "nothing is sampled",
        }
        for name, reason in reasons.items():
            if self.max_staleness and getattr(self, name):
                raise ValueError(f"max_staleness cannot be combined with {name}: {reason}; leave one of them out")
        if self.max_staleness and self.dynamic_sampling and self.dynamic_sampling.oversampling > 1:
            raise ValueError(
                "max_staleness cannot be combined with dynamic_sampling.oversampling: no group is aborted; leave the "
                "at 1"
            )
        return self

    @model_validator(mode="after")
    def _generates_whole_responses(self) -> "RolloutConfig":
        if self.generate is None:
            if self.generate_options:
                raise ValueError("generate_options are for the function in generate, which is not set")
            return self
        if self.partial_rollouts:
            raise ValueError("generate: a function cannot continue a response in the next step; unset partial_rollouts")
        if self.routing_replay:
            raise ValueError("generate: the experts of inserted tokens are unknown; set routing_replay to false")
        if self.deterministic:
            raise ValueError(
                "generate: which turns an engine batches together depends on timing; set deterministic to false"
            )
        return self


class EngineConfig(Section):
    """SGLang servers on the trainer's devices, or external ones."""

    urls: list[ServerUrl] = Field(default_factory=list)
    """External SGLang servers on other devices, as `http://host:port`; none: the run starts its own. Rank 0
    broadcasts the weights to them, over NCCL from GPUs and gloo from CPU. Their key (`--api-key`) is read from the
    environment variable DSRL_ENGINE_API_KEY."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Neighbouring ranks that share one SGLang server."""

    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of each of the engine's processes on a CPU, which sleep while the trainer works. null: the rank's cores,
    but only one for every 20 million parameters of the model, and no more than OMP_NUM_THREADS."""

    port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the first server (the others count up from it); null picks free ports."""

    startup_timeout_seconds: float = Field(default=600.0, gt=0)
    """Limit for a server to answer its first health check."""

    health_check_seconds: float = Field(default=10.0, gt=0)
    """Time between two health checks of an engine during generation."""

    health_timeout_seconds: float = Field(default=60.0, gt=0)
    """An engine that passes no health check for this long is considered hung: it is killed and restarted."""

    max_restarts: int = Field(default=5, ge=0)
    """How often an engine that died or hung is restarted before the run ends with the last lines of its log. Counted
    since the run was started or resumed."""

    update_timeout_seconds: float = Field(default=300.0, gt=0)
    """Limit for one weight push, and for each release or resume of engine memory."""

    memory_fraction: float = Field(default=0.6, gt=0, lt=1)
    """Share of device memory for engine weights and KV cache (SGLang's `mem_fraction_static`). CUDA only."""

    max_total_tokens: int | None = Field(default=None, ge=1)
    """KV-cache capacity in tokens; null lets SGLang derive it from memory. Required on CPU."""

    max_context_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt plus response; null takes the model's own limit."""

    quantization: Literal["fp8"] | None = None
    """`fp8`: the engine computes the projections of every layer in FP8 (e4m3, a scale for each block of 128 x 128),
    which halves their memory; the trainer stays in `model.dtype` and quantises at each push. Objectives in post-train
    space then have an importance correction by default; watch `mismatch/*` and `policy/importance_*`. Needs an NVIDIA
    GPU of compute capability 8.9 or higher. External servers (`urls`) must be started for it. null: `model.dtype`."""

    weight_bucket_megabytes: int = Field(default=512, ge=1)
    """Size of one flattened bucket of the weight push."""

    check_weights: Literal["never", "first", "always"] = "first"
    """When to compare digests of every weight in the engines with those of what was sent: after the first push to an
    engine, after every push, or never. Engines that store weights in another form because of `extra_arguments` need
    `never`; those with `quantization` do not."""

    max_outstanding_samples: int = Field(default=1024, ge=1)
    """Samples that one engine runs or queues at a time. Further prompts go to the engine that frees up first."""

    extra_arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further SGLang server arguments, named as in `ServerArgs`, such as `attention_backend`."""

    @field_validator("urls")
    @classmethod
    def _name_every_server_once(cls, urls: list[str]) -> list[str]:
        if len(set(urls)) < len(urls):
            raise ValueError("names a server twice")
        return urls
