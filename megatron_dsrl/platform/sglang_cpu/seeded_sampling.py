"""Seeded sampling in SGLang on CPU: a token depends on the distribution, the sample's `sampling_seed` and its position.

SGLang has this only as a part of its deterministic inference, which needs CUDA kernels: batch-invariant matrix
products, and a hash of the whole vocabulary for every token. Here the hash gives one uniform number per token, which
picks the token by inverting the cumulative distribution in float64. That is exact, costs less than
`torch.multinomial`, and changes nothing but where the random number comes from.

Two places of SGLang are concerned. The sampler is registered by SGLang's own `register_sampler_backend`. The seeds are
in every request, but `SamplingBatchInfo.from_schedule_batch` drops them outside deterministic inference: it is wrapped
and puts them back; SGLang's own code then filters and merges them with the batch.
"""

import functools
import secrets
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from megatron_dsrl.platform.sglang_cpu.inverse_sampling import pick, uniform_numbers


class SeededSampler(Sampler):
    """SGLang's sampler with its choice of the token replaced; temperature and log-probs stay the original's."""

    def _sample_from_probs(
        self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
    ) -> tuple[torch.Tensor, None]:
        """One token per row of `probs`, [requests, vocabulary], which sums to 1. Returns int32 [requests]."""
        uniform = uniform_numbers(sampling_info.sampling_seed, positions)
        if simple_sampling_case:
            return pick(probs, uniform).to(torch.int32), None
        assert sampling_info.sampling_mask_batch_indices is None, "sampling masks are not supported with seeds"
        kept, tokens = _most_likely(probs, sampling_info)
        picked = pick(kept, uniform)
        return tokens.gather(1, picked[:, None])[:, 0].to(torch.int32), None


def _most_likely(probs: torch.Tensor, sampling_info: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in descending order, those outside top-k, top-p or min-p set to 0, and their tokens."""
    kept, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = kept.cumsum(dim=-1) - kept
    ranks = torch.arange(kept.shape[-1], device=kept.device)
    dropped = (ranks >= sampling_info.top_ks[:, None]) | (before > sampling_info.top_ps[:, None])
    if sampling_info.need_min_p_sampling:
        dropped |= kept < kept[:, :1] * sampling_info.min_ps[:, None]
    return kept.masked_fill(dropped, 0.0), tokens


def register() -> None:
    """Make `sampling_backend=pytorch` mean the seeded sampler in this process, and give it the seeds. Call it once."""
    register_sampler_backend("pytorch", SeededSampler)
    original = SamplingBatchInfo.from_schedule_batch

    @functools.wraps(original)
    def with_seeds(batch: Any, vocab_size: int) -> SamplingBatchInfo:
        info = original(batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor([secrets.randbits(63) if seed is None else seed for seed in seeds])
        return info

    SamplingBatchInfo.from_schedule_batch = staticmethod(with_seeds)
