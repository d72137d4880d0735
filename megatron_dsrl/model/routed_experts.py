"""Which experts an engine routed each token to, encoded as text for JSON and for sending between processes.

One byte per token, layer and choice, in this order, as base64. Compression would gain little: the choices of a balanced
router are nearly random.
"""

import base64

import numpy as np
import torch
from torch import Tensor

from megatron_dsrl.config.rollout import MAX_REPLAYED_EXPERTS


def encode_routed_experts(experts: np.ndarray) -> str:
    """Encode integers [tokens, layers, experts per token], or these flattened. Raises ValueError if one does not fit
    into a byte."""
    if experts.size and not 0 <= experts.min() <= experts.max() < MAX_REPLAYED_EXPERTS:
        raise ValueError(
            f"expert indices {experts.min()} to {experts.max()} are outside the range 0 to {MAX_REPLAYED_EXPERTS - 1}"
        )
    return base64.b64encode(experts.astype(np.uint8).tobytes()).decode("ascii")


def decode_routed_experts(text: str, layers: int, experts_per_token: int) -> Tensor:
    """uint8 [tokens, layers, experts per token] on the CPU. Raises ValueError if the length does not match a model with
    this number of layers and experts per token."""
    experts = torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
    if len(experts) % (layers * experts_per_token):
        raise ValueError(
            f"{len(experts)} routed experts are not a multiple of {layers} layers x {experts_per_token} experts per "
            "token; they were recorded with a different model"
        )
    return experts.view(-1, layers, experts_per_token)
