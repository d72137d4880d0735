"""Sampling parameters."""

from dataclasses import dataclass
from typing import Any

from megatron_dsrl.config.rollout import RolloutConfig


@dataclass(frozen=True)
class SamplingParameters:
    """Sampling parameters of one request, the only difference between sampling for training and for evaluation."""

    max_response_tokens: int
    """Length limit; a response that reaches it is marked `length`."""

    stop_token_ids: tuple[int, ...]
    """Tokens that end a response; the one that did is kept as its last token."""

    temperature: float = 1.0
    """0 is greedy decoding. Log-probs are `log_softmax(logits / temperature)`."""

    top_p: float = 1.0
    """Nucleus sampling; 1 is off. Log-probs are not renormalised."""

    top_k: int = -1
    """Top-k sampling; -1 is off."""

    return_routed_experts: bool = False
    """Whether to return the experts that every token was sent to."""

    @classmethod
    def for_training(cls, config: RolloutConfig, stop_token_ids: tuple[int, ...]) -> "SamplingParameters":
        """The sampling parameters of the `rollout` section."""
        return cls(
            max_response_tokens=config.max_response_tokens,
            stop_token_ids=stop_token_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            return_routed_experts=config.routing_replay,
        )

    def as_engine_request(self, max_new_tokens: int) -> dict[str, Any]:
        """SGLang's `sampling_params` for a response with at most `max_new_tokens` more tokens."""
        return {
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
