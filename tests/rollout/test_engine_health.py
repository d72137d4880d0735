"""How idle engines are, by a clock that the test sets."""

import pytest

from megatron_dsrl.rollout.engine_health import EngineUse


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("megatron_dsrl.rollout.engine_health.time.monotonic", lambda: now[0])
    return now


def test_an_engine_is_idle_while_it_has_no_call(clock) -> None:
    use = EngineUse()
    assert use.idle_fraction(2) is None, "nothing is known yet"
    clock[0] = 200.0
    use.started(0)
    use.started(0)  # two calls at a time count once
    clock[0] = 206.0
    use.ended(0)
    clock[0] = 208.0
    use.ended(0)
    use.started(1)
    clock[0] = 210.0
    assert use.idle_fraction(2) == pytest.approx(0.5), "engine 0 was busy for 8 of 10 s, engine 1 for 2"
    clock[0] = 220.0
    use.ended(1)
    assert use.idle_fraction(2) == pytest.approx(0.5), "the call of engine 1 has lasted from one record to the next"
