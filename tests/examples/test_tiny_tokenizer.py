"""The tiny task's tokenizer: text survives, and it speaks Qwen3's chat format."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from examples.tiny_dsrl.base_model import write_model_folder
from examples.tiny_dsrl.base_settings import DENSE
from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer

DATA = Path(os.environ.get("DSRL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

tokenizer = build_tokenizer()

SYSTEM = {"role": "system", "content": "Add up."}
USER = {"role": "user", "content": "4+9-5=?"}
ASSISTANT = {"role": "assistant", "content": "\\boxed{8}"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT], [USER, ASSISTANT, USER]]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, include_characters="\n")))
def test_printable_text_round_trips(text) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_task_is_short_in_tokens() -> None:
    ids = tokenizer.encode("4+9-5\n=13-5\n=8\n\\boxed{8}<|im_end|>", add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == [*"4+9-5", "\n=", *"13-5", "\n=", "8", "\n\\boxed{", "8", "}", "<|im_end|>"]


def test_saved_folder_loads_the_same_beside_a_qwen3_config(tmp_path) -> None:
    write_model_folder(tmp_path / "model", DENSE)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert loaded.encode(prompt) == tokenizer.encode(prompt)
    assert loaded.decode(loaded.encode(prompt)) == prompt
    assert loaded.eos_token == "<|im_end|>" and len(loaded) <= VOCAB_SIZE


@pytest.mark.needs_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder {DATA}; set DSRL_TEST_DATA")
def test_chat_format_is_the_real_qwen3s() -> None:
    qwen3 = AutoTokenizer.from_pretrained(DATA / "qwen3-tokenizer")
    for conversation in CONVERSATIONS:
        for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            for prompt in (True, False):
                ours, theirs = (
                    each.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt, **options)
                    for each in (tokenizer, qwen3)
                )
                assert ours == theirs
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"):
        skipped = [each.decode(each.encode(token), skip_special_tokens=True) for each in (tokenizer, qwen3)]
        assert skipped[0] == skipped[1]
