"""Every shipped configuration resolves and passes the dry run, without a network and without the models themselves."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.config.summary import print_dry_run
from megatron_dsrl.run.preflight import preflight

CONFIGS = Path(__file__).parents[2] / "configs"
FRAGMENTS = [CONFIGS / "base.yaml", *CONFIGS.glob("sizes/*.yaml"), *CONFIGS.glob("methods/*.yaml")]
"""Files that others inherit."""

RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(FRAGMENTS))
METHODS = sorted(file.stem for file in CONFIGS.glob("methods/*.yaml"))
SIZES = ["qwen3_4b", "qwen3_8b", "tiny"]

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
    "Qwen/Qwen3-4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728},
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
"""In the place of what is not `SMALL` among the models that examples make."""

PROCESSES = {"Qwen/Qwen3-4B": 8, "Qwen/Qwen3-8B": 8, "Qwen/Qwen3-30B-A3B": 16}


def place(file: Path) -> str:
    return str(file.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("file", RUNS, ids=place)
def test_it_resolves_and_passes_the_dry_run(file, tmp_path):
    config = load_config(file)
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config

    model = config.model.path
    (tmp_path / "config.json").write_text(json.dumps((MODELS | MADE_BY_EXAMPLES).get(model, SMALL)))
    overrides = [f"model.path={tmp_path}"]
    if model not in MODELS:  # its problems are made by the example, too
        (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 200)
        overrides.append(f"data.source={tmp_path / 'train.jsonl'}")
    local = load_config(file, overrides)
    figures = preflight(local, PROCESSES.get(model, 1))
    assert sum(phase.steps for phase in figures.phases) == config.steps
    output = io.StringIO()
    print_dry_run(local, figures, Console(file=output, width=200))
    assert all(phase.name in output.getvalue() for phase in config.phases)


def test_every_method_is_there_in_every_size():
    for size in SIZES:
        for method in METHODS:
            headline = CONFIGS / (f"tiny_{method}.yaml" if size == "tiny" else f"{method}_{size}.yaml")
            assert (CONFIGS / size / f"{method}.yaml").exists() != headline.exists(), (size, method)


def test_no_two_runs_have_the_same_name():
    names = [load_config(file).name for file in RUNS]
    assert len(set(names)) == len(names)


def test_the_guide_describes_every_method() -> None:
    guide = (CONFIGS.parent / "examples" / "methods" / "README.md").read_text()
    assert [method for method in METHODS if f"`{method}`" not in guide and not method.startswith("dsrl_warmup")] == []
