"""The checks of a run against its model and data."""

import errno
import json
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.config.summary import sampling_warnings
from megatron_dsrl.config.yaml_text import format_yaml
from megatron_dsrl.run.preflight import preflight

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 1000000,
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run whose model folder and prompts exist."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3))
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 8)
    run = {
        "name": "small",
        "steps": 4,
        "model": {"path": str(tmp_path / "model")},
        "data": {"source": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 100},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 60},
        "phases": [{"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_mean"}}],
    }
    (tmp_path / "run.yaml").write_text(format_yaml(run))
    return load_config(tmp_path / "run.yaml")


def test_figures_use_the_prompt_file_and_checks_use_the_model(config, tmp_path) -> None:
    assert preflight(config, 1).epochs == 2.0
    with pytest.raises(UserError, match="model's 2 layers cannot be split 4 ways"):
        preflight(load_config(tmp_path / "run.yaml", ["parallel.pipeline_parallel_size=4"]), 4)


def test_a_missing_model_folder_is_not_looked_up_on_the_hub(config, tmp_path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("./base", "/no/such/base", "a/b/c", "base", "runs/base", "my models/x", "$HOME/x"):
        with pytest.raises(UserError, match=f"^model.path: no such folder: {re.escape(path)}; make or download"):
            preflight(load_config("run.yaml", [f"model.path={path}"]), 1)


@pytest.mark.parametrize("content", [None, "{", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_damaged_or_foreign_model_folder_names_its_file(config, tmp_path, content) -> None:
    file = tmp_path / "model" / "config.json"
    file.unlink()
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "model")):
        preflight(config, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["critic.warmup_steps=1"], "critic.warmup_steps: is 1, but no critic learns in step 1"),
        (["phases.0.advantage={name: gae}", "critic.warmup_steps=9"], "no critic learns in step 5"),
        (["phases.0.advantage={name: gae}", "critic.path=./absent"], "critic.path: no such folder: ./absent"),
        (["reference.refresh_every_steps=2"], "reference: no phase has a `kl` section.* leave out refresh_every"),
        (["phases.0.advantage=distillation", "reference.path=./absent"], "reference.path: no such folder: ./absent"),
        (
            ["phases.0.advantage=distillation", "reference.url=http://127.0.0.1:1", "rollout.temperature=0.5"],
            "a server's log-probs are at temperature 1, but rollout.temperature is 0.5",
        ),
    ],
)
def test_critic_and_reference_must_be_of_use(config, tmp_path, overrides, message) -> None:
    used = ["phases.0.advantage={name: gae}", "phases.0.kl={loss_coefficient: 0.1}"]
    settings = ["critic.warmup_steps=4", "reference.refresh_every_steps=2"]
    preflight(load_config(tmp_path / "run.yaml", used + settings), 1)
    with pytest.raises(UserError, match=message):
        preflight(load_config(tmp_path / "run.yaml", overrides), 1)


@pytest.mark.parametrize(
    ("field", "changes", "message"),
    [
        ("reference", {"rope_theta": 10000}, r"has rope_theta 10000.0; the policy: rope_theta 1000000.0"),
        (
            "reference",
            {"architectures": ["LlamaForCausalLM"], "head_dim": 8},
            "has family LlamaForCausalLM, head_dim 8",
        ),
        ("critic", {"architectures": ["Qwen3ForTokenClassification"], "num_hidden_layers": 3}, "num_hidden_layers 3"),
        ("reference", None, "other has no config.json, .*`dsrl convert megatron-to-hf` converts a run's checkpoint"),
        ("reference", {"max_position_embeddings": 512, "initializer_range": 0.1}, None),
        ("critic", {"architectures": ["Qwen3ForTokenClassification"]}, None),
    ],
)
def test_critic_and_reference_have_the_policys_architecture(config, tmp_path, field, changes, message) -> None:
    """A teacher's weights of the same shapes but with another RoPE base would silently give other log-probs."""
    (tmp_path / "other").mkdir()
    if changes is not None:
        (tmp_path / "other" / "config.json").write_text(json.dumps(QWEN3 | changes))
    used = {"critic": "phases.0.advantage={name: gae}", "reference": "phases.0.kl={loss_coefficient: 0.1}"}
    config = load_config(tmp_path / "run.yaml", [f"{field}.path={tmp_path}/other", used[field]])
    with pytest.raises(UserError, match=f"^{field}.path: .*{message}") if message else nullcontext():
        preflight(config, 1)


def test_what_is_missing_and_can_be_made_is_named_with_its_command(config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_by = "made_by={.cache/task: bash make.sh}"
    for override in ("model.path=.cache/task/base", "data.source=.cache/task/train.jsonl"):
        field, _, path = override.partition("=")
        with pytest.raises(UserError, match=rf"{field}: no such (folder|file): {path}; `bash make.sh` makes it"):
            preflight(load_config("run.yaml", [made_by, override]), 1)
    with pytest.raises(UserError, match="make or download the model first"):
        preflight(load_config("run.yaml", [made_by, "model.path=./other"]), 1)


def test_published_sizes_need_neither_a_network_nor_the_model(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))
    figures = preflight(load_config(tmp_path / "run.yaml", ["model.path=Qwen/Qwen3-30B-A3B"]), 1)
    assert figures.samples_per_step == 16


def test_a_temporary_folder_whose_name_is_too_long_for_sockets_is_named(config, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 73)
    with pytest.raises(UserError, match="TMPDIR: /xxx.* has 74 bytes, but at most 73 .*; set it to a shorter"):
        preflight(config, 1)
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 72)
    preflight(config, 1)


def test_a_temporary_folder_that_cannot_be_written_to_is_named(config, monkeypatch) -> None:
    """As where a cluster's TMPDIR is a job's folder that other nodes do not have."""
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    with pytest.raises(UserError, match="^TMPDIR: /no/such/folder is not a folder that can be written to"):
        preflight(config, 1)

    def none_found() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(tempfile, "gettempdir", none_found)
    with pytest.raises(UserError, match="^TMPDIR: No usable temporary directory found in"):
        preflight(config, 1)


def test_cut_distributions_are_named_before_the_start(config) -> None:
    assert sampling_warnings(config.rollout) == []
    rollout = config.rollout.model_copy(update={"top_p": 0.7, "top_k": 20})
    (warning,) = sampling_warnings(rollout)
    assert "rollout.top_p=0.7 and rollout.top_k=20" in warning and "off-policy, and no metric" in warning
    (warning,) = sampling_warnings(rollout.model_copy(update={"top_k": -1}))
    assert "off-policy (sampled tokens were up to 1.43 times as likely, 0.36 nats)" in warning


def test_a_replay_cannot_evaluate(config) -> None:
    rollout = config.rollout.model_copy(update={"replay_from": "runs/recorded"})
    held_out = {"name": "held-out", "source": config.data.source, "max_prompt_tokens": 64}
    evaluation = config.evaluation.model_validate({"sets": [held_out]})
    replay = config.model_copy(update={"rollout": rollout, "evaluation": evaluation})
    with pytest.raises(UserError, match="rollout.replay_from, evaluation.sets: a replay starts no engines"):
        preflight(replay, 1)
    preflight(replay.model_copy(update={"evaluation": config.evaluation.model_validate({"sets": []})}), 1)


def test_a_held_out_set_has_its_own_length_limit(config) -> None:
    own = {"name": "long", "source": config.data.source, "max_prompt_tokens": 100, "max_response_tokens": 200}
    evaluation = config.evaluation.model_validate({"sets": [own]})
    with pytest.raises(
        UserError, match=r"evaluation.sets.0.max_prompt_tokens, evaluation.sets.0.max_response_tokens.*100 \+ 200 = 300"
    ):
        preflight(config.model_copy(update={"evaluation": evaluation}), 1)
