"""cuDNN's fused attention for packed rows, as Transformer Engine calls it, in PyTorch.

Sequences lie at the padded boundaries and have the lengths of the unpadded ones, where both are given. Statistics are
the logarithms of the softmax's denominators, [t, heads, 1] in float32, as of cuDNN 9.6.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fused_attn_bwd", "fused_attn_fwd"]

PADDING, PADDING_CAUSAL, PADDING_CAUSAL_BOTTOM_RIGHT = 1, 3, 5
"""Values of `NVTE_Mask_Type`."""
THD = 2
"""Value of `NVTE_QKV_Format.NVTE_THD`."""


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: int,
    o_format: int,
    qkv_scale_inv_format: int,
    bias_type: int,
    mask: int,
    softmax_type: int,
    window_size: Sequence[int],
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    """Output, statistics, and a random state that nothing uses."""
    assert dropout == 0 and int(o_format) == THD and int(bias_type) == 0 and int(softmax_type) == 0
    _check_lengths(cu_seqlens_q, max_seqlen_q)
    _check_lengths(cu_seqlens_kv, max_seqlen_kv)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    statistics = torch.zeros(*q.shape[:-1], 1)
    places = _sequences(cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
    for queries, keys in places:
        scores = _scores(q[queries], _repeated(k[keys], q), scale, int(mask))
        log_sums = scores.logsumexp(-1)
        weights = (scores - log_sums[..., None]).exp()
        out[queries] = torch.einsum("hqk,khd->qhd", weights, _repeated(v[keys], q)).to(q.dtype)
        statistics[queries] = log_sums.t()[..., None]
    return [out, statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    dropout: float,
    set_zero: bool,
    qkv_layout: int,
    o_format: int,
    do_format: int,
    dqkv_layout: int,
    qkv_scale_inv_format: int,
    do_scale_inv_format: int,
    bias_type: int,
    mask: int,
    softmax_type: int,
    window_size: Sequence[int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    fake_dtype: torch.dtype,
    auxiliary: Sequence[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *_: Any,
) -> list[Tensor | None]:
    """Gradients of queries, keys and values (and none of a bias and of a softmax offset).

    Uses the given output and statistics, which in ring attention are those of all keys, not of these alone.
    """
    grads = [torch.zeros_like(each) for each in (q, k, v)]
    places = _sequences(cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
    for queries, keys in places:
        all_keys, all_values = _repeated(k[keys], q), _repeated(v[keys], q)
        scores = _scores(q[queries], all_keys, scale, int(mask))
        weights = (scores - auxiliary[0][queries, :, 0].t()[..., None]).exp()
        given = grad[queries].float()
        of_weights = torch.einsum("qhd,khd->hqk", given, all_values)
        of_scores = weights * (of_weights - (given * out[queries].float()).sum(-1).t()[..., None]) * scale
        grads[0][queries] = torch.einsum("hqk,khd->qhd", of_scores, all_keys).to(q.dtype)
        grads[1][keys] = _summed(torch.einsum("hqk,qhd->khd", of_scores, q[queries].float()), k)
        grads[2][keys] = _summed(torch.einsum("hqk,qhd->khd", weights, given), v)
    return [*grads, None, None]


def _check_lengths(cu_seqlens: Tensor, limit: int) -> None:
    """The kernel would cut off a sequence longer than its stated maximum."""
    assert int(cu_seqlens.diff().max()) <= limit


def _sequences(
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q_padded: Tensor | None, kv_padded: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """Rows of every sequence's queries and keys."""
    q_starts = cu_seqlens_q if q_padded is None else q_padded
    kv_starts = cu_seqlens_kv if kv_padded is None else kv_padded
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_kv.diff().tolist(), strict=True)
    for q_start, kv_start, (q_length, kv_length) in zip(q_starts.tolist(), kv_starts.tolist(), lengths, strict=False):
        if q_length and kv_length:
            yield slice(q_start, q_start + q_length), slice(kv_start, kv_start + kv_length)


def _scores(q: Tensor, k: Tensor, scale: float, mask: int) -> Tensor:
    """[heads, queries, keys] in float32, minus infinity where the mask forbids it."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if mask == PADDING:
        return scores
    assert mask in (PADDING_CAUSAL, PADDING_CAUSAL_BOTTOM_RIGHT), mask
    later = len(k) - len(q) if mask == PADDING_CAUSAL_BOTTOM_RIGHT else 0
    allowed = torch.ones(len(q), len(k), dtype=torch.bool).tril(later)
    return scores.masked_fill(~allowed, float("-inf"))


def _repeated(groups: Tensor, q: Tensor) -> Tensor:
    """Keys or values [n, groups, d] for every query head, in float32."""
    return groups.float().repeat_interleave(q.shape[1] // groups.shape[1], dim=1)


def _summed(grads: Tensor, groups: Tensor) -> Tensor:
    """Gradients for every query head, summed over those that share a group."""
    return grads.unflatten(1, (groups.shape[1], -1)).sum(2).to(groups.dtype)
