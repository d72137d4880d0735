"""Sampling as all ranks see it: rank 0 samples and judges, the others stand by to restart lost engines.

A request to stop ends sampling at once, but never a restart of engines, in which the ranks wait for one another.
"""

from collections.abc import Callable
from typing import TypeVar

from megatron_dsrl.algorithms.experience import Experience, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.common.collective import broadcast
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.data.tokenizer import context_token_ids
from megatron_dsrl.rollout.responses import responses_of
from megatron_dsrl.rollout.step_sampling import StepSamples
from megatron_dsrl.run.preemption import StopRequested, StopSignal
from megatron_dsrl.run.training_run import TrainingRun

Value = TypeVar("Value")


def sample(run: TrainingRun, step: int) -> StepSamples | None:
    """Rank 0: the judged samples of the step, or None if the run was asked to stop. Other ranks: None."""

    def work() -> StepSamples | None:
        assert run.controller is not None
        show_progress = run.controller.show_progress
        samples = unless_stopped(run.stop, lambda: run.rollout.sample_step(step, run.draw, show_progress))
        if samples is not None:
            run.controller.keep(step, samples)
        return samples

    return run.rollout.while_sampling(work, lambda: recover_engines(run, version=step))


def share_experiences(
    run: TrainingRun, step: int, samples: StepSamples | None, phase: PhaseConfig
) -> list[Experience] | None:
    """Broadcast rank 0's groups as one experience per objective; None if the run was asked to stop."""
    shared = broadcast(
        None if samples is None else (responses_of(samples.groups, step), run.sampler.state_dict())
    )
    if shared is None:
        return None
    responses, sampler_state = shared
    run.sampler.load_state_dict(sampler_state)  # only rank 0 knows how many prompts the step drew
    responses = shape_rewards(responses, run.config.reward.overlong, run.config.rollout.max_response_tokens)
    return [
        build_experience(
            responses, objective.space, context_token_ids(run.inputs.tokenizer, objective.space.context_text)
        )
        for objective in phase.objectives.values()
    ]


def begin_ahead(run: TrainingRun, step: int) -> None:
    """With `rollout.sample_ahead`, start sampling the next step on rank 0."""
    if run.config.rollout.sample_ahead and run.controller and step < run.config.steps:
        run.rollout.begin_ahead(step + 1, run.draw, run.controller.show_progress)


def finish_ahead(run: TrainingRun, step: int) -> bool:
    """Wait for the sampling that `begin_ahead` began; False if the run was asked to stop."""
    if not run.config.rollout.sample_ahead or step == run.config.steps:
        return True

    def finish() -> bool:
        run.rollout.finish_ahead()
        return True

    finished = run.rollout.while_sampling(
        lambda: unless_stopped(run.stop, finish), lambda: recover_engines(run, version=step)
    )
    return bool(broadcast(finished))


def evaluate_policy(run: TrainingRun, step: int) -> None:
    """Run the evaluations that are due after this step (0: before training) and not done yet.

    A request to stop ends the evaluation; the run then stops before its next step, and evaluates when it is continued.
    """

    def evaluate() -> None:
        assert run.controller is not None
        run.controller.evaluate(step)

    if run.evaluates_after(step):
        with run.timeline.span("evaluate"):
            run.rollout.while_sampling(
                lambda: unless_stopped(run.stop, evaluate), lambda: recover_engines(run, version=step + 1)
            )


def recover_engines(run: TrainingRun, version: int) -> None:
    """Restart lost engines during a batch, with the weights that they had. All ranks."""
    # if a rank stopped in here, the others would wait for it
    with run.stop.deferred(), run.timeline.span("recover_engines"):
        run.device.push_weights(version)
        run.device.give_to_engine()


def unless_stopped(stop: StopSignal, work: Callable[[], Value]) -> Value | None:
    """The result of `work`, or None if a request to stop ended it."""
    try:
        with stop.interruptible():
            return work()
    except StopRequested:
        return None
