"""The whole configuration tree of a run, and of a sweep of runs."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from megatron_dsrl.config.actor import ActorConfig, CriticConfig, OptimizerConfig, ReferenceConfig
from megatron_dsrl.config.benchmark import BenchmarkRunConfig, load_benchmark
from megatron_dsrl.config.choices import AnyTracker
from megatron_dsrl.config.data import DataConfig, PromptSetConfig, RewardConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.phase import AnyPhase
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig
from megatron_dsrl.config.section import FolderPath, Section

MAX_NAME_BYTES = 200
"""File systems allow 255; the rest is for suffixes."""
GatherOn = Literal["device", "host"]


def _require_nothing(schema: dict[str, Any]) -> None:
    """Tell editors that no field is required: `benchmark` may provide the required ones."""
    schema.pop("required", None)


class EvaluationSetConfig(PromptSetConfig):
    """A held-out prompt set and how it is sampled. Training's sampling parameters do not apply here."""

    model_config = ConfigDict(json_schema_extra=_require_nothing)

    benchmark: str | None = None
    """A benchmark of `dsrl eval`, by its name or the path of its `.yaml` file. The set inherits its fields: the source
    of the problems (from the hub), and how they are asked, judged and sampled. Fields set here win; `name` defaults to
    the benchmark's."""

    name: str
    """Shown in logs, plots and tables."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses per problem; accuracy is their mean (Avg@k)."""

    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy decoding."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off. `rollout.top_p` has no effect here."""

    top_k: int = Field(default=-1, ge=-1)
    """Top-k sampling; -1 is off. `rollout.top_k` has no effect here."""

    max_response_tokens: int | None = Field(default=None, ge=1)
    """Length limit of a response; null: `rollout.max_response_tokens`."""

    reward: RewardConfig | None = None
    """Verifier of this set; null: the run's."""

    @model_validator(mode="before")
    @classmethod
    def _take_over_benchmark(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("benchmark"), str):
            return data
        benchmark = load_benchmark(data["benchmark"], data_folder=None, section="benchmark")
        fields = benchmark.config.model_dump(mode="json", exclude={"title"})
        return {"name": benchmark.name, **fields, **data}


class EvaluationConfig(Section):
    """Evaluation during training, with the same engines and verifier. With `rollout.source: dataset` the sets contain
    responses, and the evaluation is their loss: the mean negative log-likelihood per token."""

    sets: list[EvaluationSetConfig] = Field(default_factory=list)
    """Held-out prompt sets."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate every n steps; null: only before the first and after the last step."""

    early_every_steps: int | None = Field(default=None, ge=1)
    """The same up to `early_until_step`, while the policy changes fast; null: same as `every_steps`."""

    early_until_step: int = Field(default=0, ge=0)
    """Last step that uses `early_every_steps`."""

    def interval_at(self, step: int) -> int | None:
        """Steps between evaluations around this step."""
        is_early = self.early_every_steps is not None and step <= self.early_until_step
        return self.early_every_steps if is_early else self.every_steps


class CheckpointConfig(Section):
    """What is kept on disk. A restarted run resumes from its newest checkpoint."""

    save_every_steps: int | None = Field(default=None, ge=1)
    """Save a checkpoint every n steps; null: only after the last one."""

    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""

    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints of steps divisible by this are never removed; null keeps only the newest."""

    asynchronous: bool = True
    """Continue training while a checkpoint is being written: saving only blocks until every rank has copied its part
    to host memory. The checkpoint appears when it is complete, after the next sampling or step at the earliest."""

    gather_optimizer_on: GatherOn = "device"
    """Where the shards of the distributed optimizer come together for a checkpoint. `device`: on every GPU over NCCL,
    which takes twice the memory of all float32 weights there (`dsrl plan` shows it); every process writes a part.
    `host`: over gloo, in the memory of the first process of each data-parallel group, which writes it alone. That is
    slower, but takes no GPU memory. (Megatron-LM: `--dist-ckpt-optim-fully-reshardable-mem-efficient`.)"""

    export_hf_every_steps: int | None = Field(default=None, ge=1)
    """Export the policy as an HF folder every n steps; null: only after the last step."""


class ObservabilityConfig(Section):
    """What a run records."""

    tensorboard: bool = True
    """Write TensorBoard scalars to `<run folder>/tensorboard`."""

    trackers: list[AnyTracker] = Field(default_factory=list)
    """Experiment trackers that follow the run: `wandb`, `mlflow`, `swanlab`, `trackio`, a dotted path
    `package.module:Class`, or `{name: wandb, project: mine}` with options."""

    evaluation_responses: int = Field(default=16, ge=0)
    """Number of responses of every evaluation to write to `<run folder>/evaluation_responses.jsonl`, one for each of
    the first problems; trackers show them as a table."""

    save_rollouts: bool = True
    """Write every sample of every step to `<run folder>/rollouts` (needed for `rollout.replay_from`). The responses of
    a data set (`rollout.source`) are not written."""

    trace: bool = True
    """Record the timeline of every rank and engine in `<run folder>/trace`, for `dsrl trace`. On by default: it costs
    about a millisecond and 20 kB per step of 128 prompts, and you rarely know beforehand which run will hang or slow
    down."""

    profile_steps: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Steps to profile on every rank, such as `[3, 4]`; they take longer than others. The first step is not typical: it
    allocates memory and compiles kernels."""

    profile_with: Literal["torch", "nsight"] = "torch"
    """`torch`: torch.profiler, whose events `dsrl trace` adds to the timeline. `nsight`: start and stop Nsight
    Systems' capture around each profiled step, for `nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi
    --capture-range-end=repeat dsrl train ...`. CUDA only."""

    verbose: bool = False
    """Print every figure of a step on the console, below its line; `dsrl train -v` sets it."""

    max_log_prob_gap: float = Field(default=0.05, gt=0)
    """Warn when the mean |trainer - engine| log-prob of a step exceeds this."""


class RunConfig(Section):
    """One training run."""

    name: str
    """Run name; also the last part of the run folder, so it must be usable as a folder name."""

    output_dir: FolderPath = "runs"
    """The run folder is `<output_dir>/<name>`."""

    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of weights, prompt order and sampling."""

    steps: int = Field(ge=1, le=1_000_000)
    """Rollout batches to train on."""

    made_by: dict[str, str] = Field(default_factory=dict)
    """Commands that create input files and folders, keyed by their path or a parent folder; shown when one is
    missing."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    actor: ActorConfig = Field(default_factory=ActorConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    data: DataConfig
    reward: RewardConfig = Field(default_factory=RewardConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    phases: list[AnyPhase] = Field(min_length=1)
    """The phases, in the order of their `until_step`."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)

    @property
    def longest_sequence(self) -> int:
        """Prompt plus response, in tokens."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not name.strip(" .") or "/" in name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(
                f"expected the name of one folder: at most {MAX_NAME_BYTES} bytes, without `/`, and not only dots or "
                "spaces (output_dir says where the folder is)"
            )
        return name


RolloutSettings = RunConfig | BenchmarkRunConfig
"""Their common sections determine engines and samples: `model`, `data`, `parallel`, `rollout`, `engine`, `reward`."""


@dataclass(frozen=True)
class Due:
    """What is due after a step of a run; after the last step, everything is."""

    config: RunConfig

    def save(self, step: int) -> bool:
        """A checkpoint."""
        return is_due(step, self.config.checkpoint.save_every_steps, self.config.steps)

    def export(self, step: int) -> bool:
        """An export in Hugging Face's format."""
        return step > 0 and is_due(step, self.config.checkpoint.export_hf_every_steps, self.config.steps)

    def evaluate(self, step: int) -> bool:
        """An evaluation; step 0 is before training."""
        return step == 0 or is_due(step, self.config.evaluation.interval_at(step), self.config.steps)


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether something that happens every `every_steps` steps, and after the last one, is due after this step."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)


class SweepRunConfig(Section):
    """One method of a sweep."""

    config: str | Annotated[list[str], Field(min_length=1)]
    """Its configuration file, or several, the later winning; relative to the sweep's file."""

    overrides: list[str] = Field(default_factory=list)
    """`key.path=value`, after the sweep's own."""


class SweepConfig(Section):
    """Runs to train and compare."""

    output_dir: FolderPath
    """Folder for all runs, the table and the figure."""

    seeds: list[int] = Field(min_length=1)
    """Every method is run with each seed."""

    baseline: str
    """The method that the others are compared with."""

    overrides: list[str] = Field(default_factory=list)
    """`key.path=value` for every run."""

    runs: dict[str, SweepRunConfig] = Field(min_length=1)
    """The methods by name, in the order of the table."""
