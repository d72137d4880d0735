"""Experts for the tokens of sequences, as an engine would name them."""

from collections.abc import Sequence

import numpy as np

from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.model.routed_experts import encode_routed_experts


def random_experts(
    sequences: Sequence[ScoredSequence], layers: int, experts: int, experts_per_token: int, seed: int = 0
) -> tuple[str, ...]:
    """Different ones for every token but the last of each sequence, in every layer: what `Experience.routed_experts`
    holds."""
    random = np.random.default_rng(seed)
    return tuple(
        encode_routed_experts(
            random.random((len(sequence.token_ids) - 1, layers, experts)).argsort()[..., :experts_per_token]
        )
        for sequence in sequences
    )
