"""What an advantage is: options from the configuration, and a method that estimates.

Subclass `AdvantageOptions` for one of your own and name it by its dotted path; examples/own_algorithm shows how.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience, PerToken
from megatron_dsrl.algorithms.passes import ModelPasses
from megatron_dsrl.config.registry import Options


@dataclass(frozen=True)
class AdvantageEstimate:
    """How much better every scored token was than expected."""

    advantages: PerToken
    returns: PerToken | None = None
    """What a critic should have said before each token; None where no critic is trained."""

    @classmethod
    def of_samples(cls, advantages: Tensor, experience: Experience) -> "AdvantageEstimate":
        """The same advantage for all tokens of a sample, from [num_sequences] float32."""
        return cls(expand_to_tokens(advantages, experience.num_scored))


class AdvantageOptions(Options):
    """Base of advantages: the fields are the options, `estimate` computes."""

    needs: ClassVar[ModelPasses] = ModelPasses()
    """Passes of a model that `estimate` reads the results of."""

    compares_samples: ClassVar[bool] = False
    """Whether it says nothing about a sample without others of the same prompt."""

    ignores_penalties: ClassVar[bool] = False
    """Whether a KL penalty in the reward would have no effect on it."""

    @abstractmethod
    def estimate(self, experience: Experience) -> AdvantageEstimate:
        """Advantages of a whole rollout batch, every group complete, before any filter.

        Read rewards from `experience.sample_rewards` or `experience.token_rewards`: a KL penalty is in them.
        """


def expand_to_tokens(values: Tensor, num_scored: Sequence[int]) -> PerToken:
    """[num_sequences] numbers, each repeated for the scored tokens of its sequence."""
    return tuple(value.expand(count) for value, count in zip(values, num_scored))
