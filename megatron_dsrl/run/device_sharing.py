"""Trainer and engine on the same devices: who has the memory when, and what every change takes.

| moment | trainer on the device | engine on the device |
|---|---|---|
| sampling | what `actor.offload` leaves there | weights and KV cache |
| update | everything, and activations | nothing |
| weight push | the policy's weights, and what `actor.offload` leaves there | weights |

The order of the changes keeps the peak low: the engine lets go before the trainer comes back; the trainer's gradients
and optimizer state go before the engine takes the memory of its weights, its weights once they were pushed, and only
then does the KV cache come back. A checkpoint or an export is written from the device: before one the trainer stays
until it is written, and the peak of that step is the engine's weights beside the whole trainer.
"""

from collections.abc import Collection, Iterable
from contextlib import nullcontext

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.actor.offload import MODEL_PARTS, ModelMemory, ModelPart
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.observability.memory_switches import MemorySwitches
from megatron_dsrl.observability.timeline import Span
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.rollout import Rollout


class SharedDevice:
    """The device of this rank. Methods are collective over the ranks."""

    def __init__(
        self, config: RunConfig, actor: Actor, critic: Critic | None, rollout: Rollout, span: Span = nullcontext
    ):
        """
        Args:
            config: the run.
            actor: the policy.
            critic: trained beside it.
            rollout: the engines.
            span: records the switches in the timeline.
        """
        self._offloaded = config.actor.offload.parts
        self._bucket_bytes = config.engine.weight_bucket_megabytes * 2**20
        self._actor = actor
        self._memory = [actor.memory] + ([critic.memory] if critic else [])
        self._rollout = rollout
        self._switches = MemorySwitches(span)

    def give_to_trainer(self) -> None:
        """Before an update, or a checkpoint: the engine's memory is released, and the models are whole again."""
        with self._switches.measure("engine_sleep"):
            self._rollout.release_memory()
        self._onload([(memory, MODEL_PARTS) for memory in self._memory])

    def push_weights(self, version: int, trainer_stays: bool = False) -> None:
        """Give the engines the policy's weights; `give_to_engine` is to follow.

        Args:
            version: of the weights.
            trainer_stays: gradients and optimizer state are still needed on the device.
        """
        if not trainer_stays:
            policy, *others = self._memory
            without_weights = [part for part in self._offloaded if part != "parameters"]
            self._offload([(policy, without_weights), *((memory, self._offloaded) for memory in others)])
        self._onload([(self._actor.memory, ["parameters"])])  # away when an engine has died while sampling
        current_platform().release_cached_memory()
        with self._switches.measure("load_weights"):
            self._rollout.resume_weights()
            self._rollout.load_weights(lambda: self._actor.hf_weights(self._bucket_bytes), version)

    def give_to_engine(self) -> None:
        """Before sampling: what is to be offloaded goes, and the KV cache comes back."""
        self._offload([(memory, self._offloaded) for memory in self._memory])
        current_platform().release_cached_memory()
        with self._switches.measure("engine_wake"):
            self._rollout.resume_kv_cache()

    def metrics(self) -> dict[str, float]:
        """Seconds and memory of the switches since the last call; see `MemorySwitches`."""
        return self._switches.metrics()

    @property
    def trainer_is_whole(self) -> bool:
        """Whether all of the models is on the device."""
        return not any(memory.away for memory in self._memory)

    def _offload(self, wanted: Iterable[tuple[ModelMemory, Collection[ModelPart]]]) -> None:
        parts = [(memory, [part for part in parts if part not in memory.away]) for memory, parts in wanted]
        if any(there for _, there in parts):
            with self._switches.measure("offload"):
                moved = sum(memory.offload(there) for memory, there in parts)
            self._switches.count("offload", moved)

    def _onload(self, wanted: Iterable[tuple[ModelMemory, Collection[ModelPart]]]) -> None:
        parts = [(memory, [part for part in parts if part in memory.away]) for memory, parts in wanted]
        if any(away for _, away in parts):
            with self._switches.measure("onload"):
                moved = sum(memory.onload(away) for memory, away in parts)
            self._switches.count("onload", moved)
