"""Prompt sets: rows become rendered, tokenised prompts with clean gold answers, and every bad row is named."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import ChoicesConfig, PromptSetConfig
from megatron_dsrl.data.fields import clean_answer
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.prompts import load_prompts

ROWS = [{"problem": "1+2=?", "answer": 3}, {"problem": "9-4=?", "answer": " 5 "}]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(source: str | Path, **fields: Any) -> PromptSetConfig:
    return PromptSetConfig(source=str(source), system_prompt=None, **fields)


def load(tmp_path: Path, tokenizer, rows: Sequence[Any], **fields: Any) -> list[Prompt]:
    return load_prompts(config(write(tmp_path / "rows.jsonl", rows), **fields), tokenizer)


def test_rows_become_chat_prompts_that_open_the_assistants_turn(tmp_path, tokenizer) -> None:
    first, second = load(tmp_path, tokenizer, ROWS)
    assert first.text == "<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(first.token_ids) == first.text
    assert (first.index, first.answer, second.index, second.answer) == (0, "3", 1, "5")


def test_system_prompt_and_thinking_reach_the_template(tmp_path, tokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS[:1])
    [prompt] = load_prompts(PromptSetConfig(source=source, enable_thinking=True), tokenizer)
    assert prompt.text == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_long_prompt_keeps_its_end(tmp_path, tokenizer) -> None:
    [whole] = load(tmp_path, tokenizer, ROWS[:1])
    [cut] = load(tmp_path, tokenizer, ROWS[:1], max_prompt_tokens=9)
    assert cut.token_ids == whole.token_ids[-9:]
    assert cut.text == tokenizer.decode(cut.token_ids)


def test_jsonl_json_and_parquet_hold_the_same_set(tmp_path, tokenizer) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "1+2=?", "answer": ["3\n"]}, {"problem": "9-4=?", "answer": ["5"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", rows)
    loaded = [load_prompts(config(tmp_path / f"rows.{kind}"), tokenizer) for kind in ("jsonl", "json", "parquet")]
    assert loaded[0] == loaded[1] == loaded[2]
    assert [prompt.answer for prompt in loaded[0]] == ["3", "5"]


def test_limit_takes_the_first_rows(tmp_path, tokenizer) -> None:
    assert [prompt.index for prompt in load(tmp_path, tokenizer, ROWS, limit=1)] == [0]


def test_answer_pattern_cuts_the_answer_out(tmp_path, tokenizer) -> None:
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
def test_clean_answer(value, answer) -> None:
    assert clean_answer(value) == answer


def test_answer_in_the_last_box_of_a_solution(tmp_path, tokenizer) -> None:
    rows = [{"problem": "?", "solution": r"First \boxed{1}, at last $\boxed{\frac{1}{2}}$."}]
    [prompt] = load(tmp_path, tokenizer, rows, answer_field="solution", answer_in_box=True)
    assert prompt.answer == r"\frac{1}{2}"


def test_templates_make_problem_and_answer_out_of_fields(tmp_path, tokenizer) -> None:
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


def test_choices_are_shuffled_by_their_content_alone(tmp_path, tokenizer) -> None:
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


def test_the_same_choice_twice_is_refused(tmp_path, tokenizer) -> None:
    choices = ChoicesConfig(correct_field="a", incorrect_fields=["b"])
    with pytest.raises(UserError, match="row 0: data.choices: the same choice occurs twice"):
        load(tmp_path, tokenizer, [{"problem": "?", "a": "1", "b": "1"}], choices=choices)


def test_compressed_csv_nested_and_several_files(tmp_path, tokenizer) -> None:
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
        ({"question": "?", "answer": 1}, {}, r"row 1: data\.problem_field: the row has no field `problem`; .*`quest"),
        ({"problem": "?", "gold": 1}, {}, r"row 1: data\.answer_field: the row has no field `answer`; .*, `gold`"),
        ({"problem": "?", "answer": None}, {}, r"row 1: it has no answer: its field `answer` holds None"),
        ({"problem": " ", "answer": 1}, {}, r"row 1: it has no problem: its field `problem` holds ' '"),
        ({"problem": "?", "answer": [{"a": 1}]}, {}, r"row 1: .* field `answer` is a dict"),
        ({"problem": "?", "answer": float("nan")}, {}, r"row 1: .* field `answer` is nan, expected a string"),
        ({"problem": "?", "answer": [float("-inf")]}, {}, r"row 1: .* field `answer` is -inf"),
        ({"problem": "half \ud83d", "answer": 1}, {}, r"row 1: its problem holds half a character .*ud83d"),
        ({"problem": "?", "answer": "\udc00"}, {}, r"row 1: its field `answer` holds half a character"),
        ({"problem": "?", "answer": r"so \boxed{4"}, {"answer_in_box": True}, r"answer_in_box finds no box"),
        (
            {"problem": "?", "answer": "4"},
            {"problem_template": "{{ question }}"},
            r"2 of 2 rows .*\n  row 0: data.problem_template cannot be rendered: .quest",
        ),
        ({"problem": "?", "answer": "4"}, {"answer_template": "{{ answer"}, r"answer_template: not a Jinja template"),
        (
            {"problem": "?", "answer": "4"},
            {"answer_template": "{{ 1 // (answer | int - 4) }}"},
            r"row 1: data.answer_template cannot be rendered: integer division or modulo by zero",
        ),
        ({"problem": "?", "answer": {"a": 1}}, {}, r"row 1: .* field `answer` is a dict"),
        ({"problem": "?", "answer": "4"}, {"answer_pattern": "(3|5)"}, r"row 1: answer_pattern '\(3\|5\)' finds"),
        ({"problem": "?", "answer": "4"}, {"answer_pattern": "(4"}, r"answer_pattern: '\(4' is not a regular exp"),
        ({"problem": "?", "answer": "4"}, {"answer_pattern": "4"}, r"answer_pattern: '4' has no group"),
    ],
)
def test_bad_row_is_named(tmp_path, tokenizer, row, fields, message) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, tokenizer, [{"problem": "1+2=?", "answer": 3}, row], **fields)


def test_bad_rows_are_counted_and_the_first_ones_named(tmp_path, tokenizer, caplog) -> None:
    rows = [*ROWS, *({"problem": "?", "answer": None} for _ in range(7))]
    with pytest.raises(UserError, match=r"(?s)7 of 9 rows of .*on_bad_row=drop.*row 2: .*row 6: .*and 2 more"):
        load(tmp_path, tokenizer, rows)
    prompts = load(tmp_path, tokenizer, rows, on_bad_row="drop")
    assert [prompt.index for prompt in prompts] == [0, 1]
    assert "data: dropped 7 of 9 rows, which cannot be used; row 2: it has no answer" in caplog.text
    with pytest.raises(UserError, match="1 of 1 rows"):
        load(tmp_path, tokenizer, rows[2:3], on_bad_row="drop")


def test_prompts_that_are_too_long_are_counted_and_dropped_or_refused(tmp_path, tokenizer, caplog) -> None:
    rows = [*ROWS, {"problem": "1" * 100, "answer": 1}]
    found = r"1 of 3 prompts are longer than data.max_prompt_tokens = 50 \(the longest has 1\d\d, row 2 is the first"
    with pytest.raises(UserError, match=found):
        load(tmp_path, tokenizer, rows, max_prompt_tokens=50, on_long_prompt="error")
    dropped = load(tmp_path, tokenizer, rows, max_prompt_tokens=50, on_long_prompt="drop")
    assert [prompt.index for prompt in dropped] == [0, 1]
    cut = load(tmp_path, tokenizer, rows, max_prompt_tokens=50)
    assert [len(prompt.token_ids) == 50 for prompt in cut] == [False, False, True]
    assert "and are dropped" in caplog.text and "and are truncated on the left" in caplog.text


class TestFromElsewhere:
    """Rows as other stacks keep them, without rewriting a file."""

    VERL = {
        "data_source": "math",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+2=?"}],
        "reward_model": {"style": "rule", "ground_truth": "3"},
    }

    def test_a_chat_with_its_own_system_turn(self, tmp_path, tokenizer) -> None:
        fields = {"messages_field": "prompt", "answer_field": "reward_model.ground_truth"}
        source = write(tmp_path / "rows.jsonl", [self.VERL])
        [prompt] = load_prompts(PromptSetConfig(source=source, **fields), tokenizer)
        assert prompt.text.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+2=?<|im_end|>")
        assert prompt.text.count("system") == 1 and prompt.answer == "3"

    def test_several_turns_with_the_configurations_system_turn(self, tmp_path, tokenizer) -> None:
        turns = [("user", "1+2=?"), ("assistant", "3"), ("user", "and 4 more?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        source = write(tmp_path / "rows.jsonl", [{"messages": messages, "answer": 7}])
        settings = PromptSetConfig(source=source, system_prompt="Add.", messages_field="messages")
        [prompt] = load_prompts(settings, tokenizer)
        order = [prompt.text.index(part) for part in ("Add.", "1+2=?", "3<|im_end|>", "and 4 more?")]
        assert order == sorted(order)

    def test_objects_in_json_texts(self, tmp_path, tokenizer) -> None:
        row = {"prompt": json.dumps(self.VERL["prompt"]), "reward_model": json.dumps(self.VERL["reward_model"])}
        fields = {"problem_field": "prompt.-1.content", "answer_field": "reward_model.ground_truth"}
        [prompt] = load(tmp_path, tokenizer, [row], **fields)
        assert "user\n1+2=?<|im_end|>" in prompt.text and prompt.answer == "3"

    def test_a_field_with_a_dot_in_its_name_comes_before_a_path(self, tmp_path, tokenizer) -> None:
        [prompt] = load(tmp_path, tokenizer, [{"problem": "?", "a.b": 1, "a": {"b": 2}}], answer_field="a.b")
        assert prompt.answer == "1"

    def test_a_list_of_accepted_answers(self, tmp_path, tokenizer) -> None:
        row = {"problem": "?", "answer": ["0.5", "1/2", 2.0]}
        [together] = load(tmp_path, tokenizer, [row])
        [each] = load(tmp_path, tokenizer, [row], answer_list="any")
        assert (together.answer, together.other_answers) == ("0.5, 1/2, 2", ())
        assert (each.answer, each.other_answers) == ("0.5", ("1/2", "2"))
        row["answer"] = '["0.5", null, "1/2"]'
        [as_text] = load(tmp_path, tokenizer, [row], answer_list="any")
        assert (as_text.answer, as_text.other_answers) == ("0.5", ("1/2",))

    def test_a_turn_in_parts_of_text(self, tmp_path, tokenizer) -> None:
        parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2=?"}]
        rows = [{"messages": [{"role": "user", "content": parts}], "answer": 3}]
        [prompt] = load(tmp_path, tokenizer, rows, messages_field="messages")
        assert "user\n1+2=?<|im_end|>" in prompt.text

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("hello", "expected a non-empty list of chat turns, got .hello"),
            ([], "expected a non-empty list of chat turns, got "),
            ([{"role": "human", "content": "?"}], "turn 0 needs a role"),
            ([{"role": "user", "content": None}], "turn 0 needs a role"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "turn 0 needs a role"),
            (
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
                "the last turn must be the user's, not the assistant's",
            ),
        ],
    )
    def test_a_chat_that_is_none(self, tmp_path, tokenizer, messages, message) -> None:
        with pytest.raises(UserError, match=message):
            load(tmp_path, tokenizer, [{"chat": messages, "answer": 1}], messages_field="chat")

    def test_marks_suffixes_and_lines_of_other_programs(self, tmp_path, tokenizer) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        files = {
            "excel.csv": "\ufeffproblem,answer\n1+2=?,3\n9-4=?,5\n",
            "tabs.tsv": "problem\tanswer\n1+2=?\t3\n9-4=?\t5\n",
            "mark.jsonl": "\ufeff" + lines,
            "lines.json": lines,
            "lines.ndjson": lines,
            "LINES.JSONL": lines,
        }
        for name, content in files.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
            prompts = load_prompts(config(f"file://{tmp_path / name}"), tokenizer)
            assert [prompt.answer for prompt in prompts] == ["3", "5"], name

    def test_folders_of_save_to_disk(self, tmp_path, tokenizer) -> None:
        import datasets

        rows = datasets.Dataset.from_list([{"problem": "1+2=?", "answer": "3"}])
        rows.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
        for folder in ("one", "splits"):
            assert [prompt.answer for prompt in load_prompts(config(tmp_path / folder), tokenizer)] == ["3"]
        with pytest.raises(UserError, match="data.split: .* has no split 'test'; its splits are train"):
            load_prompts(config(tmp_path / "splits", split="test"), tokenizer)

    def test_a_file_of_an_unknown_kind(self, tmp_path, tokenizer) -> None:
        (tmp_path / "rows.txt").write_text("?")
        with pytest.raises(UserError, match="rows.txt has an unknown suffix; use .jsonl, "):
            load_prompts(config(tmp_path / "rows.txt"), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file: .*missing.jsonl"),
        ("empty.jsonl", "", "holds no rows"),
        ("broken.jsonl", '{"problem": 1}\n{"problem"', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "row 0 is a list"),
        ("object.json", '{"train": []}', "the fields train, not a list of rows; rows_field names the field"),
        ("broken.jsonl.gz", "not compressed", "cannot read .*broken.jsonl.gz"),
        ("none_*.json", None, "no such file: .*none_"),
        ("text.parquet", "not parquet", "cannot read .*text.parquet"),
    ],
)
def test_bad_source_is_named(tmp_path, tokenizer, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^evaluation\.sets\.0\.source: .*{message}"):
        load_prompts(config(tmp_path / name), tokenizer, section="evaluation.sets.0")


def test_source_that_is_neither_file_nor_hub_name(tmp_path, tokenizer, monkeypatch) -> None:
    """A hub that is out of reach is asked once, not again for every data set."""
    asked: list[object] = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("megatron_dsrl.data.rows.can_reach_hub", lambda: False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **options: asked.append(address))
    with pytest.raises(UserError, match="data.source: no such file or folder: .*no-such-folder; create it, or"):
        load_prompts(config(tmp_path / "no-such-folder"), tokenizer)
    with pytest.raises(UserError, match="not a local .jsonl, .ndjson, .json, .csv, .*, and .* cannot be reached"):
        load_prompts(config("someone/nothing"), tokenizer)
    assert not asked


def test_a_chat_template_that_refuses_a_prompt(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}?"
    )
    source = write(tmp_path / "rows.jsonl", ROWS)
    found = "data: the model's chat template fails for row 0: System role not supported.* needs data.system_prompt=null"
    with pytest.raises(UserError, match=found):
        load_prompts(PromptSetConfig(source=source, system_prompt="Add."), tokenizer)
    assert [prompt.text for prompt in load_prompts(config(source), tokenizer)] == ["?", "?"]


def test_tokenizer_without_chat_template(tmp_path) -> None:
    from examples.tiny_dsrl.tokenizer import build_tokenizer

    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        load(tmp_path, bare, ROWS)


@pytest.mark.needs_data
def test_gsm8k_with_the_real_qwen3_tokenizer(shared_data) -> None:
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
