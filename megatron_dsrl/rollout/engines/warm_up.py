"""Requests that have a new engine compile its kernels."""

from dataclasses import replace

from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.generation import SampleRequest
from megatron_dsrl.rollout.sample import SamplingParameters

WARM_UP_REQUESTS = 4
PROMPT_TOKENS = 16
NEW_TOKENS = 8


def kinds_of_requests(return_routed_experts: bool) -> list[SamplingParameters]:
    """Sampling parameters that take different kernels: all tokens, the most likely one, and a part of them."""
    plain = SamplingParameters(NEW_TOKENS, stop_token_ids=(), return_routed_experts=return_routed_experts)
    return [plain, replace(plain, temperature=0.0), replace(plain, top_p=0.9, top_k=20)]


async def warm_up(address: EngineAddress, return_routed_experts: bool, timeout_seconds: float) -> None:
    """Sample a few tokens in every way in which training and evaluation may sample.

    An engine compiles kernels when it first needs them, which takes minutes where nothing is cached. Its scheduler
    answers nothing meanwhile, and during sampling that would count as a hang.

    `timeout_seconds` limits each kind of request. Raises EngineError if the engine refuses one, is gone, or too slow.
    """
    prompt = tuple(range(1, PROMPT_TOKENS + 1))
    requests = [SampleRequest(prompt, seed=number, max_new_tokens=NEW_TOKENS) for number in range(WARM_UP_REQUESTS)]
    async with EngineClient(address, timeout_seconds) as client:
        for sampling in kinds_of_requests(return_routed_experts):
            await client.generate(requests, sampling, timeout_seconds)
