"""Sample a token from a distribution with one random number, derived from the sample's seed and the token's
position."""

import torch

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # constants of SplitMix64 (Steele, Lea and Flood 2014), as signed numbers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_UNIFORM_BITS = 48  # small enough that a uniform number times the total stays below the total in float64


def uniform_numbers(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[requests] float64 in [0, 1): outputs of SplitMix64, started from the mixed seed, at the positions. Seeds are
    [requests] int64, positions [requests] integers, at least 0."""
    mixed = _mix(_mix(seeds) + (positions.to(torch.int64) + 1) * _GOLDEN_GAMMA)  # int64 arithmetic wraps around
    return _shift_right(mixed, 64 - _UNIFORM_BITS).to(torch.float64) / 2**_UNIFORM_BITS


def pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[requests] int64 indices by inversion of the cumulative weights in float64. Weight 0 is never picked.

    Args:
        weights: [requests, entries], non-negative, not necessarily normalised, not all 0 in a row.
        uniform: [requests] float64 in [0, 1).
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
