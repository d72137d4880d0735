"""A real SGLang server with the interface of OpenAI, over random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from tests.support.engine import tiny_run_config
from tests.support.tiny_model import HEAD_DIM, SIZES


@contextmanager
def judge(folder: Path) -> Iterator[str]:
    """The URL of a server with the folder's model, named `default`."""
    sizes = SIZES | {"max_position_embeddings": 8192, "head_dim": HEAD_DIM, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=VOCAB_SIZE)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = tiny_run_config(folder, extra_arguments={"skip_tokenizer_init": False})
    server = EngineServer(
        server_arguments(config, engine=0), engine_environment(1), folder / "log", startup_timeout_seconds=120.0
    )
    server.start()
    try:
        server.wait_until_ready()
        yield server.url + "/v1"
    finally:
        server.stop()
