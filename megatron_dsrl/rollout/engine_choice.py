"""Which engine gets the next prompt: the one with the fewest outstanding tokens.

A group counts with the tokens that it will take up: its prompt once, since its samples share it, and for every
response that has not ended what is expected of it. The expectation is the mean length of the responses that the batch
has finished so far, and the length limit until there are any.
"""

from dataclasses import dataclass, field

from megatron_dsrl.rollout.unfinished import UnfinishedGroup


@dataclass(frozen=True)
class Load:
    """What a call puts on its engine."""

    samples: int
    tokens: float


@dataclass
class EngineChoice:
    """Keeps count of what every engine has to do."""

    num_engines: int
    max_outstanding_samples: int
    """Samples that one engine holds at a time. An idle engine takes any call."""
    max_response_tokens: int
    lost: set[int] = field(default_factory=set)
    """Engines that get nothing any more."""

    def __post_init__(self) -> None:
        self._samples = [0] * self.num_engines
        self._tokens = [0.0] * self.num_engines
        self._finished_responses = 0
        self._finished_tokens = 0

    @property
    def expected_response_tokens(self) -> float:
        """Length of a response, as far as one knows."""
        if self._finished_responses == 0:
            return self.max_response_tokens
        return self._finished_tokens / self._finished_responses

    def load_of(self, groups: list[UnfinishedGroup]) -> Load:
        """What these groups would put on an engine."""
        tokens = 0.0
        for group in groups:
            tokens += len(group.prompt.token_ids)
            for response in group.responses:
                if response.finish_reason is None:
                    tokens += max(1.0, self.expected_response_tokens - len(response.response_ids))
        return Load(sum(group.num_unfinished for group in groups), tokens)

    def choose(self, load: Load) -> int | None:
        """The living engine with the fewest outstanding tokens among those that have room; None if none has."""
        free = [
            engine
            for engine in range(self.num_engines)
            if engine not in self.lost
            and (self._samples[engine] == 0 or self._samples[engine] + load.samples <= self.max_outstanding_samples)
        ]
        return min(free, key=self._tokens.__getitem__, default=None)

    def begin(self, engine: int, load: Load) -> None:
        """A call with this load is sent to the engine."""
        self._samples[engine] += load.samples
        self._tokens[engine] += load.tokens

    def end(self, engine: int, load: Load) -> None:
        """The call is over, well or not."""
        self._samples[engine] -= load.samples
        self._tokens[engine] -= load.tokens

    def learn(self, response_tokens: int) -> None:
        """A response has ended with this length."""
        self._finished_responses += 1
        self._finished_tokens += response_tokens
