"""What tests read from actors and critics."""

import numpy as np
from numpy.typing import NDArray

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.critic import Critic


def weights_of(model: Actor | Critic) -> dict[str, NDArray[np.float32]]:
    """All weights in float32 by their HF names, in buckets that hold a few tensors only."""
    buckets = model.hf_weights(bucket_bytes=10_000)
    return {name: weight.float().cpu().numpy().copy() for bucket in buckets for name, weight in bucket}
