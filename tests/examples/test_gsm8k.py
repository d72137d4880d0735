"""GSM8K with a random model: the model folder, the configuration, and the reward that a random model can earn."""

import os
import random
from pathlib import Path

import pytest

from examples.gsm8k.make_random_model import make_random_model
from examples.gsm8k.rewards import mostly_ascii
from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.tokenizer import load_tokenizer
from megatron_dsrl.model.architecture import read_architecture

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DSRL_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.needs_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder {DATA}; set DSRL_TEST_DATA")
def test_model_folder_and_prompts_fit_the_shipped_configuration(tmp_path) -> None:
    make_random_model(str(DATA / "qwen3-tokenizer"), tmp_path / "model")
    architecture = read_architecture(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"), architecture.vocab_size)
    config = load_config(
        ROOT / "configs" / "gsm8k_random_qwen3.yaml", [f"data.source={DATA / 'gsm8k' / 'train.jsonl'}", "data.limit=50"]
    )
    prompts = load_prompts(config.data, tokenizer)
    assert prompts[0].answer == "72"
    assert max(len(prompt.token_ids) for prompt in prompts) < config.data.max_prompt_tokens
    rng = random.Random(0)
    responses = [tokenizer.decode([rng.randrange(151643) for _ in range(32)]) for _ in range(200)]
    assert 0.3 < sum(mostly_ascii(response, "") for response in responses) / 200 < 0.7


def test_tokenizer_of_a_different_model_is_refused(tmp_path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no chat template"):
        make_random_model(str(tmp_path / "tokenizer"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_mostly_ascii() -> None:
    assert mostly_ascii("72 clips", "") == 1.0
    assert mostly_ascii("七十二", "") == mostly_ascii("", "") == 0.0
