"""The example of a tool: its documents, that its runs differ in the tool alone, and their table."""

import json
import random
from dataclasses import replace

from examples.tiny_dsrl.tokenizer import PIECES, build_tokenizer
from examples.tool_use.make_base import MARKERS, PROBLEMS, Settings, documents
from examples.tool_use.table import main
from examples.tool_use.task import Product, different_products, split_of
from megatron_dsrl.config.load import load_config
from megatron_dsrl.rewards.boxed import boxed
from megatron_dsrl.rollout.custom_generation import custom_generation
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.rollout.tool_chat import ToolChat
from tests.observability.synthetic_run import make_group, make_sample
from tests.support.tiny_run import REPOSITORY

FOLDER = REPOSITORY / "examples" / "tool_use"


def test_every_document_is_right_and_some_have_a_call() -> None:
    tokenizer = build_tokenizer((*PIECES, *MARKERS))
    assert all(len(tokenizer.encode(marker, add_special_tokens=False)) == 1 for marker in MARKERS)
    calls = 0
    batches = documents(tokenizer, replace(Settings(), documents_per_step=200))
    for document in next(batches):
        question = tokenizer.decode(document.token_ids[: document.num_context]).split("\n")[1]
        left, right = map(int, question.removesuffix("=?<|im_end|>").split("*"))
        text = tokenizer.decode(document.token_ids[document.num_context : -1])
        assert split_of(Product(left, right)) == "corpus" and boxed(text, str(left * right)) == 1.0
        call = f"<tool>{left}*{right}</tool><result>{left * right}</result>"
        assert text in (f"{call}\\boxed{{{left * right}}}", f"\\boxed{{{left * right}}}")
        calls += text.startswith("<tool>")
    assert 20 < calls < 60


def test_the_splits_have_enough_problems_and_none_twice() -> None:
    chosen = [set(different_products(split, count, random.Random(1))) for split, count in PROBLEMS.items()]
    assert [len(each) for each in chosen] == list(PROBLEMS.values()) and not set.intersection(*chosen)


def test_the_runs_differ_in_the_tool_alone() -> None:
    with_tool, without = load_config(FOLDER / "run.yaml"), load_config(FOLDER / "without_tool.yaml")
    assert isinstance(custom_generation(with_tool.rollout, list, str).function, ToolChat)
    rollout = with_tool.rollout.model_copy(update={"generate": None, "generate_options": {}})
    assert with_tool.model_copy(update={"name": "without_tool", "rollout": rollout}) == without


def test_the_table_has_a_line_per_evaluation_of_every_run(tmp_path, capsys) -> None:
    evaluations = [{"step": step, "set": "held_out", "accuracy": step / 8} for step in (0, 5)]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in evaluations))
    samples = (make_sample(1.0, text="<tool>6*7</tool>"), *(make_sample(0.0) for _ in range(3)))
    write_groups(rollout_file(tmp_path, 5), [SampleGroup(make_group([]).prompt, samples)])
    main([tmp_path])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| 0 | 0.0 % |  |  |", "| 5 | 62.5 % | 0.25 | 25 % |"]
