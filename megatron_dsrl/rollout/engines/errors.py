"""Errors of engines."""

from megatron_dsrl.common.errors import MachineError


class EngineError(RuntimeError):
    """An engine refused a call, answered something unusable, or is gone."""


class LostEngineError(EngineError, MachineError):
    """An engine was lost more often than `engine.max_restarts` allows."""


class BadRequestError(EngineError):
    """The engine will never accept this request; retrying does not help."""


class EngineStartError(EngineError):
    """The server was killed, was late or lost its port: the next start may succeed."""


class EnginesLostError(EngineError):
    """No living engine can take the rest of the batch."""


class StaleWeightsError(EngineError):
    """A sample was generated with weights other than the current ones."""
