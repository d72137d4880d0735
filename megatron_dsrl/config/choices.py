"""The choices that a run is made of, and where the built-in ones are defined."""

from megatron_dsrl.config.registry import Registry

SAMPLERS = Registry("prompt sampler", ["megatron_dsrl.data.samplers"])
SPACES = Registry("space", ["megatron_dsrl.algorithms.spaces"])
ADVANTAGES = Registry("advantage", ["megatron_dsrl.algorithms.advantages", "megatron_dsrl.algorithms.gae"])
FILTERS = Registry("filter", ["megatron_dsrl.algorithms.filters"])
LOSSES = Registry("loss", ["megatron_dsrl.algorithms.losses"])
AGGREGATIONS = Registry("aggregation", ["megatron_dsrl.algorithms.aggregations"])
IMPORTANCE_CORRECTIONS = Registry("importance correction", ["megatron_dsrl.algorithms.importance"])
