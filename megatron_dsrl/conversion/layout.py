"""The parallel layout that a converted checkpoint is cut for."""

from dataclasses import asdict, dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import model_problems, process_problems, refuse
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights.table import TensorRule


@dataclass(frozen=True)
class CheckpointLayout:
    """Parallel sizes for cutting the chunks of a checkpoint.

    Any layout can load any checkpoint; in this one every process reads whole chunks. Only the tensor-parallel sizes
    matter for cutting: each layer and each expert is a separate chunk anyway, which is all that pipeline stages
    (virtual ones included) and expert parallelism need.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None means the same as `tensor_parallel_size`."""

    def check(self, architecture: Architecture) -> None:
        """Check that the layout divides the model. Layers may be spread unevenly over pipeline stages.

        Raises:
            UserError: names the size that does not divide the model.
        """
        cutting = ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            sequence_parallel=self.tensor_parallel_size > 1,
        )
        staged = ParallelConfig(
            pipeline_parallel_size=self.pipeline_parallel_size,
            virtual_pipeline_stages=self.virtual_pipeline_parallel_size,
        )
        refuse([*process_problems(staged, staged.model_parallel_size), *model_problems(cutting, architecture.shape)])
        stages, layers = staged.pipeline_parallel_size * staged.virtual_pipeline_stages, architecture.num_hidden_layers
        if stages > layers:
            raise UserError(f"{stages} pipeline stages (including virtual ones) for a model with {layers} layers")

    def as_record(self) -> dict[str, int]:
        """All sizes by name."""
        return asdict(self) | {"expert_tensor_parallel_size": self.split_of_experts}

    @property
    def split_of_experts(self) -> int:
        """Number of parts that an expert's matrices are split into."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size

    def num_shards(self, rule: TensorRule) -> int:
        """Number of tensor-parallel ranks that split a rule's parameter."""
        return self.split_of_experts if rule.per_expert else self.tensor_parallel_size
