"""`dsrl fetch`: what is read, and so downloaded, before a run."""

import pytest

from megatron_dsrl.cli import main
from tests.support.tiny_run import write_tiny_run


@pytest.mark.parametrize("field", ["critic.path", "reference.path"])
def test_critic_and_reference_are_fetched_too(tmp_path, capsys, field) -> None:
    config = str(write_tiny_run(tmp_path))
    assert main(["fetch", config, f"{field}={tmp_path / 'model'}"]) == 0
    assert capsys.readouterr().out == f"model {tmp_path / 'model'}; 40 prompts, 8 held-out\n"
    assert main(["fetch", config, f"{field}=./absent"]) == 2
    assert f"{field}: no such folder: ./absent" in capsys.readouterr().err
