"""Every shipped run, and every pair of a size and a method, resolves and passes the dry run, without a network and
without the models themselves."""

import io
import json
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.config.summary import print_dry_run
from megatron_dsrl.run.preflight import preflight

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = sorted(file.stem for file in CONFIGS.glob("methods/*.yaml"))
RUNS = [
    *((file,) for file in sorted(CONFIGS.glob("*.yaml")) if file.name != "base.yaml"),
    *product(sorted(CONFIGS.glob("sizes/*.yaml")), sorted(CONFIGS.glob("methods/*.yaml"))),
]
"""The files of every run."""

OVERRIDES = {"dapo": ["reward.overlong.buffer_tokens=13"]}
"""What a method needs on the tiny task, whose responses are short."""

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}
MODELS = {
    "Qwen/Qwen3-4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
    "Qwen/Qwen3-30B-A3B": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""What the published config.json of each model says about its sizes."""

SMALL = QWEN3 | {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
}
MADE_BY_EXAMPLES = {
    ".cache/tiny_dsrl_experts/base": SMALL
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Replaces what is not `SMALL` in the models that examples make."""

PROCESSES = {"Qwen/Qwen3-4B": 8, "Qwen/Qwen3-8B": 8, "Qwen/Qwen3-30B-A3B": 16}


def run_name(files: tuple[Path, ...]) -> str:
    return "_".join(file.stem for file in files)


@pytest.mark.parametrize("files", RUNS, ids=run_name)
def test_it_resolves_and_passes_the_dry_run(files: tuple[Path, ...], tmp_path: Path) -> None:
    is_short = files[0].stem.startswith("tiny")
    needed = OVERRIDES.get(files[-1].stem, []) if is_short else []
    config = load_config(files, needed)
    assert config.name == run_name(files)
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config

    model = config.model.path
    (tmp_path / "config.json").write_text(json.dumps((MODELS | MADE_BY_EXAMPLES).get(model, SMALL)))
    overrides = [*needed, f"model.path={tmp_path}"]
    if model not in MODELS:  # its problems are made by the example, too
        (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 200)
        sets = ["data", *(f"evaluation.sets.{position}" for position in range(len(config.evaluation.sets)))]
        overrides += [f"{one}.source={tmp_path / 'train.jsonl'}" for one in sets]
    local = load_config(files, overrides)
    figures = preflight(local, PROCESSES.get(model, 1))
    assert sum(phase.steps for phase in figures.phases) == config.steps
    output = io.StringIO()
    print_dry_run(local, figures, Console(file=output, width=200))
    assert all(phase.name in output.getvalue() for phase in config.phases)


def test_the_guide_describes_every_method() -> None:
    guide = (CONFIGS.parent / "examples" / "methods" / "README.md").read_text()
    assert [method for method in METHODS if f"`{method}`" not in guide and not method.startswith("dsrl_warmup")] == []
