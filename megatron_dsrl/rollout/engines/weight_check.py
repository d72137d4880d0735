"""Check that an engine holds exactly the weights that the trainer sent: digests of every tensor on every engine rank.

The trainer assembles the sent tensors as the engine stores them (`tensor_layout.py`) and digests the bytes;
SGLang's `/weights_checker` digests its own. This finds errors that a push alone cannot: tensors that the engine
ignored, misplaced or converted, and memory that was overwritten too early. It needs neither engine memory nor a second
push.

An engine with `engine.quantization` digests the matrices that its FP8 weights represent (`tensor_layout.py`). One that
stores its weights in another form by `engine.extra_arguments`, or whose kernels split or reorder experts, cannot be
compared like this: its digests always differ.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dsrl.common.collective import gather_within
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.common.stop_signals import run_interruptible
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.platform.engine import feed_forward_multiple
from megatron_dsrl.platform.weight_digest import weight_digest
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.tensor_layout import EngineLayout, as_the_engine_compares

NAMES_IN_MESSAGE = 8


class SentWeights:
    """Digests of the sent weights, as one rank of the engine must hold them."""

    def __init__(self, layout: EngineLayout, quantised: bool = False) -> None:
        """`layout` is that of this rank; `quantised`: the engine stores what is sent in FP8."""
        self._layout = layout
        self._quantised = quantised
        self._incomplete: dict[str, dict[int, Tensor]] = {}
        self._digests: dict[str, str] = {}
        self._hf_names: dict[str, list[str]] = {}

    def watch(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """Yield the same buckets, digesting each first. A tensor that is sent again replaces the earlier one."""
        for bucket in buckets:
            for name, tensor in bucket:
                stored = as_the_engine_compares(name, tensor.detach()) if self._quantised else tensor.detach()
                self._add(name, stored)
            yield bucket

    def differences(self, engine: Mapping[str, str]) -> list[str]:
        """The differences to this rank's digests by SGLang's tensor names, one line per tensor."""
        common = self._digests.keys() & engine
        wrong = [f"{self._named(name)} differs" for name in common if self._digests[name] != engine[name]]
        missing = [f"{self._named(name)} is not in the engine" for name in self._hf_names.keys() - engine.keys()]
        not_sent = [f"{name} of the engine was not sent completely" for name in engine.keys() - self._digests.keys()]
        return sorted(wrong) + sorted(missing) + sorted(not_sent)

    def _add(self, name: str, tensor: Tensor) -> None:
        place = self._layout.place(name)
        # A part that has to wait for others is copied: the bucket may be overwritten when the next one is taken.
        shard = self._layout.shard(name, tensor)
        parts = self._incomplete.setdefault(place.parameter, {})
        parts[place.part] = shard.clone() if place.parts > 1 else shard
        names = self._hf_names.setdefault(place.parameter, [])
        if name not in names:
            names.append(name)
        if len(parts) == place.parts:
            ordered = [parts[part] for part in range(place.parts)]
            self._digests[place.parameter] = weight_digest(torch.cat(ordered) if len(ordered) > 1 else ordered[0])
            del self._incomplete[place.parameter]

    def _named(self, parameter: str) -> str:
        names = self._hf_names[parameter]
        if names == [parameter]:
            return parameter
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{parameter} ({shown})"


class WeightCheck:
    """Decides when an engine's weights are compared, and compares them; one object per rank of the engine's group."""

    def __init__(self, config: RolloutSettings, group: ProcessGroup | None) -> None:
        """`group` is the gloo group of the ranks that share the engine; None for a single rank."""
        self._config = config
        self._group = group
        self._due = config.engine.check_weights != "never"
        self._sent: SentWeights | None = None

    def watch(self, buckets: Iterable[Bucket]) -> Iterable[Bucket]:
        """Wrap the buckets of a push; push the result instead. All ranks of the group call it."""
        self._due = any(gather_within(self._group, self._due))
        if not self._due:
            return buckets
        rank, size = (0, 1) if self._group is None else (self._group.rank(), self._group.size())
        architecture = read_architecture(resolve_model_folder(self._config.model.path))
        layout = EngineLayout(architecture, rank, size, feed_forward_multiple())
        self._sent = SentWeights(layout, self._config.engine.quantization is not None)
        return self._sent.watch(buckets)

    def mismatch(self, engine: EngineAddress | None) -> str | None:
        """Compare after a successful push, if due; a message that names the tensors that differ, or None.

        Is called and raises like `check_weights`.
        """
        if self._sent is None:
            return None
        sent, self._sent = self._sent, None
        problem = check_weights(sent, engine, self._group, self._config.engine.update_timeout_seconds)
        if problem is None:
            self._due = self._config.engine.check_weights == "always"
            return None
        url = gather_within(self._group, engine.url if engine is not None else None)[0]
        assert url is not None, "the first rank of a group knows its engine's URL"
        return mismatch_message(url, problem)

    def repeat(self) -> None:
        """Compare again after the next push, because the engine was restarted. It is enough that one rank calls it."""
        self._due = self._config.engine.check_weights != "never"


def check_weights(
    sent: SentWeights, engine: EngineAddress | None, group: ProcessGroup | None, timeout_seconds: float
) -> str | None:
    """Compare every rank of the engine with what was sent. All ranks of the engine's group call it together.

    Args:
        sent: what the engine rank with this rank's number in the group must hold.
        engine: None on all but the first rank of the group.
        group: gloo group of the ranks that share the engine; None for a single rank.

    Returns:
        None, or one line for every tensor that differs; the same on every rank of the group.

    Raises:
        EngineError: on every rank of the group, if the engine refused or is gone.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    answer = None if engine is None else run_interruptible(_engine_digests(engine, timeout_seconds))
    digests = gather_within(group, answer)[0]
    if isinstance(digests, str):
        raise EngineError(digests)
    assert digests is not None, "the first rank of a group knows its engine's URL"
    if wrong := wrong_number(digests, size):
        return wrong
    return lines_of_ranks(gather_within(group, sent.differences(digests[rank]))) or None


def wrong_number(digests: Sequence[Mapping[str, str]], ranks: int) -> str | None:
    """The problem if an engine did not return digests for each of its `ranks`; else None."""
    if len(digests) == ranks:
        return None
    return f"it returned digests of {counted(len(digests), 'rank')}, but {counted(ranks, 'rank')} got weights"


def lines_of_ranks(differences: Sequence[Sequence[str]]) -> str:
    """The first differences of each engine rank (see `SentWeights.differences`), one line each; empty without any."""
    lines = []
    for rank, wrong in enumerate(differences):
        lines += [f"engine rank {rank}: {difference}" for difference in wrong[:NAMES_IN_MESSAGE]]
        if len(wrong) > NAMES_IN_MESSAGE:
            lines.append(f"engine rank {rank}: and {len(wrong) - NAMES_IN_MESSAGE} more tensors")
    return "\n".join(lines)


def mismatch_message(engine_url: str, problem: str) -> str:
    """The error message for an engine with other weights. `problem`: see `lines_of_ranks`."""
    return (
        f"the engine at {engine_url} does not hold the weights that the trainer sent:\n{problem}\n"
        "Its samples would not come from the policy that is trained. If SGLang stores weights in another form "
        "(quantization, other expert kernels), set engine.check_weights to never."
    )


async def _engine_digests(engine: EngineAddress, timeout_seconds: float) -> list[dict[str, str]] | str:
    """The digests of every rank of the engine, or the error message."""
    async with EngineClient(engine, timeout_seconds) as client:
        try:
            return await client.weight_digests()
        except EngineError as error:
            return str(error)
