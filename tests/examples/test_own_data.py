"""The preview of the guide to own data."""

from examples.own_data.preview import main
from tests.support.tiny_run import write_tiny_run


def test_a_mistake_is_one_message(capsys) -> None:
    assert main(["nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "nowhere.yaml: no such configuration file\n"


def test_a_reward_that_fails_is_described(tmp_path, capsys) -> None:
    assert main([str(write_tiny_run(tmp_path)), "reward.function=operator:truediv"]) == 0
    assert "reward of 15: raised TypeError(" in capsys.readouterr().out
