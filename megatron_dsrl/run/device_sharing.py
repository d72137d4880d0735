"""Trainer and engine on the same devices: which side owns device memory at each point of a step.

| moment | trainer on the device | engine on the device |
|---|---|---|
| sampling | what `actor.offload` leaves there | weights and KV cache |
| update | everything, and activations | nothing |
| weight push | the policy's weights, and what `actor.offload` leaves there | weights |

The order of the switches keeps the peak low. The engine releases its memory before the trainer returns. The trainer's
gradients and optimizer state leave before the engine takes back the memory of its weights; the trainer's weights leave
once they were pushed, and only then does the KV cache return. Checkpoints and exports are written from the device: in a
step with one, the trainer stays until it is written, and the peak is the engine's weights beside the whole trainer.
Only the gradients leave before a checkpoint, to make room for the optimizer state that Megatron gathers there.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.actor.offload import MODEL_PARTS, WITHOUT_CONTENT, ModelMemory, ModelPart
from megatron_dsrl.config.actor import OffloadConfig
from megatron_dsrl.observability.timeline import Span, no_span
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.rollout import Rollout

GIB = 2**30


class SharedDevice:
    """This rank's device. Methods are collective."""

    def __init__(
        self,
        offload: OffloadConfig,
        bucket_bytes: int,
        actor: Actor,
        critic: Critic | None,
        rollout: Rollout,
        span: Span = no_span,
    ) -> None:
        """`bucket_bytes` is the maximum size of a bucket of the weight push."""
        self._offloaded = offload.parts
        self._bucket_bytes = bucket_bytes
        self._actor = actor
        self._memory = [actor.model.memory] + ([critic.model.memory] if critic else [])
        self._rollout = rollout
        self._span = span
        self._metrics: dict[str, float] = {}

    def give_to_trainer(self) -> None:
        """Before an update or a checkpoint: release the engine's memory, and move the whole trainer to the device."""
        with self._measure("engine_sleep"):
            self._rollout.release_memory()
        self._onload([(memory, MODEL_PARTS) for memory in self._memory])

    def push_weights(self, version: int, trainer_stays: bool = False) -> None:
        """Give the engines the policy's weights; `give_to_engine` must follow. `trainer_stays`: whether gradients and
        optimizer state are still needed on the device."""
        if not trainer_stays:
            policy, *others = self._memory
            without_weights = [part for part in self._offloaded if part != "parameters"]
            self._offload([(policy, without_weights), *((memory, self._offloaded) for memory in others)])
        self._onload([(self._actor.model.memory, ["parameters"])])  # offloaded if an engine died while sampling
        current_platform().release_cached_memory()
        with self._measure("load_weights"):
            self._rollout.resume_weights()
            self._rollout.load_weights(lambda: self._actor.model.hf_weights(self._bucket_bytes), version)

    def make_room_for_checkpoint(self) -> None:
        """Before a checkpoint: free the gradients, which it does not contain."""
        self._offload([(memory, WITHOUT_CONTENT) for memory in self._memory])
        current_platform().release_cached_memory()

    def give_to_engine(self) -> None:
        """Before sampling: offload the trainer as configured, and take the KV cache's memory back."""
        self._offload([(memory, self._offloaded) for memory in self._memory])
        current_platform().release_cached_memory()
        with self._measure("engine_wake"):
            self._rollout.resume_kv_cache()

    def metrics(self) -> dict[str, float]:
        """The `memory/*` metrics of the switches since the last call; see `_measure`."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    @property
    def trainer_is_whole(self) -> bool:
        """Whether all parts of the models are on the device."""
        return not any(memory.away for memory in self._memory)

    def _offload(self, wanted: Iterable[tuple[ModelMemory, Collection[ModelPart]]]) -> None:
        parts = [(memory, [part for part in parts if part not in memory.away]) for memory, parts in wanted]
        if any(there for _, there in parts):
            with self._measure("offload"):
                moved = sum(memory.offload(there) for memory, there in parts)
            self._add("memory/offload_moved_gib", moved / GIB)

    def _onload(self, wanted: Iterable[tuple[ModelMemory, Collection[ModelPart]]]) -> None:
        parts = [(memory, [part for part in parts if part in memory.away]) for memory, parts in wanted]
        if any(away for _, away in parts):
            with self._measure("onload"):
                moved = sum(memory.onload(away) for memory, away in parts)
            self._add("memory/onload_moved_gib", moved / GIB)

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        """Measure the block as part of the switch `name`: `memory/<name>_seconds`, summed over blocks;
        `memory/<name>_gib`, what this process has on the device afterwards; `memory/<name>_peak_gib`, the most that it
        had there in between. The seconds are within those of a part of the step (`seconds/*`)."""
        platform = current_platform()
        platform.restart_peak_memory()
        started = time.perf_counter()
        with self._span(name):
            yield
        seconds, statistics = time.perf_counter() - started, platform.memory_statistics()
        self._add(f"memory/{name}_seconds", seconds)
        self._metrics[f"memory/{name}_gib"] = statistics.allocated_bytes / GIB
        peak = f"memory/{name}_peak_gib"
        self._metrics[peak] = max(self._metrics.get(peak, 0.0), statistics.recent_peak_bytes / GIB)

    def _add(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + value
