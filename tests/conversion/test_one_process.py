"""Conversion by one process: bit-identical there and back, complete or absent, and every refusal."""

import glob
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dsrl.cli import main
from megatron_dsrl.commands.convert import DTYPES
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.fingerprint import fingerprint
from megatron_dsrl.common.generated_card import GENERATED
from megatron_dsrl.conversion.logits import _megatron_logits
from megatron_dsrl.conversion.work import conversion_processes
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dsrl.weights.tables import weight_table
from tests.support.disk import files_of_at_most
from tests.support.families import FAMILIES
from tests.support.forked import ForkedProcess
from tests.support.tiny_model import LLAMA3, YARN, make_tiny_qwen3
from tests.support.tiny_run import processes_left_behind, start_dsrl

QUERY = "model.layers.1.self_attn.q_proj.weight"
VOCAB_SIZE = 101
PARTIAL_FILES = ".megatron.partial-*/*.distcp"


def convert(direction: str, *arguments: object) -> int:
    return main(["convert", direction, *map(str, arguments)])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---- there and back


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_round_trip_is_bit_identical(tmp_path, family, tensor_parallel_size) -> None:
    """From several bfloat16 files, over chunks for a layout, back into several files."""
    source, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    FAMILIES[family](source, vocab_size=VOCAB_SIZE, dtype=torch.bfloat16, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    companions = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    companions += ("additional_chat_templates/tools.jinja",)
    (source / "additional_chat_templates").mkdir()
    for name in companions:
        (source / name).write_text('{"from": "the source"}')

    assert convert("hf-to-megatron", source, megatron, "--tensor-parallel-size", tensor_parallel_size) == 0
    assert convert("megatron-to-hf", megatron, back, "--file-gigabytes", 1e-4) == 0

    assert_identical(tensors_of(back), tensors_of(source))
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 2
    for folder in (megatron, back):
        for name in companions:
            assert (folder / name).read_text() == '{"from": "the source"}'
    for folder, made_from in ((megatron, source), (back, megatron)):
        (start,) = read_starts(folder)
        assert start["command"] == "convert" and start["source"]["fingerprint"] == fingerprint(made_from)
        assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(back, dtype="auto").dtype == torch.bfloat16
    assert convert("hf-to-megatron", source, megatron, "--overwrite") == 0  # all of it is a model's
    assert hidden(tmp_path) == []


def test_chunks_are_those_of_the_layout(tmp_path) -> None:
    """At tensor-parallel size 2 the row-parallel matrix is cut along its input, gate and up into two pieces each."""
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", "--tensor-parallel-size", 2) == 0
    chunks = {
        name: [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
        for name, stored in MegatronCheckpoint(tmp_path / "megatron")._tensors.items()
    }
    assert chunks["embedding.word_embeddings.weight"] == [((0, 0), (51, 64)), ((51, 0), (50, 64))]
    assert chunks["decoder.layers.mlp.linear_fc2.weight"][2:4] == [
        ((1, 0, 0), (1, 64, 64)),
        ((1, 0, 64), (1, 64, 64)),
    ]
    assert [offsets for offsets, _ in chunks["decoder.layers.mlp.linear_fc1.weight"][:4]] == [
        (0, 0, 0),
        (0, 64, 0),
        (0, 128, 0),
        (0, 192, 0),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_choice_and_verification(tmp_path, capsys, dtype) -> None:
    make_tiny_qwen3(tmp_path / "hf", tied=True, vocab_size=VOCAB_SIZE)
    options = ["--dtype", dtype, "--verify"]
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", *options[:2]) == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    expected = {name: x.to(getattr(torch, dtype)) for name, x in tensors_of(tmp_path / "hf").items()}
    assert_identical(tensors_of(tmp_path / "back"), expected)
    printed = " ".join(capsys.readouterr().out.split())
    assert "verified 46 tensors" in printed and "verified logits of 3 prompts, 72 tokens" in printed


@pytest.fixture
def with_large_value_and_nan(tmp_path: Path) -> Path:
    """A model with two weights beyond float16, in two tensors, and one that is NaN."""
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY][0, 0] = 1e6
        tensors[QUERY][0, 1] = torch.nan
        tensors["model.norm.weight"][3] = -1e5

    change_weights(tmp_path / "hf", change)
    return tmp_path


LOST = f"2 values (1 in {QUERY}, 1 in model.norm.weight) beyond the range of float16 (largest number 65504) became inf"
NOT_A_NUMBER = f"the source has NaN or infinite values: 1 value (1 in {QUERY})"


def test_values_that_a_dtype_cannot_hold_are_counted_and_named(with_large_value_and_nan, capsys) -> None:
    home = with_large_value_and_nan
    assert convert("hf-to-megatron", home / "hf", home / "half", "--dtype", "float16") == 0
    printed = capsys.readouterr().out
    assert f"warning: {LOST}" in printed and f"warning: {NOT_A_NUMBER}" in printed
    assert convert("verify", home / "hf", home / "half", "--dtype", "float16") == 2
    assert f"verification failed: {LOST}" in capsys.readouterr().err

    assert convert("hf-to-megatron", home / "hf", home / "same", "--verify") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"logits not compared: {NOT_A_NUMBER}" in printed and "beyond" not in printed
    assert convert("megatron-to-hf", home / "same", home / "back", "--dtype", "float16") == 0
    assert f"warning: {LOST}" in capsys.readouterr().out


# ---- verification


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A folder with an untied Qwen3 under `hf` and `megatron`."""
    make_tiny_qwen3(tmp_path / "hf", tied=False, vocab_size=VOCAB_SIZE)
    assert convert("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron") == 0
    return tmp_path


def flip_a_bit(file: Path, tensor: Tensor) -> None:
    """In the middle of a tensor of the file."""
    content = bytearray(file.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 1001] ^= 1
    file.write_bytes(content)


def test_verify_names_the_tensor_with_a_flipped_bit(converted, capsys) -> None:
    assert convert("verify", converted / "hf", converted / "megatron") == 0
    weights = tensors_of(converted / "hf")["model.layers.2.mlp.down_proj.weight"]
    flip_a_bit(converted / "hf" / "model.safetensors", weights)

    capsys.readouterr()
    assert convert("verify", converted / "hf", converted / "megatron") == 2
    message = capsys.readouterr().err
    assert "1 tensor differs" in message
    assert "model.layers.2.mlp.down_proj.weight: SHA-256" in message and "1 of 8192 elements" in message


def test_verify_names_another_models_tensors(converted, capsys) -> None:
    make_tiny_qwen3(converted / "other", tied=False, vocab_size=VOCAB_SIZE, seed=1)
    assert convert("verify", converted / "other", converted / "megatron") == 2
    message = capsys.readouterr().err
    assert "47 tensors differ" in message and "model.embed_tokens.weight" in message and "and 37 more" in message


def test_a_flipped_bit_in_a_checkpoint_is_found_without_its_source(converted, capsys) -> None:
    """By everything that reads the weights; the layout of two chunks per tensor is read by another path."""
    target = converted / "megatron"
    convert("hf-to-megatron", converted / "hf", target, "--overwrite", "--tensor-parallel-size", 2)
    weights = tensors_of(converted / "hf")["model.layers.2.mlp.down_proj.weight"]
    flip_a_bit(target / "__0_0.distcp", weights[:, :64].contiguous())

    capsys.readouterr()
    damaged = "__0_0.distcp is damaged: the chunk of decoder.layers.mlp.linear_fc2.weight at [2, 0, 0] cannot be read: "
    damaged += "its CRC-32 differs from the one that was stored with it"
    assert convert("megatron-to-hf", target, converted / "back") == 2
    assert damaged in capsys.readouterr().err
    assert convert("verify", converted / "hf", target) == 2
    assert damaged in capsys.readouterr().err
    with conversion_processes(), pytest.raises(UserError, match=re.escape(damaged)):
        _megatron_logits(target, architecture := read_architecture(target), weight_table(architecture), [[1, 2]])


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_changed_index_file_is_found(converted, capsys, name) -> None:
    file = converted / "megatron" / name
    file.write_bytes(file.read_bytes() + b" ")
    assert convert("megatron-to-hf", converted / "megatron", converted / "back") == 2
    assert f"megatron is damaged: {name} has changed (size and CRC-32 are" in capsys.readouterr().err


def test_checkpoints_written_without_checksums_are_read(converted) -> None:
    """torch.save can leave them out, and records of version 1 list no files."""
    torch.serialization.set_crc32_options(False)
    try:
        assert convert("hf-to-megatron", converted / "hf", converted / "without") == 0
    finally:
        torch.serialization.set_crc32_options(True)
    record = json.loads((converted / "without" / "megatron_dsrl.json").read_text())
    del record["files"]
    (converted / "without" / "megatron_dsrl.json").write_text(json.dumps(record | {"format_version": 1}))
    assert convert("megatron-to-hf", converted / "without", converted / "back") == 0
    assert_identical(tensors_of(converted / "back"), tensors_of(converted / "hf"))


def test_damaged_shard(converted, capsys) -> None:
    shard = converted / "megatron" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100_000])
    assert convert("megatron-to-hf", converted / "megatron", converted / "back") == 2
    assert "__0_0.distcp is damaged: the chunk of decoder.layers" in capsys.readouterr().err
    assert not (converted / "back").exists() and hidden(converted) == []


# ---- complete or absent


def test_an_existing_target_is_replaced_only_when_told_and_only_by_a_complete_one(converted, capsys) -> None:
    before = (converted / "megatron" / ".metadata").read_bytes()
    assert convert("hf-to-megatron", converted / "hf", converted / "megatron") == 2
    assert "exists already" in capsys.readouterr().err

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


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 205 MB, which is written long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    make_tiny_qwen3(folder, tied=False, vocab_size=400_000)
    return folder


def files_being_written(target: Path) -> set[str]:
    """Files of unfinished conversions to this folder. Unlike Path.glob, glob.glob tolerates vanishing folders."""
    return set(glob.glob(str(target.parent / PARTIAL_FILES)))


@contextmanager
def conversion_that_writes(source: Path, target: Path) -> Iterator[ForkedProcess]:
    """`dsrl convert` in a separate process, as soon as it has written the beginning of a file."""
    before = files_being_written(target)
    process = start_dsrl("convert", "hf-to-megatron", str(source), str(target))
    try:
        deadline = time.monotonic() + 100
        while files_being_written(target) <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_conversion_leaves_nothing(large, tmp_path, number, status) -> None:
    with conversion_that_writes(large, tmp_path / "out" / "megatron") as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == status
    assert list((tmp_path / "out").iterdir()) == [] and processes_left_behind() == []


def test_what_a_killed_conversion_left_is_removed_by_the_next_one_but_not_that_of_a_running_one(
    large, tmp_path, capsys
) -> None:
    """`kill -9` of one, then one that is stopped, beside which a third is refused before it does any work."""
    target = tmp_path / "out" / "megatron"
    with conversion_that_writes(large, target) as process:
        process.kill()
        process.wait()
    assert processes_left_behind() == []
    left = hidden(target.parent)
    assert len(left) == 2 and not target.exists()

    with conversion_that_writes(large, target) as running:
        running.send_signal(signal.SIGSTOP)
        of_the_running_one = hidden(target.parent)
        assert len(of_the_running_one) == 2 and not set(left) & set(of_the_running_one)
        assert convert("hf-to-megatron", large, target) == 2
        assert "another process is writing to it (.megatron.partial-" in capsys.readouterr().err
        assert sorted(hidden(target.parent)) == sorted(of_the_running_one)
    assert convert("hf-to-megatron", large, target) == 0
    assert hidden(target.parent) == []
    assert convert("megatron-to-hf", target, tmp_path / "back") == 0
    assert_identical(tensors_of(tmp_path / "back"), tensors_of(large))


def test_a_conversion_that_was_killed_between_two_renames_has_not_lost_the_former_target(converted) -> None:
    """The former target had stepped aside, the new one was not there yet."""
    target, partial = converted / "megatron", converted / ".megatron.partial-0123"
    (converted / ".megatron.partial-0123.lock").touch()
    partial.mkdir()
    before = (target / ".metadata").read_bytes()
    target.rename(partial.with_name(partial.name + ".old"))

    assert convert("hf-to-megatron", converted / "hf", target) == 2
    assert (target / ".metadata").read_bytes() == before
    assert hidden(converted) == []


# ---- refusals


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "much"])
def test_a_file_size_is_a_number_above_0(tmp_path, capsys, size) -> None:
    with pytest.raises(SystemExit):
        convert("megatron-to-hf", tmp_path, tmp_path / "back", f"--file-gigabytes={size}")
    assert f"expected a number above 0, got {size}" in capsys.readouterr().err


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16000000000\n"

OTHER_SOURCES = {
    "pickled weights": ("hf-to-megatron", only_pickled, "holds its weights in pytorch_model.bin, which is not read"),
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
