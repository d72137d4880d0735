"""The model card of an exported policy: what it says, what it leaves out, and who owns it."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.results import write_results
from megatron_dsrl.evaluation.sample_file import ProblemResult
from megatron_dsrl.publishing.card import CARD_FILE, model_card, refresh_card, without_private_places, write_card
from tests.observability.synthetic_run import make_group, start_record, write_run, write_starts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """12 steps, 4 of them in pre-train space, from a hub model; AMC23 evaluated after step 12."""
    folder = tmp_path / "tiny"
    write_run(folder, steps=12)
    write_starts(folder, start_record())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["path"] = "Qwen/Qwen3-8B"
    config["engine"]["urls"] = ["http://node7:30000"]
    config["output_dir"] = "/home/someone/runs"
    config["reward"]["options"] = {"file": "/home/someone/tests.json"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "evaluation" / "step_000012").mkdir(parents=True)
    problems = [ProblemResult.of_group(make_group([1.0, 0.0, 0.0, 0.0], index)) for index in range(2)]
    summary = {"title": "AMC23", **summarise_benchmark(problems, None)}
    write_results(folder / "evaluation" / "step_000012", "hf", {"amc23": summary}, 12)
    return folder


def test_the_hub_reads_base_model_data_paper_and_results(run: Path) -> None:
    data = ModelCard(model_card(run, 12)).data
    assert (data.base_model, data.datasets, data.library_name) == ("Qwen/Qwen3-8B", ["openai/gsm8k"], "transformers")
    assert "arxiv:2604.14142" in data.tags and data.pipeline_tag == "text-generation"
    found = {(one.dataset_name, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {("AMC23", "Avg@4"): 25.0, ("AMC23", "Pass@4"): 100.0, ("held-out", "Avg@1"): 60.0}
    assert {one.dataset_type for one in data.eval_results} == {"math-ai/amc23", "held-out"}


def test_people_read_method_results_and_what_made_it(run: Path) -> None:
    text = ModelCard(model_card(run, 12)).text
    assert "| nsr-prerl | 1 to 4 | log P(y) | group_mean | negative | dual_clip | 0.01 |" in text
    assert "| grpo | 5 to 12 | log P(y\\|x) | group_standardised | all | dual_clip | 1.0 |" in text
    assert "| held-out | 256 | 1 | 60.0 ± 3.1 |  | 25.0 |" in text
    assert "| Commit | cccccccccccc |" in text and "| torch | 2.14.1 |" in text
    assert "learning_rate: 0.0003" in text and "tan2026prerl" in text


def test_a_policy_before_the_end_has_the_phases_and_results_until_then(run: Path) -> None:
    card = ModelCard(model_card(run, 4))
    assert "| nsr-prerl | 1 to 4 |" in card.text and "| grpo |" not in card.text
    assert [one.metric_value for one in card.data.eval_results] == [36.67]
    unevaluated = ModelCard(model_card(run, 3))
    assert unevaluated.data.eval_results is None and "was not evaluated" in unevaluated.text


def test_only_a_run_in_pre_train_space_cites_its_paper(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["phases"] = config["phases"][1:]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = model_card(run, 12)
    assert "2604.14142" not in text and "| grpo | 1 to 12 |" in text


def test_lora_adapters_are_mentioned_where_they_are(run: Path) -> None:
    assert "LoRA" not in ModelCard(model_card(run, 12)).text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["actor"] = {"lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = ModelCard(model_card(run, 12)).text
    assert "LoRA adapters of rank 8" in text and "`adapter/` has the adapters alone" in text


def test_folders_and_addresses_of_the_machines_stay_private(run: Path) -> None:
    write_starts(run, start_record(data={"source": "/home/someone/train.jsonl", "prompts": 3, "prompts_sha256": "a"}))
    text = model_card(run, 12)
    assert "someone" not in text and "node7" not in text and "node1" not in text
    assert "train.jsonl, 3 problems" in text and "tests.json" in text


def test_a_card_is_updated_until_the_user_writes_their_own(run: Path) -> None:
    export = run / "hf" / "step_000012"
    refresh_card(run, 12, pytest.fail)  # it was not exported: nothing to do
    export.mkdir(parents=True)
    refresh_card(run, 12, pytest.fail)
    assert "AMC23" in (export / CARD_FILE).read_text()
    (run / "evaluation" / "step_000012" / "results.json").unlink()
    refresh_card(run, 12, pytest.fail)
    assert "AMC23" not in (export / CARD_FILE).read_text()
    (export / CARD_FILE).write_text("# My own words\n")
    refresh_card(run, 12, pytest.fail)
    assert (export / CARD_FILE).read_text() == "# My own words\n"


def test_a_card_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    write_card(tmp_path, tmp_path / "no run", 1, warnings.append)
    assert len(warnings) == 1 and "config.yaml is not a run's configuration" in warnings[0]


def test_private_places_of_a_configuration() -> None:
    config = {"a": ["/scratch/x/base", "configs/y.yaml"], "b": {"urls": ["http://node7:30000"], "c": 1.5}, "d": None}
    assert without_private_places(config) == {
        "a": ["base", "configs/y.yaml"],
        "b": {"urls": ["(an address)"], "c": 1.5},
        "d": None,
    }
