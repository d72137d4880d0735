"""What tests read from actors and critics."""

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.actor.statistics import UpdateMetrics


def weights_of(model: Actor | Critic) -> dict[str, NDArray[np.float32]]:
    """All weights in float32 by their HF names, in buckets that hold a few tensors only."""
    buckets = model.model.hf_weights(bucket_bytes=10_000)
    return {name: weight.float().cpu().numpy().copy() for bucket in buckets for name, weight in bucket}


def main_gradients_of(actor: Actor) -> dict[str, NDArray[np.float32]]:
    """What the last update left in `main_grad`, by HF names; in a bfloat16 model rounded to that. They are read through
    the weights, which are put back."""
    parameters = [parameter for chunk in actor.model.chunks for parameter in chunk.parameters()]
    assert all(parameter.main_grad.dtype == torch.float32 for parameter in parameters)
    weights = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        gradients = weights_of(actor)
        for parameter, weight in zip(parameters, weights):
            parameter.copy_(weight)
    return gradients


def flat(update: UpdateMetrics | None) -> dict[str, float]:
    """All metrics of an update that took a step, by name: `<objective>/<metric>` and `router/<metric>`."""
    assert update is not None
    numbers = {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate, "loss": update.loss}
    for name, objective in update.objectives.items():
        metrics = objective.totals() | objective.token_metrics()
        numbers |= {f"{name}/{key}": value for key, value in metrics.items()}
    return numbers | {f"router/{name}": value for name, value in update.router.items()}
