"""The order in which trainer and engine give and take the device's memory, written out call by call.

On CPU release and resume return before they reach an engine, so a run on CPU cannot show a wrong order.
"""

from collections.abc import Collection
from types import SimpleNamespace

import pytest

from megatron_dsrl.config.actor import OffloadConfig
from megatron_dsrl.run.device_sharing import SharedDevice

EVERYTHING = ("gradients", "optimizer", "parameters")
WAKE = ["resume weights", "load weights of version 7", "resume KV cache"]


class RecordedMemory:
    """Memory of one model: notes what is moved, and knows what is away."""

    def __init__(self, model: str, calls: list[str]) -> None:
        self.model, self.calls = model, calls
        self.away: list[str] = []

    def offload(self, parts: Collection[str]) -> int:
        assert not set(parts) & set(self.away)
        self.away += parts
        self._note("offload", parts)
        return 0

    def onload(self, parts: Collection[str]) -> int:
        assert set(parts) <= set(self.away)
        self.away = [part for part in self.away if part not in parts]
        self._note("onload", parts)
        return 0

    def _note(self, what: str, parts: Collection[str]) -> None:
        if parts:  # of several models one may have nothing to move
            self.calls.append(f"{what} {self.model}: {' '.join(parts)}")


class RecordedRollout:
    """Notes the calls that reach the engines, and that the policy's weights are on the device while they are read."""

    def __init__(self, policy: RecordedMemory, calls: list[str]) -> None:
        self.policy, self.calls = policy, calls

    def release_memory(self) -> None:
        self.calls.append("release engine")

    def resume_weights(self) -> None:
        self.calls.append("resume weights")

    def load_weights(self, buckets, version: int) -> None:
        assert "parameters" not in self.policy.away
        self.calls.append(f"load weights of version {version}")

    def resume_kv_cache(self) -> None:
        self.calls.append("resume KV cache")


class Recorded:
    """A shared device whose collaborators note what it asks of them."""

    def __init__(self, offloaded: Collection[str], with_critic: bool = False) -> None:
        self._calls: list[str] = []
        policy, critic = (RecordedMemory(model, self._calls) for model in ("policy", "critic"))
        self.device = SharedDevice(
            OffloadConfig(**dict.fromkeys(offloaded, True)),
            2**20,
            SimpleNamespace(model=SimpleNamespace(memory=policy)),
            SimpleNamespace(model=SimpleNamespace(memory=critic)) if with_critic else None,
            RecordedRollout(policy, self._calls),
        )

    def calls(self) -> list[str]:
        """Calls since the last time."""
        calls, self._calls[:] = list(self._calls), []
        return calls

    def start(self) -> list[str]:
        """As run_steps begins: the engines have released their memory, the models are whole."""
        self.device.push_weights(version=7)
        self.device.give_to_engine()
        return self.calls()

    def step(self) -> list[str]:
        self.device.give_to_trainer()
        assert self.device.trainer_is_whole
        self.device.push_weights(version=7)
        self.device.give_to_engine()
        return self.calls()

    def step_with_checkpoint(self) -> list[str]:
        self.device.give_to_trainer()
        self.device.push_weights(version=7, trainer_stays=True)
        assert self.device.trainer_is_whole
        self.device.make_room_for_checkpoint()
        self.device.give_to_engine()
        return self.calls()

    def recover(self) -> list[str]:
        """As when an engine has died while sampling."""
        self.device.push_weights(version=7)
        self.device.give_to_engine()
        return self.calls()


def test_without_offload_only_the_engine_moves() -> None:
    recorded = Recorded(offloaded=())
    assert recorded.start() == WAKE
    assert recorded.step() == ["release engine", *WAKE]
    assert recorded.step_with_checkpoint() == ["release engine", *WAKE[:2], "offload policy: gradients", WAKE[2]]
    assert recorded.step() == ["release engine", "onload policy: gradients", *WAKE]
    assert recorded.recover() == WAKE


def test_with_offload_the_weights_stay_until_the_engine_has_them_and_the_cache_comes_last() -> None:
    recorded = Recorded(EVERYTHING)
    give_way = [
        "offload policy: gradients optimizer",
        "resume weights",
        "load weights of version 7",
        "offload policy: parameters",
        "resume KV cache",
    ]
    whole_again = ["release engine", "onload policy: parameters gradients optimizer"]
    assert recorded.start() == give_way
    assert recorded.step() == [*whole_again, *give_way]
    assert recorded.step() == [*whole_again, *give_way], "every step alike"


def test_before_a_checkpoint_the_trainer_stays_until_it_is_written() -> None:
    recorded = Recorded(EVERYTHING)
    recorded.start()
    assert recorded.step_with_checkpoint() == [
        "release engine",
        "onload policy: parameters gradients optimizer",
        "resume weights",
        "load weights of version 7",
        "offload policy: gradients",
        "offload policy: optimizer parameters",
        "resume KV cache",
    ]


def test_a_lost_engine_gets_the_weights_back_alone() -> None:
    recorded = Recorded(EVERYTHING)
    recorded.start()
    assert recorded.recover() == [
        "onload policy: parameters",
        "resume weights",
        "load weights of version 7",
        "offload policy: parameters",
        "resume KV cache",
    ]


def test_everything_offloaded_of_the_critic_leaves_before_the_weights_are_pushed() -> None:
    recorded = Recorded(EVERYTHING, with_critic=True)
    give_way = [
        "offload policy: gradients optimizer",
        "offload critic: gradients optimizer parameters",
        "resume weights",
        "load weights of version 7",
        "offload policy: parameters",
        "resume KV cache",
    ]
    assert recorded.start() == give_way
    whole_again = [f"onload {model}: parameters gradients optimizer" for model in ("policy", "critic")]
    assert recorded.step() == ["release engine", *whole_again, *give_way]


@pytest.mark.parametrize("part", EVERYTHING)
def test_a_part_alone(part) -> None:
    """Gradients and optimizer state go before the push, weights after it."""
    recorded = Recorded([part])
    offload, push = f"offload policy: {part}", WAKE[:2]
    give_way = [*push, offload, WAKE[2]] if part == "parameters" else [offload, *WAKE]
    assert recorded.start() == give_way
    assert recorded.step() == ["release engine", f"onload policy: {part}", *give_way]
