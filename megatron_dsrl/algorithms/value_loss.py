"""The critic's loss, and statistics of how accurate its values are."""

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import TokenLosses


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> TokenLosses:
    """Squared error to the return, clipped as in the reference implementation of PPO (arXiv 1707.06347).

    l = max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2: a value that has moved more than c towards its
    return gets no further gradient. The metric `clip_fraction` marks tokens where the second term is larger.

    Args:
        values: [num_tokens] float32, differentiable.
        old_values: [num_tokens] before the update.
        returns: [num_tokens].
        clip: c; None for the unclipped first term only.
    """
    errors = (values - returns).square()
    if clip is None:
        return TokenLosses(0.5 * errors, {"clip_fraction": torch.zeros_like(errors)})
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (near - returns).square()
    return TokenLosses(0.5 * torch.maximum(errors, clipped), {"clip_fraction": clipped > errors})


def value_statistics(experience: Experience) -> dict[str, float]:
    """Compare the values before an update with the returns, over all tokens of the global batch.

    Explained variance is 1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that predicts the mean, negative
    for a worse one; 0 if all returns are equal.

    Args:
        experience: has values and returns, and at least one scored token.
    """
    assert experience.values is not None and experience.returns is not None
    values, returns = torch.cat(experience.values).double(), torch.cat(experience.returns).double()
    variance = returns.var(correction=0)
    unexplained = (returns - values).var(correction=0)
    return {
        "mean_value": values.mean().item(),
        "mean_return": returns.mean().item(),
        "explained_variance": (1 - unexplained / variance).item() if variance > 0 else 0.0,
    }
