"""The critic's loss, and how good its values were."""

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import TokenLosses


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> TokenLosses:
    """Squared error to the return, clipped as the reference implementation of PPO (arXiv 1707.06347) does.

    l = max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2: a value that has moved further than c towards its
    return has no gradient any more. The metric `clip_fraction` marks the tokens where the second term is larger.

    Args:
        values: [num_tokens] float32, differentiable.
        old_values: [num_tokens] before the update.
        returns: [num_tokens].
        clip: c; None leaves the first term alone.
    """
    errors = (values - returns).square()
    if clip is None:
        return TokenLosses(0.5 * errors, {"clip_fraction": torch.zeros_like(errors)})
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (near - returns).square()
    return TokenLosses(0.5 * torch.maximum(errors, clipped), {"clip_fraction": clipped > errors})


def value_statistics(experience: Experience) -> dict[str, float]:
    """How the values before an update compare with the returns, over all tokens of the global batch.

    Explained variance is 1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that knows only the mean, negative
    for a worse one; 0 where the returns are all equal.

    Args:
        experience: with values and returns, and at least one scored token.
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
