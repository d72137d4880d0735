"""Which engine gets the next prompt."""

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engine_calls import EngineChoice, Load
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.unfinished import UnfinishedGroup

LIMIT = 100
"""Tokens of a response at most."""


def group(prompt_tokens: int, samples: int = 4) -> UnfinishedGroup:
    return UnfinishedGroup.new(Prompt(0, "", (1,) * prompt_tokens, ""), range(samples))


def engine_choice(engines: int = 2, max_outstanding_samples: int = 1000) -> EngineChoice:
    return EngineChoice(engines, max_outstanding_samples, LIMIT, set())


def send(to: EngineChoice, *loads: Load) -> list[int | None]:
    """Who gets each of them."""
    engines = []
    for load in loads:
        engine = to.choose(load)
        if engine is not None:
            to.start(engine, load)
        engines.append(engine)
    return engines


def test_a_group_counts_with_its_prompt_once_and_all_its_samples() -> None:
    assert engine_choice().load_of([group(30), group(20, samples=2)]) == Load(6, 30 + 4 * LIMIT + 20 + 2 * LIMIT)


def test_a_response_counts_with_what_is_still_expected_of_it() -> None:
    one = engine_choice()
    tokens = (5,) * 10
    ended, cut = Completion(tokens, (0.0,) * 10, "stop", ()), Completion(tokens, (0.0,) * 10, "abort", ())
    begun = group(30, samples=2).extended([ended, cut])
    assert one.load_of([begun]) == Load(1, 30 + LIMIT - 10)

    one.learn(20)
    one.learn(40)
    assert one.expected_response_tokens == 30
    assert one.load_of([begun]) == Load(1, 30 + 20)
    longer = Completion((5,) * 50, (0.0,) * 50, "abort", ())
    assert one.load_of([begun.extended([longer])]) == Load(1, 30 + 1), "at least one more token"


def test_the_engine_with_the_fewest_outstanding_tokens_gets_the_next_group() -> None:
    loads = [Load(4, tokens) for tokens in (500, 100, 100, 200, 300)]
    one = engine_choice(engines=2)
    assert send(one, *loads) == [0, 1, 1, 1, 1]  # 0 has 500; 1 has 0, 100, 200, 400
    one.finish(0, loads[0])
    assert send(one, Load(4, 50)) == [0]


def test_fewer_samples_do_not_count_but_fewer_tokens() -> None:
    one = engine_choice(engines=2)
    assert send(one, Load(1, 500), Load(8, 400), Load(1, 50)) == [0, 1, 1]


def test_a_group_waits_for_an_engine_that_has_room_for_all_of_it() -> None:
    one = engine_choice(engines=2, max_outstanding_samples=6)
    first, second = Load(4, 400), Load(4, 300)
    assert send(one, first, second, Load(4, 100), Load(2, 100)) == [0, 1, None, 1]
    one.finish(0, first)
    assert send(one, Load(4, 100)) == [0]


def test_an_idle_engine_takes_a_group_that_is_larger_than_the_limit() -> None:
    one = engine_choice(engines=1, max_outstanding_samples=2)
    assert send(one, Load(4, 400), Load(1, 10)) == [0, None]


def test_a_lost_engine_gets_nothing() -> None:
    one = engine_choice(engines=2)
    one.lost.add(1)
    assert send(one, Load(4, 400), Load(4, 400)) == [0, 0]
    one.lost.add(0)
    assert one.choose(Load(4, 400)) is None
