"""The reference policy of KL terms: other weights for the policy's own model.

Its weights lie in host memory, each rank's shards on that rank. For a forward pass they change places with the
policy's, parameter by parameter, and change back afterwards: both are moved and nothing is computed, so the policy's
weights are bit for bit the ones before, and the optimizer, whose master weights are not touched, notices nothing.

Memory: the size of the rank's parameters on the host (2 bytes per parameter of the rank in bf16), and on the device the
largest single parameter while it is exchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.saved_state import begin_save_weights, load_saved_weights
from megatron_dsrl.algorithms.experience import Experience, PerToken
from megatron_dsrl.checkpoint.megatron_writer import CheckpointWrite
from megatron_dsrl.platform import current_platform


class ReferencePolicy:
    """Earlier weights of an actor. One object per rank; methods are collective unless they say otherwise."""

    def __init__(self, actor: Actor):
        """Keep a copy of the weights that the actor has now. Not collective."""
        self._actor = actor
        self._parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
        self._elsewhere = [current_platform().host_copy(parameter) for parameter in self._parameters]
        self.is_initial = True
        """Whether these are still the weights that the object was made with."""

    def log_probs(self, experience: Experience) -> PerToken:
        """As `Actor.log_probs`, under the reference policy, whose routers choose for themselves."""
        with self._in_the_model():
            return self._actor.log_probs(replace(experience, routed_experts=None))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that the actor has now. Not collective."""
        for parameter, kept in zip(self._parameters, self._elsewhere):
            kept.copy_(parameter)
        self.is_initial = False

    def begin_save(self, folder: Path, copy: bool) -> CheckpointWrite:
        """The weights, ready to be written into an existing, empty folder. It is always a copy."""
        with self._in_the_model():
            return begin_save_weights(folder, self._actor.chunks)

    def load(self, folder: Path) -> None:
        """Continue with weights that were saved, under this or another layout."""
        with self._in_the_model():
            load_saved_weights(folder, self._actor.chunks)
        self.is_initial = False

    @contextmanager
    def _in_the_model(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, kept in zip(self._parameters, self._elsewhere):
            in_the_model = parameter.detach().clone()
            parameter.copy_(kept)
            kept.copy_(in_the_model)
