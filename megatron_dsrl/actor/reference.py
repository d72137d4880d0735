"""The reference policy of KL terms: a second set of weights for the policy's model.

Its weights are kept in host memory, each rank's shards on that rank. For a forward pass they are swapped with the
policy's, parameter by parameter, and swapped back afterwards. Weights are only copied, so the policy's are restored bit
for bit, and the optimizer's master weights are not touched.

Only weights that differ from the policy's are kept: with LoRA the adapters, whose initial output is zero, and all
weights if the reference is another model.

Memory: the kept parameters once on the host (2 bytes per parameter in bf16), and the largest single parameter on the
device during the swap.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.saved_state import load_saved_weights, start_save_weights
from megatron_dsrl.algorithms.experience import Experience, PerToken
from megatron_dsrl.checkpoint.megatron_writer import CheckpointWrite
from megatron_dsrl.platform import current_platform


class ReferencePolicy:
    """Earlier weights of an actor. One object per rank; methods are collective unless they say otherwise."""

    def __init__(self, actor: Actor) -> None:
        """Copy the actor's current weights, those that are trained. Not collective."""
        self._actor = actor
        parameters = [parameter for chunk in actor.model.chunks for parameter in chunk.parameters()]
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self._host = [current_platform().host_copy(parameter) for parameter in self._parameters]
        self.is_initial = True
        """Whether the weights are still those it was created with."""

    def load_model(self, folder: Path) -> None:
        """Take the weights of another model with the policy's architecture. They count as the initial ones: checkpoints
        do not contain them. For the folder see `Actor.load_model`."""
        self._parameters += self._frozen
        self._host += [current_platform().host_copy(parameter) for parameter in self._frozen]
        self._frozen = []
        with self._swapped_in():
            self._actor.load_model(folder)

    def log_probs(self, experience: Experience) -> PerToken:
        """Like `Actor.log_probs`, but under the reference policy, whose routers choose their own experts."""
        with self._swapped_in():
            return self._actor.log_probs(replace(experience, routed_experts=None))

    @torch.no_grad()
    def refresh(self) -> None:
        """Replace the reference weights by the actor's current ones. Not collective."""
        for parameter, kept in zip(self._parameters, self._host):
            kept.copy_(parameter)
        self.is_initial = False

    def start_save(self, folder: Path, copy: bool) -> CheckpointWrite:
        """Prepare to write the weights into an existing, empty folder. They are always copied."""
        with self._swapped_in():
            return start_save_weights(folder, self._actor.model.chunks)

    def load(self, folder: Path) -> None:
        """Load saved weights, written under this or another layout."""
        with self._swapped_in():
            load_saved_weights(folder, self._actor.model.chunks)
        self.is_initial = False

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, kept in zip(self._parameters, self._host):
            current = parameter.detach().clone()
            parameter.copy_(kept)
            kept.copy_(current)
