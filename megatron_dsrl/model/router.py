"""Mixture-of-experts routers that can add their own losses to an optimizer step.

For a set of tokens dispatched to E experts:

- the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4 to 6, generalised to any number of experts per
  token) is E * sum_i f_i P_i, where f_i is the fraction of dispatches that go to expert i (no gradient) and P_i the
  mean router probability of expert i. It is 1 when f or P is uniform. The set is a micro-batch (`aux_loss`); or f is
  computed over all micro-batches of the optimizer step so far, on all data-parallel replicas (`global_aux_loss`, arXiv
  2501.11873);
- the z-loss (ST-MoE, arXiv 2202.08906, eq. 5) is the mean of the squared logsumexp of the router's logits.

Each of the two adds to the loss of an optimizer step: its coefficient times the sum over layers of the mean over
micro-batches and data-parallel replicas, weighted by their numbers of tokens. This equals the sum over tokens divided
by the number of tokens of the step.

Differences from Megatron-core's losses of the same names (transformer/moe/router.py), which are disabled:

- Megatron divides by the number of *scored* tokens of the step after the backward pass. Here gradients are never
  divided (actor/forward_backward.py) and prompts are routed as well as responses, so the number of tokens is passed in
  advance;
- padding is excluded: including it would make losses depend on the layout;
- f counts where tokens are sent, in Megatron where the router would send them, which differs under routing replay;
- micro-batches are weighted by their lengths, and f of `global_aux_loss` sums to 1 over experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_dsrl.config.model import RouterConfig


class RouterLosses:
    """Losses and metrics of this rank's routers in one optimizer step."""

    def __init__(self, config: RouterConfig, num_tokens: int, device: torch.device) -> None:
        """`num_tokens` counts those of the optimizer step over all micro-batches and data-parallel replicas, without
        padding."""
        coefficients = {"load_balancing_loss": config.load_balancing_coefficient, "z_loss": config.z_loss_coefficient}
        self._coefficients = {name: value for name, value in coefficients.items() if value is not None}
        self._over_the_step = config.load_balancing == "global_aux_loss"
        self._num_tokens = num_tokens
        self._dispatches: dict[int, Tensor] = {}
        """Dispatch counts of the step so far over all replicas, by layer: int64 [experts]."""
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in self._coefficients}
        """Loss sums over the tokens and layers of this rank."""

    @property
    def exist(self) -> bool:
        return bool(self._coefficients)

    def layer_loss(self, router: "Router", logits: Tensor, routing_map: Tensor, is_token: Tensor) -> Tensor:
        """This rank's contribution of one layer and micro-batch to the step's loss, weighted, float32 scalar.

        Args:
            logits: [tokens, experts].
            routing_map: [tokens, experts] bool, the experts each token is sent to.
            is_token: [tokens] bool, False for padding.
        """
        sums: dict[str, Tensor] = {}
        if "load_balancing_loss" in self._coefficients:
            sums["load_balancing_loss"] = self._balancing(router, logits, routing_map, is_token)
        if "z_loss" in self._coefficients:
            sums["z_loss"] = (torch.logsumexp(logits.float(), dim=-1).square() * is_token).sum()
        loss = torch.zeros((), device=logits.device)
        for name, over_tokens in sums.items():
            self._sums[name] += over_tokens.detach()
            loss = loss + self._coefficients[name] / self._num_tokens * over_tokens
        return loss

    def metrics(self, num_layers: int) -> dict[str, float]:
        """Unweighted means over tokens and layers, the same on every rank. Collective over all ranks.

        Ranks route disjoint tokens or layers: with experts, tensor parallelism implies sequence parallelism.
        `num_layers` counts those of the whole model.
        """
        if not self.exist:
            return {}
        sums = torch.stack(list(self._sums.values()))
        dist.all_reduce(sums)
        return dict(zip(self._sums, (sums / (self._num_tokens * num_layers)).tolist()))

    def _balancing(self, router: "Router", logits: Tensor, routing_map: Tensor, is_token: Tensor) -> Tensor:
        """E * sum_i f_i * (sum of expert i's probability over this rank's tokens)."""
        dispatches = (routing_map & is_token[:, None]).sum(dim=0)
        group = router.tp_dp_cp_group if self._over_the_step else router.tp_cp_group
        if group.size() > 1:
            dist.all_reduce(dispatches, group=group)
        if self._over_the_step:
            dispatches = dispatches + self._dispatches.get(router.layer_number, 0)
            self._dispatches[router.layer_number] = dispatches
        shares = dispatches / dispatches.sum().clamp(min=1)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32) * is_token[:, None]
        return logits.shape[-1] * (probabilities.sum(dim=0) * shares).sum()


class Router(TopKRouter):
    """Megatron's router, which adds `losses` if set."""

    losses: RouterLosses | None = None
    """Losses of the current optimizer step; see `adding_router_losses`."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Expert weights and routing map, both [tokens, experts].

        Args:
            logits: [s, b, experts].
            padding_mask: [s, b] bool, True for padding; required if the router has losses.
        """
        weights, routing_map = super().routing(logits, padding_mask)
        # Full recomputation routes twice, first without gradients; only the second pass counts.
        if self.losses is None or not torch.is_grad_enabled():
            return weights, routing_map
        assert padding_mask is not None
        loss = self.losses.layer_loss(self, logits.flatten(0, 1), routing_map, ~padding_mask.flatten())
        return MoEAuxLossAutoScaler.apply(weights, loss), routing_map


@contextmanager
def adding_router_losses(
    chunks: Sequence[torch.nn.Module], config: RouterConfig, num_tokens: int
) -> Iterator[RouterLosses]:
    """Add router losses to the gradients during the forward and backward passes of one optimizer step."""
    losses = RouterLosses(config, num_tokens, next(chunks[0].parameters()).device)
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
    for router in routers:
        router.losses = losses if losses.exist else None
    try:
        yield losses
    finally:
        for router in routers:
            router.losses = None
