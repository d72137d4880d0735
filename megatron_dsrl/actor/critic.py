"""The critic of PPO: a value model that learns to predict the return before each token.

One object per rank; all methods are collective over the ranks. It uses the policy's layout. Router losses
(`model.router`) are not applied to the critic: their coefficients are chosen for the scale of the policy loss, and the
critic's expert load affects only its own training.
"""

from torch import Tensor

from megatron_dsrl.actor.forward_backward import MicroBatch
from megatron_dsrl.actor.packing import PackedRow
from megatron_dsrl.actor.sharded_model import TrainableModel, require_finite
from megatron_dsrl.actor.statistics import ObjectiveMetrics, TokenStatistics, UpdateMetrics, share_with_all_stages
from megatron_dsrl.algorithms.experience import Experience, PerToken, concatenate_tokens
from megatron_dsrl.algorithms.losses import value_loss, value_statistics
from megatron_dsrl.config.actor import CriticConfig


class Critic:
    """A sharded value model with its optimizer."""

    def __init__(self, model: TrainableModel, config: CriticConfig) -> None:
        """Use `build_critic` to create one."""
        self.model = model
        self._config = config

    def values(self, experience: Experience) -> PerToken:
        """Value before each scored token of each sequence, the same on every rank."""
        return self.model.score_tokens(experience.sequences, _values)

    def update(self, experience: Experience) -> dict[str, float]:
        """Take the configured optimizer steps towards the returns, on the mean over the tokens of each mini-batch.

        The experience is the global batch with values and returns, the same on every rank. It is not filtered: the
        critic learns from every sample. Returns metrics by name, without a prefix, the same on every rank; none if no
        token is scored. Raises FloatingPointError if the loss or the gradient norm is not finite.
        """
        experience = experience.select([i for i, count in enumerate(experience.num_scored) if count > 0])
        if len(experience) == 0:
            return {}
        steps = [
            self._optimizer_step(part)
            for _ in range(self._config.epochs_per_rollout)
            for part in experience.mini_batches(self._config.mini_batches_per_rollout)
            if len(part) > 0
        ]
        update = UpdateMetrics.merge(steps)
        critic_metrics = update.objectives["critic"]
        return {
            "loss": critic_metrics.loss,
            **critic_metrics.means,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            **value_statistics(experience),
        }

    def _optimizer_step(self, experience: Experience) -> UpdateMetrics:
        rows = self.model.pack_share(experience.sequences)
        kept = self.model.accumulate_gradients([self._micro_batch(experience, row) for row in rows])
        metrics = None
        if kept:
            statistics = TokenStatistics.add_up(kept).over_replicas()
            update = ObjectiveMetrics.from_step(statistics, experience.num_scored, computed_samples=len(experience))
            metrics = {"critic": update}
        metrics = share_with_all_stages(metrics)
        require_finite("value loss", metrics["critic"].loss)
        grad_norm, learning_rate = self.model.take_step()
        return UpdateMetrics(grad_norm, learning_rate, metrics)

    def _micro_batch(self, experience: Experience, row: PackedRow) -> MicroBatch[TokenStatistics]:
        """A packed row; its loss is the sum of its token losses divided by the token count of the whole mini-batch."""
        assert experience.values is not None and experience.returns is not None
        old_values = concatenate_tokens(experience.values, row.indices, self.model.device)
        returns = concatenate_tokens(experience.returns, row.indices, self.model.device)
        num_tokens = sum(experience.num_scored)

        def score(output: Tensor) -> tuple[Tensor, TokenStatistics]:
            """The value loss of one packed row, over all tokens of the step, and its statistics."""
            result = value_loss(_values(row, output), old_values, returns, self._config.value_clip)
            loss = result.losses.sum() / num_tokens
            return loss, TokenStatistics.from_tokens(loss, result.metrics, {})

        return MicroBatch(row, score)


def _values(row: PackedRow, output: Tensor) -> Tensor:
    """[sum(num_scored)] float32 values of a row from the value head's output [S, 1] at this rank's positions."""
    return row.assemble(output.squeeze(-1).float())
