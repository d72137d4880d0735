"""Which model is trained and how it is spread over processes."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_dsrl.config.section import Section

Recompute = Literal["none", "selective", "full"]


class RouterConfig(Section):
    """The routers of a mixture of experts. Their losses apply to the policy only."""

    dtype: Literal["float32", "float64", "model"] = "float32"
    """Dtype in which hidden states are multiplied by the router's weights; `model`: the model's own, as SGLang and
    Transformers do. The softmax over the products is always computed in float32, then rounded to this dtype."""

    load_balancing: Literal["none", "aux_loss", "global_aux_loss"] = "none"
    """Loss for using all experts equally, by Megatron's names: `aux_loss` considers each micro-batch separately,
    `global_aux_loss` compares with where all tokens of the optimizer step have gone so far, on all data-parallel
    replicas. RL mostly keeps the router as pre-training balanced it: `none`. (`seq_aux_loss` is not offered, because
    Megatron would treat a whole packed row as one sequence.)"""

    load_balancing_coefficient: float | None = Field(default=None, ge=0)
    """Factor on that loss in every layer; the loss is 1 for balanced experts. 0 only measures it."""

    z_loss_coefficient: float | None = Field(default=None, ge=0)
    """Factor on the mean squared logsumexp of the router's logits in every layer, which keeps them small. 0 only
    measures it; null turns it off."""

    @property
    def has_losses(self) -> bool:
        """Whether a loss is added or measured."""
        return self.load_balancing_coefficient is not None or self.z_loss_coefficient is not None

    @model_validator(mode="after")
    def _coefficient_goes_with_a_loss(self) -> "RouterConfig":
        if self.load_balancing == "none" and self.load_balancing_coefficient is not None:
            raise ValueError("load_balancing_coefficient: load_balancing is `none`; choose a loss for it")
        if self.load_balancing != "none" and self.load_balancing_coefficient is None:
            raise ValueError(f"load_balancing: `{self.load_balancing}` needs a load_balancing_coefficient")
        return self


class ModelConfig(Section):
    """The policy: an HF checkpoint folder and the choices that the checkpoint leaves open."""

    path: str
    """HF folder (config.json, tokenizer, optionally safetensors), folder made by `dsrl convert`, or hub name. For a
    folder without weights see `random_init`."""

    random_init: bool = False
    """Ignore the folder's weights and start from random ones (normal, the folder's `initializer_range`)."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter and activation dtype of trainer and engine. Gradients are always reduced, and master weights kept, in
    float32. On a CPU, bfloat16 pays off for larger models if the CPU has instructions for it; `dsrl doctor` says so."""

    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Megatron layer implementation. `auto`: Transformer Engine if it is installed, CUDA is available and `dtype` is
    bfloat16, otherwise local."""

    recompute: Recompute = "none"
    """Activation recomputation in the backward pass: nothing, core attention only, or every layer. Attention is
    fused and stores no scores, so `selective` only frees the padded copies that local layers make for attention;
    with Transformer Engine, which makes no copies, it frees next to nothing. `dsrl plan` shows each mode's memory."""

    router: RouterConfig = Field(default_factory=RouterConfig)
    """For a mixture of experts: precision of its routers, and the losses they add."""


class ParallelConfig(Section):
    """How one model is distributed over the processes. The remaining factor is data parallelism."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Processes that split every weight matrix."""

    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Processes that split the layers into consecutive stages."""

    virtual_pipeline_stages: int = Field(default=1, ge=1)
    """Chunks of layers per pipeline stage (interleaved schedule): smaller pipeline bubbles, more communication.
    Rounds the number of micro-batches up to a multiple of `pipeline_parallel_size`."""

    layers_in_first_stage: int | None = Field(default=None, ge=1)
    """Layers in the first pipeline stage, if it should differ from the others: because the layers do not divide
    evenly, or to make room for the embedding. Stages without a number share the rest."""

    layers_in_last_stage: int | None = Field(default=None, ge=1)
    """The same for the last stage, which has the output head."""

    context_parallel_size: int = Field(default=1, ge=1)
    """Processes that split every sequence, for sequences too long for one. They share the weights' gradients and the
    distributed optimizer's shards as data-parallel processes do."""

    expert_parallel_size: int = Field(default=1, ge=1)
    """Processes over which the experts of a mixture-of-experts model are distributed, as whole experts."""

    expert_tensor_parallel_size: int | None = Field(default=None, ge=1)
    """Processes that split every expert's matrices; as many as `tensor_parallel_size` unless set."""

    sequence_parallel: bool = False
    """Split norm and residual activations over the tensor-parallel processes along the sequence."""

    distributed_optimizer: bool = False
    """Shard the optimizer state over data and context parallelism (Megatron's DistributedOptimizer)."""

    collective_timeout_seconds: int = Field(default=4 * 3600, ge=1)
    """Limit for the collectives of all processes. Must exceed a step's longest rollout plus evaluation, for which the
    other ranks wait."""

    distributed_timeout_seconds: int = Field(default=1800, ge=1)
    """Limit for a collective in one of Megatron's groups, which its ranks reach at about the same time: a rank that
    hangs in an update is noticed after this time. (Megatron-LM: `--distributed-timeout-minutes`.)"""

    @property
    def model_parallel_size(self) -> int:
        """Processes that train the same sequences together; the others are data-parallel to them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    def layers_of_stages(self, layers: int) -> list[int]:
        """How many of a model's layers each pipeline stage has, if they divide evenly; see
        `config.layout.model_problems`."""
        stages: list[int | None] = [None] * self.pipeline_parallel_size
        if self.pipeline_parallel_size > 1:
            stages[0], stages[-1] = self.layers_in_first_stage, self.layers_in_last_stage
        rest = (layers - sum(filter(None, stages))) // max(1, stages.count(None))
        return [rest if given is None else given for given in stages]

    @property
    def split_of_experts(self) -> int:
        """Parts of every expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size

    @property
    def expert_model_parallel_size(self) -> int:
        """Processes that hold one copy of all experts together."""
        return self.split_of_experts * self.expert_parallel_size * self.pipeline_parallel_size


class GradientAnalysisConfig(Section):
    """Settings of `dsrl analyse gradients`; those of a run are taken from its own configuration."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits; for a run, the temperature of its rollouts."""

    bos: Literal["im_start", "none", "assistant"] = "im_start"
    """What replaces the prompt in pre-train space; see `algorithms.spaces.PreTrain`."""
