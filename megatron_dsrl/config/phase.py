"""A phase of training as data: which space, advantage, filter and loss hold until which step.

DSRL is two phases in a list: NSR-PreRL, then GRPO. What `space`, `advantage`, `filter`, `loss`, `aggregation` and
`importance_correction` can be is registered in `megatron_dsrl/algorithms`; each is a name with options beside it, or
the dotted path of your own class. A whole phase may be a custom class too, with its own fields and different settings
at every step (examples/own_algorithm).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.choices import ADVANTAGES, AGGREGATIONS, FILTERS, IMPORTANCE_CORRECTIONS, LOSSES, SPACES
from megatron_dsrl.config.registry import Options
from megatron_dsrl.config.section import CustomSection, Section

if TYPE_CHECKING:
    from megatron_dsrl.algorithms.advantages import AdvantageOptions
    from megatron_dsrl.algorithms.aggregations import AggregationOptions
    from megatron_dsrl.algorithms.filters import FilterOptions
    from megatron_dsrl.algorithms.importance import ImportanceCorrectionOptions
    from megatron_dsrl.algorithms.losses import LossOptions
    from megatron_dsrl.algorithms.spaces import Space
else:  # the registries import the algorithms, and torch with them, only when a choice is validated
    AdvantageOptions = Annotated[Options, ADVANTAGES]
    AggregationOptions = Annotated[Options, AGGREGATIONS]
    FilterOptions = Annotated[Options, FILTERS]
    ImportanceCorrectionOptions = Annotated[Options, IMPORTANCE_CORRECTIONS]
    LossOptions = Annotated[Options, LOSSES]
    Space = Annotated[Options, SPACES]

KLEstimator = Literal["k1", "k2", "k3"]

MAIN_OBJECTIVE = "policy"
"""Name of a phase's own objective in metrics."""


class KLConfig(Section):
    """Keep the policy near a reference policy. With d = log pi - log ref of a token, k1 is d, k2 is d^2 / 2, k3 is
    exp(-d) - 1 + d (Schulman, "Approximating KL divergence", 2020); `algorithms/divergence.py` says which of them give
    the gradient of the KL divergence."""

    loss_coefficient: float = Field(default=0.0, ge=0)
    """Factor on each token's KL estimate, which is added to the token's loss."""

    loss_estimator: KLEstimator = "k3"
    """Estimator in the loss; GRPO uses k3."""

    reward_coefficient: float = Field(default=0.0, ge=0)
    """Factor on each token's KL estimate, which is subtracted from the reward at that token."""

    reward_estimator: KLEstimator = "k1"
    """Estimator in the reward; PPO and REINFORCE++ use k1."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "KLConfig":
        if self.loss_coefficient == 0 and self.reward_coefficient == 0:
            raise ValueError("set loss_coefficient or reward_coefficient above 0, or the section to null")
        return self


class ObjectiveConfig(Section):
    """One term of the loss: what is updated, in which direction, and how tokens are weighed."""

    space: Space
    """Which log-probability is updated."""

    advantage: AdvantageOptions
    """How rewards become advantages."""

    filter: FilterOptions = Field(default_factory=partial(FILTERS.build, "all"))
    """Samples used for the update: all, A < 0 (NSR), or A > 0 (PSR). The others count in neither the loss nor its
    denominator."""

    drop_truncated: bool = False
    """Exclude responses that reached the length limit from the update (DAPO's overlong filtering). They still count
    when advantages compare samples."""

    loss: LossOptions = Field(default_factory=partial(LOSSES.build, "dual_clip"))
    """Policy loss of a token."""

    aggregation: AggregationOptions = Field(default_factory=partial(AGGREGATIONS.build, "token_mean"))
    """How token losses are reduced to one number."""

    coefficient: float = Field(default=1.0, gt=0)
    """Factor on the loss."""

    importance_correction: ImportanceCorrectionOptions | None = None
    """Weight token losses by the ratio of trainer to engine probabilities, for engines that sample from a slightly
    different policy than the trainer scores. Post-train space only; null: no correction. Left out, it is `truncated`
    with `engine.quantization`, with speculative decoding, and in asynchronous runs for a loss without a ratio
    (`policy_gradient`); otherwise it is null."""

    kl: KLConfig | None = None
    """KL divergence from the reference policy; null: no KL term, and no reference is kept."""

    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Factor on the entropy of every token's distribution, which is subtracted from the token's loss."""

    @model_validator(mode="after")
    def _compares_like_with_like(self) -> "ObjectiveConfig":
        if self.importance_correction is not None and not self.space.prompt_in_context:
            raise ValueError(
                "importance_correction compares trainer and engine log-probs, but in this space only the engine's are "
                "given the prompt; set it to null"
            )
        return self


class AdditionalObjectiveConfig(ObjectiveConfig):
    """Another term of a phase's loss, on the same samples."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Prefix of its metrics' names: lower-case letters, digits and `_`."""


class PhaseOptimizerConfig(Section):
    """Optimizer settings for a phase."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate during the phase; null: `optimizer.learning_rate`. Warm-up and decay scale it too."""

    gradient_clip_norm: float | None = Field(default=None, ge=0)
    """Gradient clipping during the phase, 0 for none; null: `optimizer.gradient_clip_norm`."""

    reset_state: bool = False
    """Reset Adam's moments and step count when the phase begins. By default they are kept across phases."""


class PhaseConfig(ObjectiveConfig):
    """One phase: an objective, and the step it lasts until."""

    type: str | None = None
    """Dotted path `package.module:Class` of your own phase, a subclass of PhaseConfig; the section then has its
    fields. null: PhaseConfig itself."""

    name: str
    """Shown in logs and plots."""

    until_step: int | None = Field(default=None, ge=1)
    """Last step of the phase, inclusive, counted from 1; null (last phase only): the end of training."""

    additional_objectives: list[AdditionalObjectiveConfig] = Field(default_factory=list)
    """Further losses added to the phase's own, each over its own samples and denominator."""

    optimizer: PhaseOptimizerConfig = Field(default_factory=PhaseOptimizerConfig)
    """Optimizer settings for this phase."""

    @property
    def objectives(self) -> dict[str, ObjectiveConfig]:
        """All terms of the loss by the first part of the names of their metrics, the phase's own first."""
        return {MAIN_OBJECTIVE: self, **{objective.name: objective for objective in self.additional_objectives}}

    def at(self, step: int) -> "PhaseConfig":
        """The phase as it applies to a step. Custom phases may return a different one for each step, but always the
        same for the same step. `step`, counted from 1, is one at which this phase is active."""
        return self

    @model_validator(mode="after")
    def _names_of_metrics_differ(self) -> "PhaseConfig":
        names = [MAIN_OBJECTIVE, *(objective.name for objective in self.additional_objectives)]
        if len(set(names)) < len(names):
            raise ValueError(f"the names of additional_objectives must differ from each other and `{MAIN_OBJECTIVE}`")
        return self


AnyPhase = Annotated[PhaseConfig, CustomSection("phase", PhaseConfig)]
"""A phase, or a custom one named by the dotted path in its `type`."""


@dataclass(frozen=True)
class PhaseSteps:
    """A phase of the configuration and its steps."""

    name: str
    first_step: int
    """Counted from 1."""
    last_step: int
    """Inclusive; below `first_step` for a phase that the run ends before."""
    forms: tuple[PhaseConfig, ...]
    """The distinct phases that `PhaseConfig.at` returns for the steps; at least one."""

    @property
    def steps(self) -> int:
        """Steps that the run spends in the phase."""
        return max(0, self.last_step - self.first_step + 1)


def phases_by_steps(phases: Sequence[PhaseConfig], steps: int) -> Iterator[PhaseSteps]:
    """Every phase of a run with this many steps, in order. Raises UserError if a custom phase fails at one of its
    steps, or returns something other than a phase."""
    first = 1
    for position, phase in enumerate(phases):
        last = steps if phase.until_step is None else min(phase.until_step, steps)
        forms = [_at(phase, step, position) for step in range(first, max(first, last) + 1)]
        yield PhaseSteps(phase.name, first, last, tuple({id(form): form for form in forms}.values()))
        first = max(first, last + 1)


def _at(phase: PhaseConfig, step: int, position: int) -> PhaseConfig:
    try:
        form = phase.at(step)
    except Exception as error:  # the user's own code
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"phases.{position}: {phase.type} fails at step {step}: {what}") from error
    if not isinstance(form, PhaseConfig):
        raise UserError(f"phases.{position}: {phase.type}.at({step}) returned {form!r}, expected a PhaseConfig")
    return form
