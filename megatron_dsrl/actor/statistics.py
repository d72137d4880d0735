"""Token statistics, reduced over micro-batches and ranks to the metrics of an update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Sums and maxima over scored tokens of one objective."""

    num_tokens: int
    sums: dict[str, Tensor]
    """float64 scalar by name."""
    maxima: dict[str, Tensor]
    """float64 scalar by name; 0 without tokens, so only for non-negative quantities."""

    @classmethod
    def from_tokens(cls, loss: Tensor, means: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> "TokenStatistics":
        """Statistics of one micro-batch: `loss` is its weighted scalar; `means` and `maxima` are [S] each."""
        return cls(
            num_tokens=next(iter(means.values())).numel(),
            sums={"loss": loss.detach().double()} | {name: x.detach().double().sum() for name, x in means.items()},
            maxima={
                name: x.detach().double().amax() if x.numel() else loss.new_zeros((), dtype=torch.float64)
                for name, x in maxima.items()
            },
        )

    @classmethod
    def add_up(cls, parts: Sequence["TokenStatistics"]) -> "TokenStatistics":
        """Combine one or more micro-batches that report the same names."""
        first = parts[0]
        return cls(
            num_tokens=sum(part.num_tokens for part in parts),
            sums={name: torch.stack([part.sums[name] for part in parts]).sum() for name in first.sums},
            maxima={name: torch.stack([part.maxima[name] for part in parts]).amax() for name in first.maxima},
        )

    def over_replicas(self) -> "TokenStatistics":
        """Combine over data-parallel replicas; collective over the ranks of this pipeline stage."""
        group = parallel_state.get_data_parallel_group()
        device = self.sums["loss"].device
        count = torch.tensor(self.num_tokens, dtype=torch.float64, device=device)
        sums = torch.stack([count, *self.sums.values()])
        maxima = torch.stack([count.new_zeros(()), *self.maxima.values()])
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        return TokenStatistics(
            int(sums[0].item()), dict(zip(self.sums, sums[1:].cpu())), dict(zip(self.maxima, maxima[1:].cpu()))
        )


@dataclass(frozen=True)
class ObjectiveMetrics:
    """Metrics of an objective over one or more optimizer steps."""

    loss: float
    kept_samples: int
    """Samples in the loss and its denominator."""
    kept_tokens: int
    """Their scored tokens."""
    skipped_samples: int
    """Kept samples that were not computed because they have no gradient."""
    computed_tokens: int
    """Scored tokens of the kept samples that were computed."""
    means: dict[str, float]
    """Means over the computed tokens, by name; undefined without computed tokens."""
    maxima: dict[str, float]

    @classmethod
    def from_step(
        cls, statistics: TokenStatistics, num_scored: Sequence[int], computed_samples: int
    ) -> "ObjectiveMetrics":
        """Metrics of one optimizer step: from the statistics of the computed samples over all replicas, and the scored
        tokens of every kept sample, computed or not."""
        tokens = statistics.num_tokens
        sums = {name: value.item() for name, value in statistics.sums.items()}
        return cls(
            loss=sums.pop("loss"),
            kept_samples=len(num_scored),
            kept_tokens=sum(num_scored),
            skipped_samples=len(num_scored) - computed_samples,
            computed_tokens=tokens,
            means={name: value / max(tokens, 1) for name, value in sums.items()},
            maxima={name: value.item() for name, value in statistics.maxima.items()},
        )

    def totals(self) -> dict[str, float]:
        """Metrics of the objective as a whole, by name."""
        return {
            "loss": self.loss,
            "kept_samples": self.kept_samples,
            "kept_tokens": self.kept_tokens,
            "skipped_fraction": self.skipped_samples / self.kept_samples,
        }

    def token_metrics(self) -> dict[str, float]:
        """Metrics of its computed tokens, by name; empty without computed tokens."""
        return self.means | self.maxima if self.computed_tokens else {}

    @classmethod
    def merge(cls, steps: Sequence["ObjectiveMetrics"]) -> "ObjectiveMetrics":
        """Combine several optimizer steps: counts are summed, maxima kept, means weighted by tokens; the loss is the
        plain mean over steps."""
        tokens = sum(step.computed_tokens for step in steps)
        return cls(
            loss=sum(step.loss for step in steps) / len(steps),
            kept_samples=sum(step.kept_samples for step in steps),
            kept_tokens=sum(step.kept_tokens for step in steps),
            skipped_samples=sum(step.skipped_samples for step in steps),
            computed_tokens=tokens,
            means={
                name: sum(step.means[name] * step.computed_tokens for step in steps) / max(tokens, 1)
                for name in steps[0].means
            },
            maxima={name: max(step.maxima[name] for step in steps) for name in steps[0].maxima},
        )


@dataclass(frozen=True)
class UpdateMetrics:
    """Metrics of the optimizer steps on one rollout batch. The same on every rank."""

    grad_norm: float
    """Mean over steps, before clipping."""
    learning_rate: float
    """Learning rate of the last step."""
    objectives: dict[str, ObjectiveMetrics]
    """Metrics by objective name."""
    router: dict[str, float] = field(default_factory=dict)
    """Unweighted router losses of a mixture of experts, by name; see `RouterLosses.metrics`."""

    @property
    def loss(self) -> float:
        """The sum of the objectives' losses, without router losses."""
        return sum(objective.loss for objective in self.objectives.values())

    @classmethod
    def merge(cls, steps: Sequence["UpdateMetrics"]) -> "UpdateMetrics":
        """Combine several optimizer steps."""
        names = dict.fromkeys(name for step in steps for name in step.objectives)
        return cls(
            grad_norm=sum(step.grad_norm for step in steps) / len(steps),
            learning_rate=steps[-1].learning_rate,
            objectives={
                name: ObjectiveMetrics.merge([step.objectives[name] for step in steps if name in step.objectives])
                for name in names
            },
            router={name: sum(step.router[name] for step in steps) / len(steps) for name in steps[0].router},
        )


def share_with_all_stages(metrics: dict[str, ObjectiveMetrics] | None) -> dict[str, ObjectiveMetrics]:
    """Broadcast the metrics of the last pipeline stage to all stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert metrics is not None
        return metrics
    shared = [metrics]
    dist.broadcast_object_list(
        shared,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    assert shared[0] is not None
    return shared[0]
