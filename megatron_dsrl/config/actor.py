"""The training side: micro-batches, the optimizer, the critic and the reference policy."""

from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from megatron_dsrl.config.section import Section, ServerUrl


class OffloadConfig(Section):
    """Which of the trainer's device memory the engine gets while it samples.

    Applies to policy and critic; the reference policy is always in host memory. Each rank needs host memory for what it
    moves. Sizes are per parameter of the rank's share of the model. Results do not change.
    """

    gradients: bool = False
    """Gradient buffers, 4 bytes. Nothing is copied, because updates begin with zero gradients."""

    optimizer: bool = False
    """Adam's moments, 8 bytes, and for bfloat16 the float32 weights, another 4 bytes; divided by the data-parallel
    size with the distributed optimizer. Moved to the host before the weights are pushed."""

    parameters: bool = False
    """The weights, 2 bytes in bfloat16 and 4 in float32. The policy's are moved after the push and before the KV
    cache comes back. If an engine dies while sampling, they return to the device to be pushed to the restarted one,
    so `engine.memory_fraction` must still leave room for them."""

    @property
    def parts(self) -> list[Literal["gradients", "optimizer", "parameters"]]:
        """Names of the parts that move."""
        return [part for part in ("gradients", "optimizer", "parameters") if getattr(self, part)]


ProjectionName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    """Low-rank adapters beside the policy's linear layers (LoRA, arXiv 2106.09685). Only they are trained; a layer
    computes W x + alpha / rank * B A x.

    Gradients, optimizer state and checkpoints hold the adapters alone, and the reference policy is the model without
    them. The engine gets merged weights. A is random at the start of a run and B is zero, as in PEFT; adapters have the
    model's dtype, with float32 master weights. There is no dropout: the update would score a different policy from the
    one that sampled. A critic, if a phase needs one, is trained in full.
    """

    rank: int = Field(default=32, ge=1)
    """Rows of A and columns of B."""

    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters' output, divided by `rank`."""

    target_modules: list[ProjectionName] = Field(default_factory=lambda: list(get_args(ProjectionName)), min_length=1)
    """Projections with an adapter, by PEFT's names. Every projection has its own A and B, even if Megatron fuses
    several into one layer. Experts get none: for a mixture of experts, name attention projections."""

    @field_validator("target_modules")
    @classmethod
    def _each_once(cls, names: list[ProjectionName]) -> list[ProjectionName]:
        if len(set(names)) < len(names):
            raise ValueError("a projection is named twice")
        return names


class ActorConfig(Section):
    """How a rollout batch becomes forward and backward passes."""

    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Token budget of one packed micro-batch on one model replica. A longer sequence gets its own micro-batch."""

    kept_logits_megabytes: int = Field(default=1024, ge=0)
    """Logits of a micro-batch that each process of the last pipeline stage keeps from the forward to the backward pass,
    at most. The backward pass computes the others a second time, which makes their share of the output layer about a
    third slower. Results do not change."""

    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of the trainer on a CPU, of each rank. null: the rank's cores, but only one for every 0.3 million
    parameters of the model, and no more than OMP_NUM_THREADS. Results are repeatable with the same number of
    threads."""

    mini_batches_per_rollout: int = Field(default=1, ge=1)
    """Number of parts a rollout batch is split into, with one optimizer step each."""

    epochs_per_rollout: int = Field(default=1, ge=1)
    """Passes over a rollout batch."""

    offload: OffloadConfig = Field(default_factory=OffloadConfig)
    """What moves to host memory while the engine samples; nothing by default."""

    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; null: all weights are trained."""

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """1 is strictly on-policy, and the old log-prob pass is then skipped."""
        return self.mini_batches_per_rollout * self.epochs_per_rollout


class OptimizerConfig(Section):
    """AdamW with gradient clipping (Megatron's optimizer)."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up to the peak. The first step already has a nonzero learning rate."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to 0 at the end of the run."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""

    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay. Norm weights and biases are exempt, as usual in Megatron."""

    gradient_clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""


class CriticConfig(Section):
    """A value model of the policy's architecture and layout, for phases whose advantages need values (PPO).

    Only built if a phase needs it; it then takes as much memory as the policy and its optimizer.
    """

    path: str | None = None
    """Folder that the critic starts from: a policy (the value head is then zero), or a Transformers classifier of
    tokens or sequences with one label (its `score` becomes the value head); null: `model.path`."""

    value_clip: float | None = Field(default=0.2, gt=0)
    """PPO's value clipping: a value that has moved further than this during the update gets no gradient; null turns it
    off."""

    mini_batches_per_rollout: int = Field(default=1, ge=1)
    """Number of parts a rollout batch is split into, with one optimizer step each."""

    epochs_per_rollout: int = Field(default=1, ge=1)
    """Passes over a rollout batch."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the beginning of the run in which only the critic learns. They need a phase that uses it."""

    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """The critic's AdamW, learning-rate schedule and gradient clipping."""

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer steps on every rollout batch."""
        return self.mini_batches_per_rollout * self.epochs_per_rollout


class ReferenceConfig(Section):
    """The policy that KL terms compare with and that `distillation` learns from; it starts from the run's initial
    weights.

    Its weights are kept in host memory, and only if a phase needs them.
    """

    path: str | None = None
    """Folder or hub name of other initial weights for a model of the policy's architecture, such as a teacher's; null:
    the run's initial weights."""

    url: ServerUrl | None = None
    """Address of an SGLang server (`http://host:port`) whose model is the reference. It may be of any size and
    architecture, but must have the policy's tokenizer. Its API key, if it has one, is in the environment variable
    `DSRL_ENGINE_API_KEY`. null: no server."""

    timeout_seconds: float = Field(default=300.0, gt=0)
    """Limit for one sequence at the server, including retries."""

    concurrency: int = Field(default=32, ge=1)
    """Sequences that the server scores at a time."""

    refresh_at_phase_switch: bool = False
    """Copy the policy's weights before the first step of every phase but the first."""

    refresh_every_steps: int | None = Field(default=None, ge=1)
    """Copy the policy's weights every n steps; null: never."""

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> "ReferenceConfig":
        refreshed = self.refresh_at_phase_switch or self.refresh_every_steps is not None
        if self.url is not None and (self.path is not None or refreshed):
            raise ValueError("the model at `url` keeps its weights; leave out path and the refresh_ fields")
        return self
