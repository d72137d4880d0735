"""Rollout sides that start no engine: there is nothing to wait for, to push to, or to evaluate with.

`DatasetRollout` trains on the responses of a data set, with the same loop (`dsrl sft`). A step takes the next
`prompts_per_step` rows; the sampler shuffles them in every epoch, and a checkpoint remembers its position. The
responses have no reward and no log-probs of an engine, so a step record has neither.

`ReplayRollout` trains on recorded samples: train-only runs, comparing layouts on the same samples, bisecting a run. A
step replays exactly what the recorded run trained on, in its order and however it was sampled: tokens, log-probs,
weight versions, rewards. Dynamic sampling and partial rollouts have no effect; prompts are drawn, but
not used.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dsrl.common.collective import rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.demonstrations import Demonstration
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.recording import read_batch, rollout_file
from megatron_dsrl.rollout.rollout import Draw, StepSamples, Value, Watch
from megatron_dsrl.rollout.sample import Sample, SampleGroup, SamplingParameters, count_tokens
from megatron_dsrl.rollout.unfinished import CarryOver


class WithoutEngines:
    """A `Rollout` whose responses exist already; lacks `sample_step`."""

    def __init__(self, sampling: SamplingParameters, setting: str) -> None:
        """`setting` is the configuration field that says where the responses are, for messages."""
        self.carried = CarryOver()
        self.training_sampling = sampling
        """Only gives the length limit here."""
        self._setting = setting

    def generate(self, *request: object, **options: object) -> list[SampleGroup]:
        """Always raises UserError."""
        raise UserError(f"{self._setting} starts no engines: nothing can be sampled")

    def while_sampling(self, work: Callable[[], Value], recover: Callable[[], None]) -> Value | None:
        return work() if rank() == 0 else None

    def engine_metrics(self) -> dict[str, int | float]:
        return {}

    def wait_until_ready(self) -> None: ...

    def load_weights(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None: ...

    def release_memory(self) -> None: ...

    def resume_weights(self) -> None: ...

    def resume_kv_cache(self) -> None: ...

    def close(self) -> None: ...


class DatasetRollout(WithoutEngines):
    """Trains on the responses of the run's data set."""

    def __init__(self, config: RolloutConfig, num_demonstrations: int, stop_token_ids: tuple[int, ...]) -> None:
        super().__init__(SamplingParameters.for_training(config, stop_token_ids), "rollout.source: dataset")
        self._per_step = config.prompts_per_step
        self._num_demonstrations = num_demonstrations

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The next demonstrations as groups of one sample each."""
        groups = [as_group(prompt, step) for prompt in draw(self._per_step)]
        epoch = step * self._per_step / self._num_demonstrations
        return StepSamples(groups, metrics={"data/epoch": epoch}, judged=False)


def as_group(demonstration: Prompt, weight_version: int) -> SampleGroup:
    """A demonstration as the only sample of its prompt, with reward 0, which nothing reads."""
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


class ReplayRollout(WithoutEngines):
    """Trains on the samples that another run has recorded."""

    def __init__(self, config: RolloutConfig, prompts: Sequence[Prompt], stop_token_ids: tuple[int, ...]) -> None:
        """`prompts` are all that this run may train on. Raises UserError if `replay_from` has no recorded rollouts."""
        assert config.replay_from is not None
        super().__init__(SamplingParameters.for_training(config, stop_token_ids), "rollout.replay_from")
        self._run_folder = Path(config.replay_from)
        self._config = config
        self._prompts = prompts
        if not (self._run_folder / "rollouts").is_dir():
            raise UserError(f"rollout.replay_from: {self._run_folder} has no folder `rollouts`")

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The samples that the recorded run trained on in this step; raises like `replayed_groups`."""
        started = time.perf_counter()
        draw(self._config.prompts_per_step)  # so that a run continued without the recording draws the next batch
        groups, others = replayed_groups(self._run_folder, step, self._prompts, self._config)
        seconds = time.perf_counter() - started
        return StepSamples(groups, others, generated_tokens=count_tokens(groups + others), seconds=seconds)


def replayed_groups(
    run_folder: Path, step: int, prompts: Sequence[Prompt], config: RolloutConfig
) -> tuple[list[SampleGroup], list[SampleGroup]]:
    """The recorded batch of a step, which must fit this run, and the groups that were not trained on. Raises UserError
    if the file is missing; has more groups, other prompts or another number of samples than this run; or lacks the
    experts that `routing_replay` needs.

    Args:
        run_folder: the recorded run's.
        prompts: all prompts that this run may train on.
    """
    file = rollout_file(run_folder, step)
    try:
        groups, others = read_batch(file)
    except UserError as error:
        raise UserError(f"rollout.replay_from: {error}") from error
    _check_size(file, groups, others, config)
    prompt_at = {prompt.index: prompt for prompt in prompts}
    for group in groups:
        own = prompt_at.get(group.prompt.index)
        if own is None or own.token_ids != group.prompt.token_ids:
            raise UserError(
                f"rollout.replay_from: {file} holds prompt {group.prompt.index}, which this run "
                f"{'does not have' if own is None else 'has in another form'}; use the same data and chat template"
            )
    if not config.routing_replay:
        return [_without_experts(group) for group in groups], [_without_experts(group) for group in others]
    if any(sample.routed_experts is None for group in groups for sample in group.samples):
        raise UserError(
            f"rollout.replay_from: {file} does not record which experts tokens were sent to; record it with "
            "rollout.routing_replay=true, or set that to false here"
        )
    return groups, others


def _check_size(
    file: Path, groups: Sequence[SampleGroup], others: Sequence[SampleGroup], config: RolloutConfig
) -> None:
    """Check the numbers of groups and samples. Dynamic sampling may have found fewer groups than a step takes."""
    if len(groups) > config.prompts_per_step or (len(groups) < config.prompts_per_step and not others):
        raise UserError(
            f"rollout.replay_from: {file} holds {len(groups)} prompts that were trained on, but this run takes "
            f"{config.prompts_per_step} per step; set rollout.prompts_per_step to the recorded run's value"
        )
    for group in groups:
        if len(group.samples) != config.samples_per_prompt:
            raise UserError(
                f"rollout.replay_from: {file} holds {len(group.samples)} samples of prompt {group.prompt.index}, but "
                f"this run takes {config.samples_per_prompt}; set rollout.samples_per_prompt={len(group.samples)}"
            )


def _without_experts(group: SampleGroup) -> SampleGroup:
    return replace(group, samples=tuple(replace(sample, routed_experts=None) for sample in group.samples))
