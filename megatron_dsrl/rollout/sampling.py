"""How responses are sampled."""

from dataclasses import dataclass
from typing import Any

from megatron_dsrl.config.rollout import RolloutConfig


@dataclass(frozen=True)
class SamplingParameters:
    """Sampling parameters of one request. Training and evaluation differ in nothing else."""

    max_response_tokens: int
    """Length limit; a response that reaches it is marked `length`."""

    stop_token_ids: tuple[int, ...]
    """Tokens that end a response; they are kept as its last token."""

    temperature: float = 1.0
    """0 is greedy decoding. Log-probs are `log_softmax(logits / temperature)`."""

    top_p: float = 1.0
    """Nucleus sampling; 1 is off. The log-probs are not renormalised by it."""

    top_k: int = -1
    """Top-k sampling; -1 is off."""

    return_routed_experts: bool = False
    """Ask which experts every token went to."""

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
        """SGLang's `sampling_params` for a response of which so many tokens are missing at most."""
        return {
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
