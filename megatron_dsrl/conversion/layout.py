"""The layout that a converted checkpoint is meant for."""

from dataclasses import asdict, dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import model_problems, process_problems, refuse
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights.table import TensorRule


@dataclass(frozen=True)
class CheckpointLayout:
    """Parallel sizes that the chunks of a checkpoint are cut for.

    Any layout loads any checkpoint; at this one every process finds its parts as whole chunks. Only the tensor-parallel
    sizes cut: a layer of its own, and an expert of its own, are chunks in any case, which is all that pipeline stages
    (virtual ones too) and expert parallelism ask for.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """As many as `tensor_parallel_size` if None."""

    def check(self, architecture: Architecture) -> None:
        """Refuse what the model does not divide into. Its layers need not divide by the stages, which may be uneven.

        Raises:
            UserError: says which size does not divide what.
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
            raise UserError(f"{stages} pipeline stages, virtual ones counted: the model has {layers} layers")

    def as_record(self) -> dict[str, int]:
        """All sizes by name."""
        return asdict(self) | {"expert_tensor_parallel_size": self.split_of_experts}

    @property
    def split_of_experts(self) -> int:
        """Parts of every expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size

    def tensor_parallel_size_of(self, rule: TensorRule) -> int:
        """Parts that a rule's parameter is cut into."""
        return self.split_of_experts if rule.per_expert else self.tensor_parallel_size
