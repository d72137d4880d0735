"""Sampling as all ranks see it: rank 0 samples and judges, the others stand by to restart lost engines.

A request to stop ends sampling at once, but never a restart of engines, in which the ranks wait for one another.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.common.collective import broadcast
from megatron_dsrl.data.mixture import MixtureState, Sampler
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.samplers import SamplerState
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.evaluation.sample_file import first_responses
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.rollout import Rollout, StepSamples, responses_of
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.preemption import StopRequested, StopSignal
from megatron_dsrl.run.reporting import Reporting

Value = TypeVar("Value")


@dataclass(frozen=True)
class Sampling:
    """Draws prompts, samples and evaluates. Methods are collective."""

    rollout: Rollout
    device: SharedDevice
    """Gives restarted engines their weights."""
    prompts: Sequence[Prompt]
    sampler: Sampler
    """Rank 0 draws from it; the other ranks' state is synchronised every step."""
    stop: StopSignal
    recorder: RolloutRecorder | None
    """Saves the rollouts, if anything does; rank 0 only."""
    evaluator: Evaluator | None
    """Rank 0 only."""
    reporting: Reporting

    def sampler_state(self) -> SamplerState | MixtureState:
        """The prompts drawn so far."""
        return self.sampler.state_dict()

    def sample(self, step: int) -> StepSamples | None:
        """Rank 0: the judged samples of the step, or None if the run was asked to stop. Other ranks: None."""

        def work() -> StepSamples | None:
            show_progress = self.reporting.console.generation
            samples = unless_stopped(self.stop, lambda: self.rollout.sample_step(step, self._draw, show_progress))
            if samples is not None and self.recorder is not None:
                self.recorder.record(step, samples.groups, samples.others)
            return samples

        return self.rollout.while_sampling(work, lambda: self._recover(version=step))

    def share(self, step: int, samples: StepSamples | None) -> list[Response] | None:
        """Broadcast rank 0's samples as responses; None if the run was asked to stop."""
        shared = broadcast(None if samples is None else (responses_of(samples.groups, step), self.sampler.state_dict()))
        if shared is None:
            return None
        responses, sampler_state = shared
        self.sampler.load_state_dict(sampler_state)  # only rank 0 knows how many prompts the step drew
        return responses

    def evaluate(self, step: int) -> None:
        """Evaluate the policy after this step (0: before training), except on sets that are already recorded.

        A request to stop ends the evaluation; the run then stops before its next step, and evaluates when it is
        continued.
        """

        def evaluate() -> None:
            assert self.evaluator is not None
            started = time.perf_counter()
            for evaluation in self.evaluator.evaluate(step, except_for=self.reporting.evaluated_sets(step)):
                shown = first_responses(evaluation.problems, self.reporting.config.observability.evaluation_responses)
                self.reporting.record_evaluation(evaluation.record, started, shown)
                started = time.perf_counter()

        with self.reporting.timeline.span("evaluate"):
            self.rollout.while_sampling(
                lambda: unless_stopped(self.stop, evaluate), lambda: self._recover(version=step + 1)
            )

    def _draw(self, count: int) -> list[Prompt]:
        """The next prompts to train on. Rank 0 only."""
        return [self.prompts[i] for i in self.sampler.next(count)]

    def _recover(self, version: int) -> None:
        """Restart lost engines during a batch, with the weights that they had."""
        # if a rank stopped in here, the others would wait for it
        with self.stop.deferred(), self.reporting.timeline.span("recover_engines"):
            self.device.push_weights(version)
            self.device.give_to_engine()


def unless_stopped(stop: StopSignal, work: Callable[[], Value]) -> Value | None:
    """The result of `work`, or None if a request to stop ended it."""
    try:
        with stop.interruptible():
            return work()
    except StopRequested:
        return None
