"""`dsrl analyse behaviours` with a judge that a real SGLang server serves.

Random weights judge nothing: shown is that questions arrive, answers come back, and unreadable ones are counted.
"""

import json

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer
from megatron_dsrl.cli import main
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engine_group import server_arguments
from megatron_dsrl.rollout.server import EngineServer
from tests.observability.synthetic_run import write_run
from tests.support.engine import tiny_run_config
from tests.support.tiny_model import HEAD_DIM, SIZES


@pytest.fixture
def judge(tmp_path):
    folder = tmp_path / "judge"
    sizes = SIZES | {"max_position_embeddings": 8192, "head_dim": HEAD_DIM, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=VOCAB_SIZE)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = tiny_run_config(folder, extra_arguments={"skip_tokenizer_init": False})
    server = EngineServer(
        server_arguments(config, engine=0), engine_environment(1), tmp_path / "judge.log", startup_timeout_seconds=120.0
    )
    server.start()
    try:
        server.wait_until_ready()
        yield server.url + "/v1"
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_asks_a_server_of_sglang(judge, tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, steps=2, warmup=1)

    assert main(["analyse", "behaviours", str(run), "--url", judge, "--judge", "default", "--responses", "2"]) == 0

    verdicts = [json.loads(line) for line in (run / "analysis" / "behaviours.jsonl").read_text().splitlines()]
    assert sorted(verdict["step"] for verdict in verdicts if "step" in verdict) == [1, 1, 2, 2]
    summary = json.loads((run / "analysis" / "behaviours.json").read_text())
    assert (summary["responses"], summary["unreadable_answers"], summary["questions_without_answer"]) == (4, 4, 0)
    assert (run / "analysis" / "behaviours.svg").exists()
    assert "unreadable answers: 4" in capsys.readouterr().out
