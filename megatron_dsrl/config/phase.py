"""A phase of training as data: which space, advantage, filter and loss hold until which step.

DSRL is two phases in a list: NSR-PreRL, then GRPO.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_dsrl.config.section import Section


class PostTrainSpaceConfig(Section):
    """Update log P(y|x): the scored sequence is prompt + response."""

    name: Literal["post_train"] = "post_train"


class PreTrainSpaceConfig(Section):
    """Update log P(y): the scored sequence is BOS + response; no token of the prompt is in the context."""

    name: Literal["pre_train"] = "pre_train"

    bos: Literal["im_start", "none", "assistant"] = "im_start"
    """`im_start`: the token `<|im_start|>`. `none`: no BOS, the first response token is context and unscored.
    `assistant`: the tokens of `<|im_start|>assistant\\n`."""


class GroupMeanAdvantageConfig(Section):
    """A = r - mean of the group."""

    name: Literal["group_mean"] = "group_mean"


class GroupStandardisedAdvantageConfig(Section):
    """A = (r - mean) / (std + eps), the unbiased standard deviation of the group (GRPO)."""

    name: Literal["group_standardised"] = "group_standardised"

    eps: float = Field(default=1e-6, gt=0)
    """Added to the standard deviation."""


class DualClipLossConfig(Section):
    """PPO's clipped surrogate with the dual clip for negative advantages."""

    name: Literal["dual_clip"] = "dual_clip"

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""

    clip_high: float = Field(default=0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high."""

    dual_clip: float = Field(default=10.0, gt=1)
    """c: for A < 0 the loss of a token is at most -A c."""


class PhaseConfig(Section):
    """One phase."""

    name: str
    """Shown in logs and plots."""

    until_step: int | None = Field(default=None, ge=1)
    """Last step of the phase, inclusive, counted from 1; null (last phase only) is the end of training."""

    space: Annotated[PostTrainSpaceConfig | PreTrainSpaceConfig, Field(discriminator="name")]
    """Which log-probability is updated."""

    advantage: Annotated[
        GroupMeanAdvantageConfig | GroupStandardisedAdvantageConfig, Field(discriminator="name")
    ]
    """How rewards become advantages."""

    filter: Literal["all", "negative", "positive"] = "all"
    """Samples that are updated: all, A < 0 (NSR), or A > 0 (PSR). It acts on the token mask and its denominator."""

    loss: DualClipLossConfig = Field(default_factory=DualClipLossConfig)
    """Policy loss."""

    coefficient: float = Field(default=1.0, gt=0)
    """Factor on the loss."""
