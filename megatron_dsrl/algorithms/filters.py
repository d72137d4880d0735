"""Sample filters: which samples of a rollout batch are updated.

NSR keeps negative samples (A < 0), PSR positive ones (A > 0). A dropped sample leaves the numerator and the
denominator of the loss alike: its token mask is zero.
"""

from typing import Literal

import torch
from torch import Tensor


def keep_samples(advantages: Tensor, kind: Literal["all", "negative", "positive"]) -> Tensor:
    """Which samples stay, as a mask.

    Groups that are all right or all wrong have A = 0 under a group baseline and fall out of both NSR and PSR.

    Args:
        advantages: [num_samples] float.
        kind: `all`, `negative` (NSR) or `positive` (PSR).

    Returns:
        [num_samples] bool.
    """
    match kind:
        case "all":
            return torch.ones_like(advantages, dtype=torch.bool)
        case "negative":
            return advantages < 0
        case "positive":
            return advantages > 0
