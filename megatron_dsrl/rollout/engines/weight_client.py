"""HTTP calls for an SGLang server's weights that a push from the same device does not need: broadcasts and digests."""

from collections.abc import Sequence

from megatron_dsrl.rollout.engines.broadcast_group import BroadcastGroup
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError


class WeightClient(EngineClient):
    """An `EngineClient` with the calls for weight broadcasts and digests."""

    async def weight_digests(self) -> list[dict[str, str]]:
        """For every tensor-parallel rank in order, SGLang's digests of its tensors, by SGLang's names.

        See platform/weight_digest.py for the definition of a digest.

        Raises:
            EngineError: the engine has no such check (before SGLang 0.5.23), refused, or is gone.
        """
        answer = await self._post_checked("/weights_checker", {"action": "checksum", "selector": "target"})
        ranks = sorted(answer["ranks"], key=lambda each: each["parallelism_info"][0]["rank"])
        return [rank["checksums"] for rank in ranks]

    async def pause(self) -> None:
        """Stop sampling. Running requests stay in the server and give up their cache; new ones wait.

        They go on after `resume`, with the weights that the server then has, from prompt and tokens that are computed
        again. (SGLang's mode `in_place` would keep the cache, which the old weights have made.)
        """
        await self._post("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        """Sample again after `pause`; no effect on a server that is not paused."""
        await self._post("/continue_generation", {})

    async def tensor_parallel_size(self) -> int:
        """Number of ranks of the server."""
        answer = await self._request("GET", "/server_info", None, self._timeout_seconds)
        if not isinstance(answer, dict) or not isinstance(answer.get("tp_size"), int):
            raise EngineError(f"engine {self.url}: /server_info has no tp_size: {answer!r:.500}")
        return answer["tp_size"]

    async def join(self, group: BroadcastGroup) -> None:
        """Have all ranks of the server join; returns once they and the sender have joined."""
        body = {
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": 1,
            "world_size": group.size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._post_checked("/init_weights_update_group", body)

    async def leave(self, group_name: str) -> None:
        """Have all ranks of the server leave the group."""
        await self._post_checked("/destroy_weights_update_group", {"group_name": group_name})

    async def receive_weights(
        self, group_name: str, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> None:
        """Load one bucket that the sender broadcasts at the same time, and drop all cached prefixes.

        Args:
            group_name: a group that the server has joined.
            names: HF names of the tensors, which are concatenated without gaps.
            dtypes: attribute names in `torch`, such as `bfloat16`.
            shapes: shapes of the full tensors.
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        await self._post_checked("/update_weights_from_distributed", body)
