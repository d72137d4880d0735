"""Making the tiny base: the corpus as configured, the same result every time, complete or absent."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from transformers import Qwen3ForCausalLM

from examples.tiny_dsrl.arithmetic import NO_NOISE, Problem, split_of
from examples.tiny_dsrl.base_model import corpus, make
from examples.tiny_dsrl.base_settings import Settings, is_made
from examples.tiny_dsrl.tokenizer import build_tokenizer
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.rewards.boxed import boxed

SMALL = Settings(steps=2, documents_per_step=4, train_problems=20, held_out_problems=10)


@pytest.fixture(scope="module", autouse=True)
def end_processes() -> Iterator[None]:
    yield
    destroy_parallel()


def make_small(output, settings=SMALL) -> None:
    with parallel_layout(ParallelConfig(), settings.seed):
        make(output, settings)


def test_corpus_is_correct_first_then_noisy_and_partly_unprompted() -> None:
    tokenizer = build_tokenizer()
    settings = Settings(
        steps=20, documents_per_step=32, correct_part=0.5, unprompted=0.5, noise=replace(NO_NOISE, wrong_box=1.0)
    )
    unprompted = 0
    for step, documents in enumerate(corpus(tokenizer, settings)):
        for document in documents:
            context = tokenizer.decode(document.token_ids[: document.num_context])
            text = tokenizer.decode(document.token_ids[document.num_context : -1])
            problem = Problem(tuple(map(int, text.split("\n")[0].replace("-", "+-").split("+"))))
            assert split_of(problem) == "corpus"
            assert boxed(text, problem.answer) == float(step < 10)
            asked = context.startswith(f"<|im_start|>user\n{problem.text}<|im_end|>\n")
            assert asked or (step >= 10 and context == "<|im_start|>")
            unprompted += not asked
            assert document.token_ids[-1] == tokenizer.eos_token_id
    assert unprompted / 320 == pytest.approx(0.5, abs=0.12)  # of the 10 noisy steps of 32 documents


def test_made_folder_is_complete_and_the_same_every_time(tmp_path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make_small(first)
    make_small(second)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert {"train.jsonl", "held_out.jsonl", "made_from", "base/model.safetensors"} <= set(map(str, files))
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    model = Qwen3ForCausalLM.from_pretrained(first / "base")
    assert 0.5e6 < model.num_parameters() < 1.5e6
    sets = [PromptSetConfig(source=str(first / f"{split}.jsonl")) for split in ("train", "held_out")]
    train, held_out = ({prompt.text for prompt in load_prompts(each, build_tokenizer())} for each in sets)
    assert (len(train), len(held_out)) == (20, 10) and not train & held_out


def test_different_settings_remake_it(tmp_path) -> None:
    output = tmp_path / "tiny"
    assert not is_made(output, SMALL)
    make_small(output)
    assert is_made(output, SMALL)
    assert not is_made(output, replace(SMALL, seed=2))
    make_small(output, replace(SMALL, train_problems=5))
    assert len((output / "train.jsonl").read_text().splitlines()) == 5


def test_foreign_folder_is_left_alone(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by this program"):
        is_made(tmp_path, SMALL)
