"""The generation side: SGLang engines and sampling."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_dsrl.config.section import Section

_SERVER_URL = re.compile(r"https?://[^/\s?#]+")

MAX_REPLAYED_EXPERTS = 256
"""Experts that `rollout.routing_replay` can name: one byte each."""


class DynamicSamplingConfig(Section):
    """Sample until every group of the batch has rewards that differ (DAPO). The others are replaced one by one; with
    `deterministic` in rounds, each of which asks for what is still missing."""

    max_rounds: int = Field(default=10, ge=1)
    """A step begins at most this many times `prompts_per_step` groups (times `oversampling`); with `deterministic`,
    rounds of a step. It then goes on with the mixed groups that there are; how many are missing is a metric."""

    oversampling: float = Field(default=1.0, ge=1)
    """Groups on their way per group that is still missing. Above 1 a step ends earlier: when it has enough, the surplus
    is aborted and dropped. Since long responses are the last ones, they are then seen less often than the policy gives
    them; `partial_rollouts` goes on with them instead. At 1 nothing is aborted. With `deterministic`, prompts that a
    round asks for per missing group; nothing is aborted then either."""


class PartialRolloutConfig(Section):
    """End the generation of a step when it has its groups, and go on with the others in the next step."""

    oversampling: float = Field(default=1.5, gt=1)
    """Groups on their way per group that the step still needs."""

    max_weight_versions: int = Field(default=3, ge=2)
    """Weight versions that may have a part in a group. One that would need more is begun anew."""


class RolloutConfig(Section):
    """What is sampled at every step."""

    prompts_per_step: int = Field(default=128, ge=1)
    """Prompts of one rollout batch."""

    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses per prompt: the group size G."""

    max_response_tokens: int = Field(default=8192, ge=1)
    """Length limit of a response; one that reaches it is marked truncated."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer divides its logits by the same."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off. Below 1 the engine samples from another distribution than the trainer scores."""

    top_k: int = Field(default=-1, ge=-1)
    """Top-k sampling; -1 is off."""

    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace groups that are all right or all wrong by further prompts; null: keep them."""

    partial_rollouts: PartialRolloutConfig | None = None
    """Do not wait for the longest responses: carry what is unfinished over to the next step. Older tokens keep the
    log-probs that they were sampled with as their old log-probs. With `dynamic_sampling` only mixed groups count, and
    its `oversampling` has no effect. null: a step waits for all its responses."""

    sample_ahead: bool = False
    """Sample the batch of the next step while this one is trained on, one step off-policy: its weights are one version
    old, and the log-probs that it was sampled with are the old log-probs of the update. Needs engines on devices of
    their own (`engine.urls`). Off: training and sampling take turns."""

    deterministic: bool = False
    """The same seed and weights give the same tokens and log-probs, bit for bit. Samples have seeds of their own in any
    case; but what is computed together differs by rounding, which now and then decides a token. If true, the prompts
    have fixed engines, each of which gets its part of the batch in one message and keeps no prefix cache, and rewards
    are computed after generation. On CUDA it turns on SGLang's `enable_deterministic_inference`, without which CUDA
    engines draw their random numbers without seeds."""

    routing_replay: bool = False
    """For a mixture of experts: the trainer sends every token to the experts that the engine has sent it to (rollout
    routing replay, R3, arXiv 2510.11370), so that rounding in a router does not make the two score with different
    experts. In the post-train space, for the policy; in the pre-train space, whose context the engine never sees, and
    for reference and critic, routers choose. Samples grow by layers x experts per token x 4/3 bytes per token."""

    step_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Limit for one whole rollout batch, with the prompts that dynamic sampling adds to it (with `deterministic`: for
    each of its rounds). The error names the prompts that were still running, and for how long."""

    request_timeout_seconds: float | None = Field(default=None, gt=0)
    """Limit for one request to an engine, which is a prompt with all its samples; null: none but the batch's. A request
    that takes longer has failed."""

    request_attempts: int = Field(default=3, ge=1)
    """How often a request is made before its failure ends the run, where the engine itself is well. Further attempts
    come after 1, 2, 4, ... seconds. What an engine was asked when it died is asked again without being counted."""

    replay_from: str | None = None
    """Run folder whose saved rollouts are used in place of sampling (train-only runs, layout comparisons): what every
    step was trained on, in the same order, however it was sampled. `dynamic_sampling` and `partial_rollouts` then have
    no effect."""

    @property
    def carries_over(self) -> bool:
        """Whether a step may leave samples to the next one."""
        return self.partial_rollouts is not None or self.sample_ahead

    @property
    def oversampling(self) -> float:
        """Groups on their way per group that a step still needs, where it ends when it has enough."""
        section = self.partial_rollouts or self.dynamic_sampling
        return section.oversampling if section else 1.0

    @property
    def max_batches(self) -> int:
        """Batches that a step samples one after the other, at most."""
        return self.dynamic_sampling.max_rounds if self.dynamic_sampling and self.deterministic else 1

    @model_validator(mode="after")
    def _is_repeatable_if_it_says_so(self) -> "RolloutConfig":
        if self.deterministic and self.partial_rollouts:
            raise ValueError("deterministic: which responses partial_rollouts cuts is decided by time; set one to null")
        return self

    @model_validator(mode="after")
    def _samples_ahead_whole_batches(self) -> "RolloutConfig":
        if self.sample_ahead and (self.partial_rollouts or self.replay_from):
            raise ValueError("sample_ahead does not go with partial_rollouts or replay_from; turn one of them off")
        return self


class EngineConfig(Section):
    """The SGLang server processes that share the trainer's devices, or servers elsewhere."""

    urls: list[str] = Field(default_factory=list)
    """SGLang servers that were started by somebody else on other devices, as `http://host:port`; none: the run starts
    its own. Weights are broadcast to them from rank 0, over NCCL from GPUs and gloo from CPU. Their key (`--api-key`)
    is read from the environment variable DSRL_ENGINE_API_KEY."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Neighbouring ranks that share one SGLang server."""

    port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the first server (the next ones count up); null picks free ports."""

    startup_timeout_seconds: float = Field(default=600.0, gt=0)
    """Limit until a server answers its health check."""

    health_check_seconds: float = Field(default=10.0, gt=0)
    """Time between two health checks of an engine while samples are generated."""

    health_timeout_seconds: float = Field(default=60.0, gt=0)
    """An engine that passes no health check for so long hangs: it is killed and restarted."""

    max_restarts: int = Field(default=5, ge=0)
    """How often one engine that died or hung is restarted before the run ends with the last lines of its log. Counted
    from the run's start or continuation."""

    update_timeout_seconds: float = Field(default=300.0, gt=0)
    """Limit for one weight push, and for each release or resume of engine memory."""

    memory_fraction: float = Field(default=0.6, gt=0, lt=1)
    """Share of device memory for engine weights and KV cache (SGLang's `mem_fraction_static`). CUDA only."""

    max_total_tokens: int | None = Field(default=None, ge=1)
    """KV-cache capacity in tokens; null lets SGLang derive it from memory. Required on CPU."""

    max_context_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt plus response; null takes the model's own limit."""

    weight_bucket_megabytes: int = Field(default=512, ge=1)
    """Size of one flattened bucket of the weight push."""

    check_weights: Literal["never", "first", "always"] = "first"
    """Compare digests of every weight in the engines with those of what was sent: after the first push to an engine,
    after every push, or not. An engine that keeps its weights in another form (`quantization`) needs `never`."""

    max_outstanding_samples: int = Field(default=1024, ge=1)
    """Samples that one engine runs or queues at a time; further prompts go to the engine that frees up first."""

    extra_arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further SGLang server arguments by their `ServerArgs` names, such as `attention_backend`."""

    @field_validator("urls")
    @classmethod
    def _name_every_server_once(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if "@" in url:
                raise ValueError(
                    "expected http://host:port without a user name and password; an engine's key (--api-key) is read "
                    "from the environment variable DSRL_ENGINE_API_KEY"
                )
            if not _SERVER_URL.fullmatch(url):
                raise ValueError("expected http://host:port, without a path")
        if len(set(urls)) < len(urls):
            raise ValueError("names a server twice")
        return urls
