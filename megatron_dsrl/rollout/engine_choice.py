"""Which engine gets the next prompt: the one with the fewest outstanding tokens.

A group counts as the tokens that it will occupy: its prompt once, since its samples share it, and the expected rest of
every unfinished response. The expected length is the mean of the batch's finished responses, or the length limit until
there are any.
"""

from collections.abc import Container
from dataclasses import dataclass

from megatron_dsrl.rollout.unfinished import UnfinishedGroup


@dataclass(frozen=True)
class Load:
    """The load that a call puts on its engine."""

    samples: int
    tokens: float


@dataclass
class EngineChoice:
    """Tracks the outstanding work of every engine and chooses the next one."""

    num_engines: int
    max_outstanding_samples: int
    """Samples that one engine holds at a time. An idle engine takes any call."""
    max_response_tokens: int
    lost: Container[int] = ()
    """Engines that must not be chosen; the caller may add to it."""

    def __post_init__(self) -> None:
        self._samples = [0] * self.num_engines
        self._tokens = [0.0] * self.num_engines
        self._finished_responses = 0
        self._finished_tokens = 0

    @property
    def expected_response_tokens(self) -> float:
        """Expected response length: the mean so far, or the limit until there is one."""
        if self._finished_responses == 0:
            return self.max_response_tokens
        return self._finished_tokens / self._finished_responses

    def load_of(self, groups: list[UnfinishedGroup]) -> Load:
        """The load of a call with these groups."""
        tokens = 0.0
        for group in groups:
            tokens += len(group.prompt.token_ids)
            for response in group.responses:
                if response.finish_reason is None:
                    tokens += max(1.0, self.expected_response_tokens - len(response.response_ids))
        return Load(sum(group.num_unfinished for group in groups), tokens)

    def choose(self, load: Load) -> int | None:
        """The living engine with the fewest outstanding tokens among those with room; None if none has room."""
        free = [
            engine
            for engine in range(self.num_engines)
            if engine not in self.lost
            and (self._samples[engine] == 0 or self._samples[engine] + load.samples <= self.max_outstanding_samples)
        ]
        return min(free, key=self._tokens.__getitem__, default=None)

    def start(self, engine: int, load: Load) -> None:
        """Record that a call with this load was sent to the engine."""
        self._samples[engine] += load.samples
        self._tokens[engine] += load.tokens

    def finish(self, engine: int, load: Load) -> None:
        """Record that the call has ended, successfully or not."""
        self._samples[engine] -= load.samples
        self._tokens[engine] -= load.tokens

    def learn(self, response_tokens: int) -> None:
        """Record the length of a finished response."""
        self._finished_responses += 1
        self._finished_tokens += response_tokens
