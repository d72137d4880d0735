"""Demonstrations: rows become prompts with the tokens that a policy would have to emit after them."""

import json

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data.demonstrations import Demonstration, load_demonstrations

ROWS = [{"problem": "1+2=?", "response": "1+2\n=3"}, {"problem": "9-4=?", "response": "9-4\n=5"}]


def load(tmp_path, tokenizer, rows, limit=32, **fields) -> list[Demonstration]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_demonstrations(PromptSetConfig(source=str(file), system_prompt=None, **fields), tokenizer, limit)


def test_the_response_follows_the_prompt_of_sampling_and_ends_the_turn(tmp_path, tokenizer) -> None:
    first, second = load(tmp_path, tokenizer, ROWS)
    assert tokenizer.decode(first.token_ids).endswith("1+2=?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(first.response_ids) == "1+2\n=3<|im_end|>"
    assert (second.index, second.answer, second.truncated) == (1, "9-4\n=5", False)
    assert type(second.prompt) is not Demonstration and second.prompt.token_ids == second.token_ids


def test_a_template_builds_the_response(tmp_path, tokenizer) -> None:
    rows = [{"problem": "1+2=?", "worked": "1+2", "answer": 3}]
    template = "{{ worked }}\n\\boxed{% raw %}{{% endraw %}{{ answer }}}"
    (one,) = load(tmp_path, tokenizer, rows, response_template=template)
    assert tokenizer.decode(one.response_ids) == "1+2\n\\boxed{3}<|im_end|>"


def test_the_last_turn_of_a_chat_is_the_response(tmp_path, tokenizer) -> None:
    chat = [
        {"role": "user", "content": "1+2=?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "+4=?"},
        {"role": "assistant", "content": "7"},
    ]
    (one,) = load(tmp_path, tokenizer, [{"messages": chat}], messages_field="messages")
    assert tokenizer.decode(one.response_ids) == "7<|im_end|>"
    assert [word in one.text for word in ("1+2=?", "3<|im_end|>", "+4=?", "7")] == [True, True, True, False]
    with pytest.raises(UserError, match="the last turn must be the assistant's, not the user's"):
        load(tmp_path, tokenizer, [{"messages": chat[:3]}], messages_field="messages")
    with pytest.raises(UserError, match="the assistant's turn must follow another one"):
        load(tmp_path, tokenizer, [{"messages": chat[1:2]}], messages_field="messages")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "1+2=?"}, "row 2: data.response_field: the row has no field `response`; the fields are `problem`"),
        ({"problem": "1+2=?", "response": " "}, "row 2: it has no response: its field `response` holds ' '"),
        ({"problem": "1+2=?", "response": "\ud800"}, "row 2: its response holds half a character"),
        ({"problem": "", "response": "3"}, "row 2: it has no problem"),
    ],
)
def test_a_row_without_a_response_is_named(tmp_path, tokenizer, row, message) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, tokenizer, [*ROWS, row])
    assert len(load(tmp_path, tokenizer, [*ROWS, row], on_bad_row="drop")) == 2


def test_long_responses_are_refused_dropped_or_cut_off(tmp_path, tokenizer) -> None:
    rows = [*ROWS, {"problem": "1+1=?", "response": "1+1\n=2\n=2\n=2"}]
    with pytest.raises(UserError, match="1 of 3 responses are longer than 8 tokens.*row 2 is the first"):
        load(tmp_path, tokenizer, rows, limit=8)
    assert len(load(tmp_path, tokenizer, rows, limit=8, on_long_response="drop")) == 2
    with pytest.raises(UserError, match="2 of 2 responses"):
        load(tmp_path, tokenizer, ROWS, limit=2, on_long_response="drop")
    *whole, cut = load(tmp_path, tokenizer, rows, limit=8, on_long_response="truncate")
    assert [one.truncated for one in whole] == [False, False] and cut.truncated
    assert len(cut.response_ids) == 8 and cut.response_ids[-1] != tokenizer.eos_token_id


def test_a_truncated_prompt_keeps_its_response(tmp_path, tokenizer) -> None:
    one, _ = load(tmp_path, tokenizer, ROWS, max_prompt_tokens=4)
    assert len(one.token_ids) == 4 and tokenizer.decode(one.response_ids) == "1+2\n=3<|im_end|>"
