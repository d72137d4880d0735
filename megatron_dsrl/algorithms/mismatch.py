"""How far the trainer's log-probs are from the engine's, which sampled with what should be the same policy."""

import torch
from torch import Tensor


def log_prob_gap(trainer_log_probs: Tensor, engine_log_probs: Tensor) -> Tensor:
    """|trainer - engine| of every token, nat.

    Args:
        trainer_log_probs: [num_tokens] float32, under the policy before the update.
        engine_log_probs: [num_tokens] float32.
    """
    return (trainer_log_probs.detach() - engine_log_probs).abs().to(torch.float32)
