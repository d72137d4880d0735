"""Sources, targets and layouts that a conversion refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.conversions import QUERY, VOCAB_SIZE, change_config, change_weights, convert
from tests.support.families import FAMILIES
from tests.support.tiny_model import LLAMA3, YARN, make_tiny_qwen3


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "much"])
def test_a_file_size_is_a_number_above_0(tmp_path, capsys, size) -> None:
    with pytest.raises(SystemExit):
        convert("megatron-to-hf", tmp_path, tmp_path / "back", f"--file-gigabytes={size}")
    assert f"expected a number above 0, got {size}" in capsys.readouterr().err


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


REFUSALS = {
    "unsupported architecture": (
        lambda folder: change_config(folder, architectures=["MistralForCausalLM"]),
        "names MistralForCausalLM; supported are Qwen3ForCausalLM, Qwen3MoeForCausalLM, Qwen2ForCausalLM",
    ),
    "missing tensor": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop(QUERY)),
        f"missing tensors: {QUERY}",
    ),
    "surplus tensor": (
        lambda folder: change_weights(folder, lambda tensors: tensors.update(surplus=torch.zeros(1))),
        "tensors that the model of config.json does not have: surplus (in model.safetensors)",
    ),
    "wrong shape": (
        lambda folder: change_weights(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY][:64].clone()})),
        f"{QUERY} (in model.safetensors) is [64, 64], config.json asks for [128, 64]",
    ),
    "truncated file": (truncate, "model.safetensors cannot be read: it is truncated, its header promises"),
    "vocabulary of another model": (
        lambda folder: change_config(folder, vocab_size=130),
        "model.embed_tokens.weight (in model.safetensors) is [101, 64], config.json asks for [130, 64]",
    ),
    "tokenizer of another model": (
        lambda folder: (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<|end|>", "id": 101}]})
        ),
        "tokenizer.json has token ids up to 101 ('<|end|>'), but vocab_size in config.json is 101",
    ),
    "vocabulary file of another model": (
        lambda folder: (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 101})),
        "vocab.json has token ids up to 101 ('b'), but vocab_size in config.json is 101",
    ),
    "added tokens of another model": (
        lambda folder: (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 102})),
        "added_tokens.json has token ids up to 102 ('<|end|>'), but vocab_size",
    ),
    "added tokens of another tokenizer configuration": (
        lambda folder: (folder / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": {"9": {"content": "x"}, "103": {"content": "<|end|>"}}})
        ),
        "tokenizer_config.json has token ids up to 103 ('<|end|>'), but vocab_size",
    ),
    "mixed dtypes": (
        lambda folder: change_weights(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].bfloat16()})),
        "stores its weights in several dtypes",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_sources_are_refused_and_nothing_is_written(tmp_path, capsys, case) -> None:
    damage, message = REFUSALS[case]
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)
    damage(tmp_path / "hf")
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def dangling_link(folder: Path) -> None:
    """As a snapshot in the hub's cache whose file was removed."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob")


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16000000000\n"

OTHER_SOURCES = {
    "pickled weights": ("hf-to-megatron", only_pickled, "holds its weights in pytorch_model.bin, which is not read"),
    "a link that leads nowhere": (
        "hf-to-megatron",
        dangling_link,
        "hf/blob, which does not exist; download the model again",
    ),
    "shards without their index": (
        "hf-to-megatron",
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "hf lacks model.safetensors.index.json, which says where its tensors are; download it",
    ),
    "pointers of Git LFS": (
        "hf-to-megatron",
        lambda folder: (folder / "model.safetensors").write_text(LFS_POINTER),
        "model.safetensors cannot be read as safetensors: it is a Git LFS pointer, not the file itself",
    ),
    "a tokenizer that is a pointer": (
        "hf-to-megatron",
        lambda folder: (folder / "tokenizer.json").write_text(LFS_POINTER),
        "tokenizer.json cannot be read: it is a Git LFS pointer, not the file itself; install Git LFS and run `git lfs",
    ),
    "no weights": (
        "hf-to-megatron",
        lambda folder: (folder / "model.safetensors").unlink(),
        "hf holds no weights: neither model.safetensors nor model.safetensors.index.json\n",
    ),
    "a run": (
        "hf-to-megatron",
        lambda folder: (folder / "config.yaml").touch(),
        "is a run's folder; to convert its newest checkpoint, use `dsrl convert megatron-to-hf`",
    ),
    "the other direction": ("megatron-to-hf", lambda folder: None, "is an HF folder, not a Megatron checkpoint; `dsrl"),
    "Megatron-LM's checkpoints": (
        "megatron-to-hf",
        lambda folder: (
            shutil.copytree(folder.parent / "megatron", folder / "iter_0000010"),
            (folder / "latest_checkpointed_iteration.txt").write_text("10"),
        ),
        "holds Megatron-LM's checkpoints by iteration; name one of them, such as iter_0000010",
    ),
    "Megatron-LM's older format": (
        "megatron-to-hf",
        lambda folder: (folder / "mp_rank_00").mkdir(),
        "is a checkpoint in Megatron-LM's older format `torch`; only `torch_dist` is read",
    ),
}


@pytest.mark.parametrize("case", OTHER_SOURCES)
def test_other_sources_are_named_with_what_to_do(converted, capsys, case) -> None:
    direction, change, message = OTHER_SOURCES[case]
    change(converted / "hf")
    assert convert(direction, converted / "hf", converted / "target") == 2
    assert message in capsys.readouterr().err


def test_a_megatron_checkpoint_is_not_converted_to_one(converted, capsys) -> None:
    assert convert("hf-to-megatron", converted / "megatron", converted / "target") == 2
    assert "is a Megatron checkpoint, not an HF folder; use `dsrl convert megatron-to-hf`" in capsys.readouterr().err


def test_experts_in_one_tensor_are_refused_by_name(tmp_path, capsys) -> None:
    FAMILIES["Qwen3-MoE"](tmp_path / "hf", vocab_size=VOCAB_SIZE)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    change_weights(tmp_path / "hf", lambda tensors: tensors.update({fused: torch.zeros(4, 96, 64)}))
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "target") == 2
    assert f"{fused} holds all experts of a layer in one tensor" in capsys.readouterr().err


DRIFTS = {
    "RoPE base": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is 10000.0"),
    "RoPE scaling": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "RoPE scaling of type 'linear'"),
    "YaRN": ({"rope_parameters": YARN}, "yarn_factor is 4.0"),
    "Llama 3": ({"rope_parameters": LLAMA3}, "llama3_factor is 8.0"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "head dimension": ({"head_dim": 64}, "head_dim is 64"),
    "norm epsilon": ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    "vocabulary": ({"vocab_size": 102}, "vocab_size is 102"),
}


@pytest.mark.parametrize("case", DRIFTS)
def test_a_changed_configuration_is_refused(converted, capsys, case) -> None:
    """In the checkpoint's folder itself, and against `--expect`."""
    changes, message = DRIFTS[case]
    change_config(converted / "megatron", **changes)
    assert convert("megatron-to-hf", converted / "megatron", converted / "back") == 2
    assert message in capsys.readouterr().err
    if case == "RoPE scaling":
        return
    assert convert("hf-to-megatron", converted / "hf", converted / "x", "--expect", converted / "megatron") == 2
    assert message.split(" is ")[0] in capsys.readouterr().err


def test_the_model_of_a_run_may_be_what_is_expected(converted, capsys) -> None:
    """`--expect` with the YAML of a run, whose `model.path` has another norm epsilon."""
    make_tiny_qwen3(converted / "other", tied=False, vocab_size=VOCAB_SIZE)
    change_config(converted / "other", rms_norm_eps=1e-5)
    tiny = Path(__file__).parents[2] / "configs" / "tiny_dsrl.yaml"
    for name, status in (("hf", 0), ("other", 2)):
        run = converted / f"{name}.yaml"
        run.write_text(f"inherits: {tiny}\nname: {name}\nmodel:\n  path: {converted / name}\n")
        assert convert("hf-to-megatron", converted / "hf", converted / f"to {name}", "--expect", run) == status
    assert "rms_norm_eps is 1e-06" in capsys.readouterr().err
    shutil.rmtree(converted / "other")
    assert convert("hf-to-megatron", converted / "hf", converted / "x", "--expect", run) == 2
    assert f"--expect {run}: model.path: no such folder: {converted / 'other'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-parallel-size", 4], "2 key/value heads cannot be split 4 ways"),
        (["--pipeline-parallel-size", 5], "5 pipeline stages (including virtual ones) for a model with 4 layers"),
        (["--virtual-pipeline-parallel-size", 2], "needs parallel.pipeline_parallel_size of at least 2"),
        (["--pipeline-parallel-size", 2, "--virtual-pipeline-parallel-size", 4], "8 pipeline stages (including"),
        (["--expert-parallel-size", 2], "the model has no experts"),
    ],
)
def test_layouts_that_do_not_fit_the_model(converted, capsys, options, message) -> None:
    assert convert("hf-to-megatron", converted / "hf", converted / "x", *options) == 2
    assert message in capsys.readouterr().err


def test_a_pipeline_may_have_uneven_stages(converted) -> None:
    """Which stage has how many layers is not in a checkpoint."""
    assert convert("hf-to-megatron", converted / "hf", converted / "x", "--pipeline-parallel-size", 3) == 0
    assert (converted / "x" / "__0_0.distcp").read_bytes() == (converted / "megatron" / "__0_0.distcp").read_bytes()
