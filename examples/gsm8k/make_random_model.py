"""Make a model folder with the real Qwen3 tokenizer and a small Qwen3 without weights (they are drawn at the start).

    python -m examples.gsm8k.make_random_model TOKENIZER [--output .cache/gsm8k/random_qwen3]

TOKENIZER is a folder with Qwen3's tokenizer files, or a hub name such as Qwen/Qwen3-8B: only its tokenizer is
downloaded.
"""

import argparse
import json
import sys
from pathlib import Path

import transformers

from examples.writing_command import run_writing
from megatron_dsrl.data.tokenizer import load_tokenizer

ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "float32",
    "transformers_version": transformers.__version__,  # without it Transformers suspects an old Mistral tokenizer
}
"""Qwen3's vocabulary over a body of two narrow layers; nearly all of its ten million parameters are the embedding."""


def make_random_model(tokenizer: str, output: Path) -> None:
    """Write config.json and the tokenizer files to `output`. Raises UserError if `tokenizer` is not Qwen3's."""
    loaded = load_tokenizer(tokenizer, ARCHITECTURE["vocab_size"])
    output.mkdir(parents=True, exist_ok=True)
    loaded.save_pretrained(output)
    (output / "config.json").write_text(json.dumps(ARCHITECTURE, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder with Qwen3's tokenizer files, or a hub name")
    parser.add_argument("--output", type=Path, default=Path(".cache/gsm8k/random_qwen3"), help="folder to write")
    arguments = parser.parse_args()
    return run_writing(lambda: make_random_model(arguments.tokenizer, arguments.output), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
