"""Sampling as all ranks see it: rank 0 samples and judges, the others stand by to restart lost engines.

A request to stop ends sampling at once, but never a restart of engines, in which the ranks wait for one another.
"""

from collections.abc import Callable
from typing import TypeVar

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.common.collective import broadcast
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.rollout import StepSamples, responses_of
from megatron_dsrl.run.preemption import StopRequested
from megatron_dsrl.run.saving import save_and_stop
from megatron_dsrl.run.start import TrainingRun

Value = TypeVar("Value")


def sample(run: TrainingRun, step: int) -> tuple[StepSamples | None, list[Response]]:
    """Sample and judge the groups of a step. Collective. Returns the samples, on rank 0 only, and their responses.
    Raises Preempted if the run was asked to stop; its state before the step is saved."""
    sampler_before = run.sampler.state_dict()

    def draw(count: int) -> list[Prompt]:
        return [run.inputs.prompts[i] for i in run.sampler.next(count)]

    def work() -> StepSamples | None:
        samples = unless_stopped(run, lambda: run.rollout.sample_step(step, draw, run.console.generation))
        if samples is not None:
            samples.commit()
            if run.recorder is not None:
                run.recorder.record(step, samples.groups, samples.others)
        return samples

    samples = run.rollout.while_sampling(work, lambda: recover(run, version=step))
    shared = broadcast(None if samples is None else (responses_of(samples.groups, step), run.sampler.state_dict()))
    if shared is None:
        run.sampler.load_state_dict(sampler_before)
        save_and_stop(run, step - 1)
    responses, sampler = shared
    run.sampler.load_state_dict(sampler)  # only rank 0 knows how many prompts the step drew
    return samples, responses


def recover(run: TrainingRun, version: int) -> None:
    """Restart lost engines during a batch, with the weights that they had."""
    # if a rank stopped in here, the others would wait for it
    with run.stop.deferred(), run.timeline.span("recover_engines"):
        run.device.push_weights(version)
        run.device.give_to_engine()


def unless_stopped(run: TrainingRun, work: Callable[[], Value]) -> Value | None:
    """The result of `work`, or None if a request to stop ended it."""
    try:
        with run.stop.interruptible():
            return work()
    except StopRequested:
        return None
