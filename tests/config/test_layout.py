"""Which layouts are refused, and what the message says."""

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import ModelShape, engine_problems, model_problems, process_problems, refuse
from megatron_dsrl.config.model import ParallelConfig

DENSE = ModelShape(layers=6, attention_heads=8, key_value_groups=4, feed_forward_size=96, context_tokens=512)
EXPERTS = ModelShape(6, 8, 4, 96, 512, experts=6, expert_feed_forward_size=10)


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        ({"pipeline_parallel_size": 3}, DENSE, "1 x 3 x 1 = 3 processes, and 8 processes cannot be divided"),
        ({"tensor_parallel_size": 2, "context_parallel_size": 3}, DENSE, "2 x 1 x 3 = 6 processes"),
        ({"expert_parallel_size": 3}, EXPERTS, "all experts together take 3 x 1 x 1 = 3 processes"),
        ({"sequence_parallel": True}, DENSE, "sequence_parallel: needs parallel.tensor_parallel_size above 1"),
        ({"virtual_pipeline_stages": 2}, DENSE, "virtual_pipeline_stages: needs parallel.pipeline_parallel_size"),
        ({"tensor_parallel_size": 8}, DENSE, "4 key/value heads cannot be split 8 ways; choose a divisor of 4"),
        ({"pipeline_parallel_size": 4}, DENSE, "6 layers cannot be split 4 ways"),
        ({"pipeline_parallel_size": 4}, DENSE, "or set parallel.layers_in_first_stage, parallel.layers_in_last_stage"),
        ({"layers_in_last_stage": 2}, DENSE, "layers_in_last_stage: needs parallel.pipeline_parallel_size of at least"),
        ({"pipeline_parallel_size": 4, "layers_in_first_stage": 1}, DENSE, "leave 5 of the model's 6 .* 3 other"),
        ({"pipeline_parallel_size": 2, "layers_in_first_stage": 6}, DENSE, "leave 0 of the model's 6 .* 1 other"),
        (
            {"pipeline_parallel_size": 2, "layers_in_first_stage": 4, "layers_in_last_stage": 3},
            DENSE,
            "layers_in_first_stage, parallel.layers_in_last_stage: add up to 7 layers, but the model has 6",
        ),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2}, DENSE, "2 x 2 = 4 virtual stages: the 3 layers"),
        ({"expert_parallel_size": 2}, DENSE, "expert_parallel_size: is 2, but the model has no experts"),
        ({"expert_parallel_size": 4}, EXPERTS, "6 experts cannot be split 4 ways"),
        ({"expert_tensor_parallel_size": 4}, EXPERTS, "10 channels of an expert cannot be split 4 ways"),
        ({"tensor_parallel_size": 2}, EXPERTS, "sequence_parallel: must be true if a model with experts"),
    ],
)
def test_a_layout_that_does_not_fit_8_processes_is_refused(sizes, shape, message) -> None:
    parallel = ParallelConfig(**sizes)
    with pytest.raises(UserError, match=message):
        refuse([*process_problems(parallel, 8), *model_problems(parallel, shape)])


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"tensor_parallel_size": 4, "context_parallel_size": 2, "sequence_parallel": True}, DENSE),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_stages": 3}, DENSE),
        ({"pipeline_parallel_size": 4, "layers_in_first_stage": 1, "layers_in_last_stage": 1}, DENSE),
        ({"pipeline_parallel_size": 2, "layers_in_last_stage": 2, "virtual_pipeline_stages": 2}, DENSE),
        ({"tensor_parallel_size": 4, "sequence_parallel": True, "expert_parallel_size": 2,
          "expert_tensor_parallel_size": 1}, EXPERTS),
    ],
)  # fmt: skip
def test_a_layout_that_fits_passes(sizes, shape) -> None:
    parallel = ParallelConfig(**sizes)
    assert [*process_problems(parallel, 8), *model_problems(parallel, shape)] == []


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({"pipeline_parallel_size": 4, "layers_in_first_stage": 23, "layers_in_last_stage": 23}, [23, 24, 24, 23]),
        ({"pipeline_parallel_size": 4, "layers_in_last_stage": 22}, [24, 24, 24, 22]),
        ({"pipeline_parallel_size": 2, "layers_in_first_stage": 40, "layers_in_last_stage": 54}, [40, 54]),
        ({"pipeline_parallel_size": 2}, [47, 47]),
        ({}, [94]),
    ],
)
def test_94_layers_are_dealt_out_to_stages(sizes, stages) -> None:
    assert ParallelConfig(**sizes).layers_of_stages(94) == stages


def test_engines_keep_copies_of_key_value_heads_in_whole_numbers() -> None:
    assert not list(engine_problems(8, 8, DENSE))
    assert [what for _, what in engine_problems(6, 8, DENSE)] == [
        "8 processes cannot be divided into engines of 6; choose a divisor of the number of processes",
        "the model's 8 attention heads cannot be split 6 ways; choose a divisor of 8",
        "the model's 4 key/value heads cannot be split 6 ways; choose a divisor of 4",
    ]
