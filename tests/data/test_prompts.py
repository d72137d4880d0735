"""Prompt sets: rows become rendered, tokenised prompts with clean gold answers, and every bad row is named."""

import gzip
import json

import pytest

from megatron_dsrl.config.data import ChoicesConfig, PromptSetConfig
from megatron_dsrl.data.prompts import clean_answer, load_prompts
from megatron_dsrl.errors import UserError

ROWS = [{"problem": "1+2=?", "answer": 3}, {"problem": "9-4=?", "answer": " 5 "}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(source, **fields):
    return PromptSetConfig(source=str(source), system_prompt=None, **fields)


def load(tmp_path, tokenizer, rows, **fields):
    return load_prompts(config(write(tmp_path / "rows.jsonl", rows), **fields), tokenizer)


def test_rows_become_chat_prompts_that_open_the_assistants_turn(tmp_path, tokenizer):
    first, second = load(tmp_path, tokenizer, ROWS)
    assert first.text == "<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(first.token_ids) == first.text
    assert (first.index, first.answer, second.index, second.answer) == (0, "3", 1, "5")


def test_system_prompt_and_thinking_reach_the_template(tmp_path, tokenizer):
    source = write(tmp_path / "rows.jsonl", ROWS[:1])
    [prompt] = load_prompts(PromptSetConfig(source=source, enable_thinking=True), tokenizer)
    assert prompt.text == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_long_prompt_keeps_its_end(tmp_path, tokenizer):
    [whole] = load(tmp_path, tokenizer, ROWS[:1])
    [cut] = load(tmp_path, tokenizer, ROWS[:1], max_prompt_tokens=9)
    assert cut.token_ids == whole.token_ids[-9:]
    assert cut.text == tokenizer.decode(cut.token_ids)


def test_jsonl_json_and_parquet_hold_the_same_set(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "1+2=?", "answer": ["3\n"]}, {"problem": "9-4=?", "answer": ["5"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", rows)
    loaded = [load_prompts(config(tmp_path / f"rows.{kind}"), tokenizer) for kind in ("jsonl", "json", "parquet")]
    assert loaded[0] == loaded[1] == loaded[2]
    assert [prompt.answer for prompt in loaded[0]] == ["3", "5"]


def test_limit_takes_the_first_rows(tmp_path, tokenizer):
    assert [prompt.index for prompt in load(tmp_path, tokenizer, ROWS, limit=1)] == [0]


def test_answer_pattern_cuts_the_answer_out(tmp_path, tokenizer):
    rows = [{"question": "1+2=?", "answer": "One and two.\n#### 3"}]
    [prompt] = load(tmp_path, tokenizer, rows, problem_field="question", answer_pattern="#### (.+)$")
    assert prompt.answer == "3"


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (27.0, "27"),
        (0.5, "0.5"),
        (-3, "-3"),
        ("025", "025"),
        (["9.6\n"], "9.6"),
        (["$69$", 84.0], "$69$, 84"),
        (["1", None], "1"),
        ([[4.0]], "4"),
        ("  ", None),
        (None, None),
        ([], None),
    ],
)
def test_clean_answer(value, answer):
    assert clean_answer(value) == answer


def test_answer_in_the_last_box_of_a_solution(tmp_path, tokenizer):
    rows = [{"problem": "?", "solution": r"First \boxed{1}, at last $\boxed{\frac{1}{2}}$."}]
    [prompt] = load(tmp_path, tokenizer, rows, answer_field="solution", answer_in_box=True)
    assert prompt.answer == r"\frac{1}{2}"


def test_templates_make_problem_and_answer_out_of_fields(tmp_path, tokenizer):
    rows = [{"question": "Which?", "options": ["one", "two"], "answer": "B", "test": 'assert "<" == 1'}]
    [prompt] = load(
        tmp_path,
        tokenizer,
        rows,
        problem_template="{{ question }}\n{{ options | lettered }}\n",
        answer_template="{{ {'letter': answer, 'test': test} | tojson }}",
    )
    assert "Which?\nA. one\nB. two<|im_end|>" in prompt.text
    assert json.loads(prompt.answer) == {"letter": "B", "test": 'assert "<" == 1'}


def test_choices_are_shuffled_by_their_content_alone(tmp_path, tokenizer):
    rows = [{"Question": f"{n}?", "Right": f"r{n}", "Wrong 1": f"x{n}", "Wrong 2": f"y{n}"} for n in range(40)]
    settings = {
        "choices": ChoicesConfig(correct_field="Right", incorrect_fields=["Wrong 1", "Wrong 2"]),
        "problem_template": "{{ Question }}\n{{ options | lettered }}",
    }
    prompts = load(tmp_path, tokenizer, rows, **settings)
    for n, prompt in enumerate(prompts):
        assert f"\n{prompt.answer}. r{n}" in prompt.text
        assert prompt.text.count("\n") == prompts[0].text.count("\n")
    assert {prompt.answer for prompt in prompts} == {"A", "B", "C"}
    moved = load(tmp_path, tokenizer, rows[::-1], **settings)[::-1]
    assert [(prompt.text, prompt.answer) for prompt in moved] == [(prompt.text, prompt.answer) for prompt in prompts]


def test_the_same_choice_twice_is_refused(tmp_path, tokenizer):
    choices = ChoicesConfig(correct_field="a", incorrect_fields=["b"])
    with pytest.raises(UserError, match="row 0 holds the same choice twice"):
        load(tmp_path, tokenizer, [{"problem": "?", "a": "1", "b": "1"}], choices=choices)


def test_compressed_csv_nested_and_several_files(tmp_path, tokenizer):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "rows.csv").write_text('problem,answer\n1+2=?,3\n"9-4=?",5\n')
    (tmp_path / "task_a.json").write_text(json.dumps({"canary": "x", "examples": ROWS[:1]}))
    (tmp_path / "task_b.json").write_text(json.dumps({"examples": ROWS[1:]}))
    packed = load_prompts(config(tmp_path / "rows.jsonl.gz"), tokenizer)
    assert [prompt.answer for prompt in packed] == ["3", "5"]
    assert load_prompts(config(tmp_path / "rows.csv"), tokenizer) == packed
    assert load_prompts(config(tmp_path / "task_*.json", rows_field="examples"), tokenizer) == packed


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"question": "?", "answer": 1}, {}, r"data\.problem_field: row 1 of .* no field `problem`.*`question`, `ans"),
        ({"problem": "?", "gold": 1}, {}, r"data\.answer_field: row 1 of .* no field `answer`.*`problem`, `gold`"),
        ({"problem": "?", "answer": None}, {}, r"row 1 of .* has no answer: its field `answer` holds None"),
        ({"problem": " ", "answer": 1}, {}, r"row 1 of .* has no problem: its field `problem` holds ' '"),
        ({"problem": "?", "answer": [{"a": 1}]}, {}, r"row 1 .* field `answer` is a dict"),
        ({"problem": "?", "answer": r"so \boxed{4"}, {"answer_in_box": True}, r"answer_in_box finds no box"),
        ({"problem": "?", "answer": "4"}, {"problem_template": "{{ question }}"}, r"problem_template: row 0 .*quest"),
        ({"problem": "?", "answer": "4"}, {"answer_template": "{{ answer"}, r"answer_template: not a Jinja template"),
        ({"problem": "?", "answer": {"a": 1}}, {}, r"row 1 .* field `answer` is a dict"),
        ({"problem": "?", "answer": "4"}, {"answer_pattern": "(3|5)"}, r"row 1 of .* answer_pattern '\(3\|5\)' finds"),
        ({"problem": "?", "answer": "4"}, {"answer_pattern": "(4"}, r"answer_pattern: '\(4' is not a regular exp"),
        ({"problem": "?", "answer": "4"}, {"answer_pattern": "4"}, r"answer_pattern: '4' has no group"),
    ],
)
def test_bad_row_is_named(tmp_path, tokenizer, row, fields, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, tokenizer, [{"problem": "1+2=?", "answer": 3}, row], **fields)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no file .*missing.jsonl"),
        ("empty.jsonl", "", "holds no rows"),
        ("broken.jsonl", '{"problem": 1}\n{"problem"', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "row 0 is a list"),
        ("object.json", "{}", "holds a dict, and a list of rows is needed"),
        ("broken.jsonl.gz", "not compressed", "cannot read .*broken.jsonl.gz"),
        ("none_*.json", None, "there is no file .*none_"),
        ("text.parquet", "not parquet", "cannot read .*text.parquet"),
    ],
)
def test_bad_source_is_named(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^evaluation\.sets\.0\.source: .*{message}"):
        load_prompts(config(tmp_path / name), tokenizer, section="evaluation.sets.0")


def test_source_that_is_neither_file_nor_hub_name(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="neither a .jsonl, .json, .csv, .parquet file nor a data set"):
        load_prompts(config(tmp_path / "no-such-folder"), tokenizer)


def test_tokenizer_without_chat_template(tmp_path):
    from examples.tiny_dsrl.tokenizer import build_tokenizer

    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        load(tmp_path, bare, ROWS)


@pytest.mark.needs_data
def test_gsm8k_with_the_real_qwen3_tokenizer(shared_data):
    from megatron_dsrl.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "qwen3-tokenizer"))
    gsm8k = PromptSetConfig(
        source=str(shared_data / "gsm8k" / "train.jsonl"), problem_field="question", answer_pattern="#### (.+)$"
    )
    prompts = load_prompts(gsm8k, tokenizer)
    assert len(prompts) == 7473
    assert prompts[0].answer == "72"
    assert prompts[0].text.startswith("<|im_start|>system\nPlease reason step by step")
    assert prompts[0].text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert all(prompt.answer.replace(",", "").lstrip("-").replace(".", "").isdecimal() for prompt in prompts)
