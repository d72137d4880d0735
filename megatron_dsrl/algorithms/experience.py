"""From judged responses to what a model trains on: sequences in a space, then advantages, then the sample filter.

`build_experience` puts every sample of a rollout batch into a space. Passes of a model may then add what an algorithm
needs of it (old or reference log-probs, values; `passes.py` says which). `with_advantages` turns rewards into
advantages per token and drops the samples that the filter does not keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_dsrl.algorithms.divergence import kl_estimate
from megatron_dsrl.algorithms.spaces import ScoredSequence, Space
from megatron_dsrl.config.phase import KLConfig, ObjectiveConfig

PerToken = tuple[Tensor, ...]
"""Per sequence [num_scored] float32 on the CPU, aligned with its scored tokens."""


@dataclass(frozen=True)
class Response:
    """A judged response and the prompt that it was sampled from, reduced to what an algorithm needs."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    engine_log_probs: Sequence[float]
    """[len(response_ids)] log-probs that the engine sampled with, full prompt in context."""
    reward: float
    group: int
    """Number of the prompt within the rollout batch, from 0."""
    truncated: bool = False
    """It reached the length limit."""
    older_tokens: int = 0
    """How many of its tokens, all at the beginning, were produced by older weights than those that are updated now."""
    routed_experts: str | None = None
    """Experts that the engine sent its tokens and the prompt's to; see `routed_experts.decode_routed_experts`."""
    scored: Sequence[bool] | None = None
    """[len(response_ids)] which of its tokens are the policy's own and are scored; None: all of them."""


@dataclass(frozen=True)
class Experience:
    """The sequences of one or more optimizer steps, all data-parallel ranks together. Same on every rank."""

    sequences: tuple[ScoredSequence, ...]
    rewards: Tensor
    """[num_sequences] float32."""
    groups: Tensor
    """[num_sequences] int64: number of the prompt within the rollout batch."""
    engine_log_probs: PerToken
    """Of the policy that sampled, given the full prompt."""
    prompt_in_context: bool
    """Whether scored tokens are conditioned on the prompt, as the engine's were (post-train space)."""
    truncated: Tensor
    """[num_sequences] bool: the response reached the length limit."""
    from_older_weights: PerToken | None = None
    """1 for every scored token that older weights produced than those that are updated now, else 0. None: no token."""
    routed_experts: tuple[str, ...] | None = None
    """Experts to which the policy sends every token of each sequence but its last; see
    `routed_experts.decode_routed_experts`. None: its routers choose."""
    old_log_probs: PerToken | None = None
    """Under the policy before the update, on the same scored sequence. None where the update is strictly on-policy: the
    old log-prob is then the current one without gradient, and the ratio is 1."""
    reference_log_probs: PerToken | None = None
    """Under the reference policy, on the same scored sequence."""
    values: PerToken | None = None
    """Of a critic, before each scored token."""
    penalties: PerToken | None = None
    """What is taken off the reward at each scored token: the KL penalty."""
    advantages: PerToken | None = None
    returns: PerToken | None = None
    """What a critic should have said."""

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_scored(self) -> list[int]:
        """Scored tokens of every sequence."""
        return [sequence.num_scored for sequence in self.sequences]

    @property
    def sample_rewards(self) -> Tensor:
        """[num_sequences] float32: what each sample is worth in all, penalties of its tokens taken off."""
        if self.penalties is None:
            return self.rewards
        return self.rewards - _sums(self.penalties)

    @property
    def token_rewards(self) -> PerToken:
        """The reward at each scored token: the sample's at its last one, penalties taken off at each."""
        penalties = self.penalties or tuple(torch.zeros(count) for count in self.num_scored)
        rewards = tuple(-penalty for penalty in penalties)
        for of_tokens, of_sample in zip(rewards, self.rewards):
            of_tokens[-1:] += of_sample
        return rewards

    @property
    def sample_advantages(self) -> Tensor:
        """[num_sequences] float32: the sum over each sample's tokens."""
        assert self.advantages is not None, "with_advantages comes first"
        return _sums(self.advantages)

    def select(self, indices: Sequence[int]) -> "Experience":
        """The named sequences, in that order."""
        chosen = list(indices)

        def pick(value: object) -> object:
            if isinstance(value, Tensor):
                return value[chosen]
            return tuple(value[i] for i in chosen) if isinstance(value, tuple) else value

        return replace(self, **{field.name: pick(getattr(self, field.name)) for field in fields(self)})

    def mini_batches(self, count: int) -> list["Experience"]:
        """Split into `count` consecutive parts whose sizes differ by at most one sequence."""
        bounds = [len(self) * i // count for i in range(count + 1)]
        return [self.select(range(a, b)) for a, b in zip(bounds, bounds[1:])]


def concatenate_tokens(values: PerToken, indices: Sequence[int], device: torch.device) -> Tensor:
    """The scored tokens of the named sequences, one after the other: [S] float32 on the device."""
    return torch.cat([torch.zeros(0), *(values[i] for i in indices)]).to(device)


def build_experience(responses: Sequence[Response], space: Space, context_ids: Sequence[int] = ()) -> Experience:
    """Every response as a scored sequence of the space.

    Args:
        responses: the whole rollout batch, every group complete.
        space: where the log-probs that are updated live.
        context_ids: `space.context_text` in tokens.

    Raises:
        ValueError: if rewards are not finite, a response has not one log-prob per token, or some responses name the
            experts of their tokens and others do not.
    """
    rewards = torch.tensor([response.reward for response in responses], dtype=torch.float32)
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    sequences = tuple(
        space.sequence(response.prompt_ids, response.response_ids, context_ids, response.scored)
        for response in responses
    )
    return Experience(
        sequences=sequences,
        rewards=rewards,
        groups=torch.tensor([response.group for response in responses], dtype=torch.int64),
        engine_log_probs=tuple(map(_scored_log_probs, responses, sequences)),
        prompt_in_context=space.prompt_in_context,
        truncated=torch.tensor([response.truncated for response in responses], dtype=torch.bool),
        from_older_weights=_marks_of_older_tokens(responses, sequences),
        routed_experts=_routed_experts(responses) if space.prompt_in_context else None,
    )


def with_advantages(experience: Experience, objective: ObjectiveConfig) -> Experience:
    """Advantages over all samples, then only the samples that stay and that have a token to score.

    A sample that is dropped has a zero token mask, so it adds nothing to the loss or to its denominator; it is left out
    here instead of being computed and multiplied by zero.

    Args:
        experience: a whole rollout batch, with the results of the passes that `required_passes` names.
        objective: what is updated.
    """
    experience = estimate_advantages(experience, objective)
    keep = objective.filter.keep(experience) & (torch.tensor(experience.num_scored) > 0)
    if objective.drop_truncated:
        keep &= ~experience.truncated
    return experience.select(keep.nonzero().flatten().tolist())


def estimate_advantages(experience: Experience, objective: ObjectiveConfig) -> Experience:
    """Advantages, and returns where there is a critic, over all samples; nothing is dropped. See `with_advantages`."""
    if objective.kl is not None and objective.kl.reward_coefficient > 0:
        experience = replace(experience, penalties=kl_penalties(experience, objective.kl))
    estimate = objective.advantage.estimate(experience)
    return replace(experience, advantages=estimate.advantages, returns=estimate.returns)


def kl_penalties(experience: Experience, config: KLConfig) -> PerToken:
    """The KL divergence from the reference at each token, estimated before the update and times its coefficient."""
    assert experience.old_log_probs is not None and experience.reference_log_probs is not None, "see required_passes"
    return tuple(
        config.reward_coefficient * kl_estimate(old, reference, config.reward_estimator)
        for old, reference in zip(experience.old_log_probs, experience.reference_log_probs)
    )


def _sums(values: PerToken) -> Tensor:
    """[num_sequences] float32: the sum over each sequence's tokens."""
    return torch.tensor([value.sum().item() for value in values], dtype=torch.float32)


def _routed_experts(responses: Sequence[Response]) -> tuple[str, ...] | None:
    experts = tuple(response.routed_experts for response in responses if response.routed_experts is not None)
    if not experts:
        return None
    if len(experts) < len(responses):
        raise ValueError(f"only {len(experts)} of {len(responses)} responses say which experts their tokens went to")
    return experts


def _marks_of_older_tokens(responses: Sequence[Response], sequences: Sequence[ScoredSequence]) -> PerToken | None:
    if not any(response.older_tokens for response in responses):
        return None
    return tuple(
        sequence.of_scored((torch.arange(len(response.response_ids)) < response.older_tokens).float())
        for response, sequence in zip(responses, sequences, strict=True)
    )


def _scored_log_probs(response: Response, sequence: ScoredSequence) -> Tensor:
    """The engine's log-probs of the scored tokens."""
    if len(response.engine_log_probs) != len(response.response_ids):
        raise ValueError(
            f"{len(response.response_ids)} response tokens but {len(response.engine_log_probs)} engine log-probs"
        )
    return sequence.of_scored(torch.tensor(response.engine_log_probs, dtype=torch.float32))
