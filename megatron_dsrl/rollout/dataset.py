"""The responses of a data set instead of samples: supervised training with the same loop (`dsrl sft`).

A step trains on the next `prompts_per_step` rows; the sampler shuffles them in every epoch, and a checkpoint
remembers its position. The responses have no reward and no log-probs of an engine, so a step record has neither.
"""

from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.demonstrations import Demonstration
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.sample import Sample, SampleGroup, SamplingParameters
from megatron_dsrl.rollout.step_samples import Draw, StepSamples, Watch
from megatron_dsrl.rollout.without_engines import WithoutEngines


class DatasetRollout(WithoutEngines):
    """The rollout side of a run that trains on the responses of its data set: no engines, no verifier."""

    def __init__(self, config: RolloutConfig, num_demonstrations: int, stop_token_ids: tuple[int, ...]) -> None:
        """
        Args:
            num_demonstrations: rows that the run trains on.
            stop_token_ids: tokens that end a response.
        """
        super().__init__(SamplingParameters.for_training(config, stop_token_ids), "rollout.source: dataset")
        self._per_step = config.prompts_per_step
        self._num_demonstrations = num_demonstrations

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The next demonstrations as groups of one sample each."""
        groups = [as_group(prompt, step) for prompt in draw(self._per_step)]
        epoch = step * self._per_step / self._num_demonstrations
        return StepSamples(groups, metrics={"data/epoch": epoch}, judged=False)


def as_group(demonstration: Prompt, weight_version: int) -> SampleGroup:
    """A demonstration as the only sample of its prompt, with reward 0, which nothing reads.

    Args:
        demonstration: one of `load_demonstrations`.
        weight_version: version of the weights that train on it.
    """
    assert isinstance(demonstration, Demonstration), "load_inputs reads demonstrations if rollout.source is dataset"
    sample = Sample(
        response_ids=demonstration.response_ids,
        log_probs=(),
        text=demonstration.answer,
        finish_reason="length" if demonstration.truncated else "stop",
        weight_version=weight_version,
        reward=0.0,
    )
    return SampleGroup(demonstration.prompt, (sample,))
