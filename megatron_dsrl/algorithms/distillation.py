"""On-policy distillation: the student's own samples, scored by a teacher, token by token."""

from typing import ClassVar, Literal

from pydantic import Field

from megatron_dsrl.algorithms.advantages import AdvantageEstimate, AdvantageOptions
from megatron_dsrl.algorithms.experience import Experience, ModelPasses
from megatron_dsrl.config.choices import ADVANTAGES


@ADVANTAGES.register
class Distillation(AdvantageOptions):
    """A = log p_teacher - log p_student at each token: the negative of the sampled reverse KL divergence, as in
    on-policy distillation (arXiv 2306.13649). The teacher is the reference policy: `reference.path` or `reference.url`.
    Rewards have no effect."""

    name: Literal["distillation"] = "distillation"
    needs: ClassVar[ModelPasses] = ModelPasses(old_log_probs=True, reference_log_probs=True)
    ignores_penalties: ClassVar[bool] = True

    clip: float | None = Field(default=None, gt=0)
    """Limit of |A|, in nat; null: none."""

    def estimate(self, experience: Experience) -> AdvantageEstimate:
        teacher, student = experience.reference_log_probs, experience.old_log_probs
        assert teacher is not None and student is not None, "see needs"
        gaps = tuple(theirs - ours for theirs, ours in zip(teacher, student, strict=True))
        if self.clip is not None:
            gaps = tuple(gap.clamp(-self.clip, self.clip) for gap in gaps)
        return AdvantageEstimate(gaps)
