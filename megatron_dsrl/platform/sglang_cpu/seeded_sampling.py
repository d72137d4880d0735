"""Seeded sampling in SGLang on CPU: a token depends only on the distribution, the `sampling_seed` and the position.

SGLang offers this only with deterministic inference, which needs CUDA kernels: batch-invariant matrix products, and a
hash over the whole vocabulary for every token. Here a hash gives one uniform number per token, which selects the token
by inverting the cumulative distribution in float64. This is exact, faster than `torch.multinomial`, and changes only
the source of randomness.

Two parts of SGLang are changed. The sampler is registered with SGLang's `register_sampler_backend`. Seeds are part of
every request, but `SamplingBatchInfo.from_schedule_batch` drops them outside deterministic inference, so it is wrapped
to restore them; SGLang's own code then filters and merges them with the batch.
"""

import functools
import secrets
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from megatron_dsrl.platform.sglang_cpu.inverse_sampling import pick, uniform_numbers


class SeededSampler(Sampler):
    """SGLang's sampler with our choice of the token; temperature and log-probs are unchanged."""

    def _sample_from_probs(
        self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
    ) -> tuple[torch.Tensor, None]:
        """Sample one token per row of `probs`, [requests, vocabulary]; returns [requests] int32."""
        uniform = uniform_numbers(sampling_info.sampling_seed, positions)
        if simple_sampling_case:
            return pick(probs, uniform).to(torch.int32), None
        assert sampling_info.sampling_mask_batch_indices is None, "sampling masks are not supported with seeds"
        kept, tokens = _most_likely(probs, sampling_info)
        picked = pick(kept, uniform)
        return tokens.gather(1, picked[:, None])[:, 0].to(torch.int32), None


def _most_likely(probs: torch.Tensor, sampling_info: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in descending order, set to 0 outside top-k, top-p and min-p, and their tokens."""
    kept, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = kept.cumsum(dim=-1) - kept
    ranks = torch.arange(kept.shape[-1], device=kept.device)
    dropped = (ranks >= sampling_info.top_ks[:, None]) | (before > sampling_info.top_ps[:, None])
    if sampling_info.need_min_p_sampling:
        dropped |= kept < kept[:, :1] * sampling_info.min_ps[:, None]
    return kept.masked_fill(dropped, 0.0), tokens


def register() -> None:
    """Make `sampling_backend=pytorch` select the seeded sampler in this process, and pass it the seeds. Call it
    once."""
    register_sampler_backend("pytorch", SeededSampler)
    original = SamplingBatchInfo.from_schedule_batch

    @functools.wraps(original)
    def with_seeds(batch: Any, vocab_size: int) -> SamplingBatchInfo:
        info = original(batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor([secrets.randbits(63) if seed is None else seed for seed in seeds])
        return info

    SamplingBatchInfo.from_schedule_batch = staticmethod(with_seeds)
