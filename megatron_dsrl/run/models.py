"""The models of a run: the policy, and the critic and the reference policy if a phase needs them.

Everything that a step does with them: the phase's settings, the forward passes that its objectives need, and the
updates of critic and policy. Every method is collective over the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor, build_critic
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.actor.reference import ReferencePolicy
from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.objective import build_objectives, estimate_advantages
from megatron_dsrl.algorithms.schedule import Schedule, passes_of_phase, required_passes
from megatron_dsrl.checkpoint.state import Checkpoint
from megatron_dsrl.checkpoint.store import StartWrite
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.waiting import waiting
from megatron_dsrl.config.actor import ReferenceConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import check_same_architecture, read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.observability.timeline import SecondsPerPart
from megatron_dsrl.rollout.served_reference import ServedReference

CRITIC_FOLDER = "critic"
REFERENCE_FOLDER = "reference"
"""Folders in checkpoints, beside the actor's."""


@dataclass(frozen=True)
class RunModels:
    """This rank's shards of the models."""

    config: RunConfig
    actor: Actor
    critic: Critic | None
    reference: ReferencePolicy | ServedReference | None

    def start_step(self, step: int) -> None:
        """Apply this step's optimizer settings and refresh the reference if due. Idempotent."""
        schedule, default = Schedule(self.config.phases), self.config.optimizer
        phase, starts = schedule.at(step), schedule.starts_phase(step)
        rate, clip = phase.optimizer.learning_rate, phase.optimizer.gradient_clip_norm
        self.actor.model.configure_optimizer(
            learning_rate=default.learning_rate if rate is None else rate,
            gradient_clip_norm=default.gradient_clip_norm if clip is None else clip,
        )
        if starts and phase.optimizer.reset_state:
            self.actor.model.reset_optimizer()
        if self.reference and reference_is_due(self.config.reference, step, starts):
            self.reference.refresh()

    def add_log_probs_and_values(
        self, phase: PhaseConfig, experiences: Sequence[Experience], timer: SecondsPerPart
    ) -> list[Experience]:
        """Each objective's experience with the log-probs and values that it needs, computed before the update."""
        completed = []
        for objective, experience in zip(phase.objectives.values(), experiences, strict=True):
            needed = required_passes(objective)
            if needed.old_log_probs:
                with timer.part("old_log_probs"):
                    experience = replace(experience, old_log_probs=self.actor.log_probs(experience))
            if needed.reference_log_probs:
                assert self.reference is not None
                with timer.part("reference"):
                    experience = replace(experience, reference_log_probs=self.reference.log_probs(experience))
            if needed.values:
                assert self.critic is not None
                with timer.part("values"):
                    experience = replace(experience, values=self.critic.values(experience))
            completed.append(experience)
        return completed

    def update_critic(
        self, phase: PhaseConfig, experiences: Sequence[Experience], timer: SecondsPerPart
    ) -> dict[str, float]:
        """Update the critic on every objective that uses its values. Returns metrics by full name."""
        metrics: dict[str, float] = {}
        for objective, experience in zip(phase.objectives.values(), experiences, strict=True):
            if required_passes(objective).values:
                assert self.critic is not None
                estimated = estimate_advantages(experience, objective)
                if estimated.returns is None:
                    raise UserError(
                        f"phase {phase.name}: its advantage {objective.advantage.name} takes a critic's values but "
                        "estimates no returns for it to learn from; return them in its AdvantageEstimate"
                    )
                with timer.part("critic"):
                    update = self.critic.update(estimated)
                metrics |= {f"critic/{name}": value for name, value in update.items()}
        return metrics

    def update_policy(
        self, step: int, phase: PhaseConfig, experiences: Sequence[Experience], timer: SecondsPerPart
    ) -> UpdateMetrics | None:
        """Take the step's optimizer steps; None if no sample is left to learn from, or only the critic is trained."""
        if self.critic and step <= self.config.critic.warmup_steps:
            return None
        actor = self.config.actor
        objectives = build_objectives(phase, experiences, self.config.rollout.max_response_tokens)
        if actor.optimizer_steps_per_rollout > 1:
            with timer.part("old_log_probs"):
                objectives = [self.actor.with_old_log_probs(objective) for objective in objectives]
        with timer.part("train"):
            return self.actor.update(objectives, actor.mini_batches_per_rollout, actor.epochs_per_rollout)

    def other_parts(self) -> dict[str, StartWrite]:
        """Checkpoint parts other than the actor. A reference with the initial weights is not saved, but read again."""
        parts: dict[str, StartWrite] = {}
        if self.critic:
            parts[CRITIC_FOLDER] = self.critic.model.start_save
        if self.reference and not self.reference.is_initial:
            parts[REFERENCE_FOLDER] = self.reference.start_save
        return parts

    def load(self, checkpoint: Checkpoint, same_layout: bool) -> None:
        """Restore the models from a checkpoint."""
        self.actor.model.load(checkpoint.weights_folder, same_layout)
        critic, reference = checkpoint.folder / CRITIC_FOLDER, checkpoint.folder / REFERENCE_FOLDER
        if self.critic and critic.exists():  # otherwise no phase needed it before the run got more steps
            self.critic.model.load(critic, same_layout)
        if self.reference and reference.exists():
            self.reference.load(reference)


def build_models(config: RunConfig, folder: Path) -> RunModels:
    """Build the policy, and the other models that the run's phases need, as they are before the first step. `folder` is
    the local one of `config.model.path`. Raises UserError like `build_actor` and `build_critic`."""
    schedule = Schedule(config.phases)
    passes = [passes_of_phase(schedule.at(step)) for step in range(1, config.steps + 1)]
    actor = build_actor(config, folder)
    steps_with_values = sum(needed.values for needed in passes)
    critic = build_critic(config, folder, steps_with_values) if steps_with_values else None
    reference = (
        build_reference(config.reference, actor, folder) if any(each.reference_log_probs for each in passes) else None
    )
    return RunModels(config, actor, critic, reference)


def build_reference(config: ReferenceConfig, actor: Actor, folder: Path) -> ReferencePolicy | ServedReference:
    """The reference policy with its initial weights. Raises UserError if its folder is missing or does not match the
    policy, or its server does not answer."""
    if config.url is not None:
        served = ServedReference(config)
        with waiting(f"trying the server of reference.url ({config.url})"):
            served.try_out()
        return served
    reference = ReferencePolicy(actor)
    if config.path is not None:
        reference_folder = resolve_model_folder(config.path, field="reference.path")
        check_same_architecture("reference.path", reference_folder, read_architecture(folder))
        reference.load_model(reference_folder)
    return reference


def reference_is_due(config: ReferenceConfig, step: int, starts_phase: bool) -> bool:
    """Whether the reference gets the policy's weights before this step."""
    if config.refresh_at_phase_switch and starts_phase:
        return True
    return config.refresh_every_steps is not None and step > 1 and (step - 1) % config.refresh_every_steps == 0
