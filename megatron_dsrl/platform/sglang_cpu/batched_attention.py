"""SGLang's `torch_native` attention with batched decoding.

The original decodes requests one by one in Python, which takes most of the time of a step with small models. Here all
requests of a batch share one call of `scaled_dot_product_attention`: keys and values are gathered up to the longest
request and masked. Prefill, sliding windows and cross attention use the original code.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


class BatchedTorchNativeBackend(TorchNativeAttnBackend):
    """The `torch_native` backend with one attention call per layer and decoding step."""

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        sliding_window_size: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Fill and return `output`, [requests, heads, head size], for `query` of the same shape.

        The caches are [slots, key-value heads, head size]; `req_to_token` maps [request slot, position] to a cache
        slot; `seq_lens`, [requests], counts the token that is being decoded.
        """
        if encoder_lens is not None or (sliding_window_size is not None and sliding_window_size > -1):
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                sliding_window_size=sliding_window_size,
                **options,
            )
        longest = int(seq_lens.max())
        positions = torch.arange(longest, device=query.device)
        visible = positions[None, :] < seq_lens[:, None]  # [requests, longest]
        # Positions after a request's end may refer to slots of earlier requests; slot 0 is SGLang's padding slot.
        slots = torch.where(visible, req_to_token[req_pool_indices, :longest], 0)
        keys = _gather(k_cache, slots).to(query.dtype)
        values = _gather(v_cache, slots).to(query.dtype)
        # Query heads that share a key-value head become query positions, so GQA needs no repetition.
        requests, heads, head_size = query.shape
        grouped = query.reshape(requests, k_cache.shape[1], heads // k_cache.shape[1], head_size)
        attended = scaled_dot_product_attention(
            grouped, keys, values, attn_mask=visible[:, None, None, :], scale=scaling
        )
        output.copy_(attended.reshape(output.shape))
        return output


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[slots, heads, head size] and [requests, positions] -> [requests, heads, positions, head size]."""
    rows = cache.flatten(1).index_select(0, slots.flatten())  # much faster on CPU than indexing with `slots`
    return rows.view(*slots.shape, *cache.shape[1:]).transpose(1, 2)


def register() -> None:
    """Make `attention_backend=torch_native` select the batched backend in this process."""
    register_attention_backend("torch_native")(BatchedTorchNativeBackend)
