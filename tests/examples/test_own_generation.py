"""The example of custom generation: what the function writes, and that its configuration uses it."""

import asyncio
from pathlib import Path

from examples.own_generation.generate import with_calculator
from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.config.load import load_config
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.tokenizer import decode, encode
from megatron_dsrl.rollout.custom_generation import custom_generation
from megatron_dsrl.rollout.growing_response import GrowingResponse
from megatron_dsrl.rollout.sample import SamplingParameters
from tests.support.scripted_engine import ScriptedEngine

RUN = Path(__file__).parents[2] / "examples" / "own_generation" / "run.yaml"


def test_the_calculator_writes_the_value_of_the_line_above() -> None:
    tokenizer = build_tokenizer()
    turns = [encode(tokenizer, turn) for turn in ("4+9-5\n=13-5", "\n=", "\n\\boxed{8}<|im_end|>")]
    engine = ScriptedEngine(lambda request: turns[len(engine.requests) - 1])
    sampling = SamplingParameters(64, (tokenizer.eos_token_id,))
    response = GrowingResponse(
        Prompt(0, text="", token_ids=(1,), answer="8"),
        1,
        engine,
        sampling,
        lambda text: encode(tokenizer, text),
        lambda ids: decode(tokenizer, ids),
    )

    asyncio.run(with_calculator(response))

    assert response.text == "4+9-5\n=8\n=8\n\\boxed{8}"
    completion = response.as_completion()
    inserted = [position for position, is_scored in enumerate(completion.scored) if not is_scored]
    assert [decode(tokenizer, [completion.response_ids[position]]) for position in inserted] == ["8", "8"]
    assert completion.finish_reason == "stop"


def test_the_configuration_means_it() -> None:
    generation = custom_generation(load_config(RUN).rollout, list, str)
    assert generation.function.func is with_calculator and generation.function.keywords == {"max_calls": 4}
