"""The target of a conversion is complete or absent, and only a model is overwritten."""

import shutil

import pytest
import torch

from megatron_dsrl.common.generated_card import GENERATED
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from tests.support.conversions import VOCAB_SIZE, convert, everything_under, hidden
from tests.support.disk import files_of_at_most
from tests.support.tiny_model import make_tiny_qwen3


def test_an_existing_target_is_replaced_only_when_told_and_only_by_a_complete_one(converted, capsys) -> None:
    before = (converted / "megatron" / ".metadata").read_bytes()
    assert convert("hf-to-megatron", converted / "hf", converted / "megatron") == 2
    assert "already exists" in capsys.readouterr().err

    cut = converted / "hf" / "model.safetensors"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    assert convert("hf-to-megatron", converted / "hf", converted / "megatron", "--overwrite") == 2
    assert (converted / "megatron" / ".metadata").read_bytes() == before

    cut.write_bytes(whole)
    options = ["--overwrite", "--dtype", "bfloat16"]
    assert convert("hf-to-megatron", converted / "hf", converted / "megatron", *options) == 0
    assert {dtype for dtype in MegatronCheckpoint(converted / "megatron").dtypes().values()} == {torch.bfloat16}
    assert hidden(converted) == []


OVERWRITING = {
    "parent of the source": ("home", "it contains {home}/hf, which the conversion reads"),
    "the source": ("home/hf", "it is {home}/hf, which the conversion reads"),
    "the source by a link": ("link_to_source", "it is {home}/hf, which the conversion reads"),
    "inside the source": ("home/hf/megatron", "it lies in {home}/hf, which the conversion reads"),
    "what is expected": ("home/expected", "it is {home}/expected, which the conversion reads"),
    "something else": ("letters", "it holds more than a model (a.txt, b.txt, c.txt, ...) and is not replaced"),
    "a model and something else": ("mixed", "it holds more than a model (thesis.txt) and is not replaced"),
    "a model and notes on it": ("noted", "it holds more than a model (README.md, tokenizer_notes.txt) and is not repl"),
    "half a model": ("half", "it holds neither an HF model (config.json and safetensors) nor a converted checkpoint"),
    "a run's checkpoint": ("run", "nor a converted checkpoint (config.json and metadata.json) and is not replaced"),
}


@pytest.mark.parametrize("case", OVERWRITING)
def test_overwriting_deletes_nothing_but_a_model(tmp_path, capsys, case) -> None:
    name, message = OVERWRITING[case]
    home = tmp_path / "home"
    make_tiny_qwen3(home / "hf", tied=True, vocab_size=VOCAB_SIZE)
    for folder in (home / "expected", *(tmp_path / name for name in ("mixed", "noted", "half"))):
        shutil.copytree(home / "hf", folder)
    (tmp_path / "half" / "model.safetensors").unlink()
    assert convert("hf-to-megatron", home / "hf", tmp_path / "run") == 0
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "letters").mkdir()
    notes = ("noted/README.md", "noted/tokenizer_notes.txt")
    for file in ("home/thesis.txt", "mixed/thesis.txt", *notes, *(f"letters/{x}.txt" for x in "abcd")):
        (tmp_path / file).write_text("years of work")
    (tmp_path / "link_to_source").symlink_to(home / "hf")
    before = everything_under(tmp_path)

    options = ["--overwrite", "--expect", home / "expected"]
    assert convert("hf-to-megatron", home / "hf", tmp_path / name, *options) == 2
    error = capsys.readouterr().err
    assert "cannot write the model to" in error and message.format(home=home) in error
    assert everything_under(tmp_path) == before and hidden(tmp_path) == hidden(home) == []


def test_the_card_of_a_former_conversion_is_replaced_with_it(converted) -> None:
    (converted / "megatron" / "README.md").write_text(f"# A policy\n{GENERATED}\n")
    assert convert("hf-to-megatron", converted / "hf", converted / "megatron", "--overwrite") == 0


def test_a_linked_target_is_replaced_where_it_lies(converted) -> None:
    """An empty folder counts as replaceable; the link stays a link."""
    (converted / "disk").mkdir()
    (converted / "link").symlink_to(converted / "disk")
    for dtype in ("float32", "bfloat16"):
        assert convert("hf-to-megatron", converted / "hf", converted / "link", "--overwrite", "--dtype", dtype) == 0
    assert (converted / "link").is_symlink() and hidden(converted) == []
    assert {dtype for dtype in MegatronCheckpoint(converted / "disk").dtypes().values()} == {torch.bfloat16}


@pytest.mark.parametrize("size", [50, 20_000])
def test_a_disk_that_fills_up(converted, capsys, size) -> None:
    """Both ways, from the first byte and in the middle: the file is named, the former target is as it was."""
    for direction, source, target in (("hf-to-megatron", "hf", "megatron"), ("megatron-to-hf", "megatron", "hf")):
        before = everything_under(converted)
        options = ["--overwrite"] if direction == "hf-to-megatron" else ["--file-gigabytes", 1e-5]
        name = target if direction == "hf-to-megatron" else "back"
        with files_of_at_most(size):
            assert convert(direction, converted / source, converted / name, *options) == 2
        error = capsys.readouterr().err
        assert f".{name}.partial-" in error and "could not be written (" in error and "MiB are free there)" in error
        assert "what was there before is untouched" in error and "Traceback" not in error
        assert everything_under(converted) == before and hidden(converted) == []
