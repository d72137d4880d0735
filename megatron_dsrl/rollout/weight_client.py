"""HTTP calls to one SGLang server about the weights it holds, beyond those of an ordinary push."""

from typing import Any

from megatron_dsrl.rollout.client import EngineClient, EngineError


class WeightClient(EngineClient):
    """Used as its base class."""

    async def weight_digests(self) -> list[dict[str, str]]:
        """Of every tensor-parallel rank in order, SGLang's digest of each of its tensors by SGLang's names.

        See platform/weight_digest.py for what a digest is.

        Raises:
            EngineError: the engine has no such check (before SGLang 0.5.23), refused, or is gone.
        """
        answer = await self._ask("/weights_checker", {"action": "checksum", "selector": "target"})
        ranks = sorted(answer["ranks"], key=lambda each: each["parallelism_info"][0]["rank"])
        return [rank["checksums"] for rank in ranks]

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._post(path, body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineError(f"engine {self.url} refused {path}: {answer!r:.2000}")
        return answer
