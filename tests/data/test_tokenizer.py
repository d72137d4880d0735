"""Loading tokenizers: the ids that training needs, and a clear message for every wrong tokenizer."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_dsrl.algorithms.spaces import PreTrain
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.tokenizer import context_token_ids, load_tokenizer, stop_token_ids, turn_end
from tests.support.llama_tokenizer import build_llama_tokenizer


def save_words(folder, words, **arguments) -> str:
    """A tokenizer that knows these words only."""
    bare = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=bare, **arguments).save_pretrained(folder)
    return str(folder)


def bos_ids(tokenizer: PreTrainedTokenizerBase, bos: str) -> tuple[int, ...]:
    return context_token_ids(tokenizer, PreTrain(bos=bos).context_text)


def test_stop_and_bos_ids(tokenizer_folder) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), vocab_size=128)
    im_start, im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert stop_token_ids(tokenizer, tokenizer_folder) == (im_end, end_of_text)
    assert turn_end(tokenizer) == "<|im_end|>"
    assert bos_ids(tokenizer, "im_start") == (im_start,)
    assert bos_ids(tokenizer, "none") == ()
    assert tokenizer.decode(bos_ids(tokenizer, "assistant")) == "<|im_start|>assistant\n"


@pytest.mark.needs_data
def test_ids_of_the_real_qwen3(shared_data) -> None:
    tokenizer = load_tokenizer(str(shared_data / "qwen3-tokenizer"), vocab_size=151936)
    assert stop_token_ids(tokenizer, shared_data / "qwen3-tokenizer") == (151645, 151643)
    assert bos_ids(tokenizer, "im_start") == (151644,)
    assert bos_ids(tokenizer, "assistant") == (151644, 77091, 198)


def test_a_tokenizer_of_another_format_has_its_own_bos_and_stop_tokens(tmp_path) -> None:
    """Llama 3's special tokens: EOS ends a turn, and generation_config.json names more stop tokens."""
    build_llama_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), vocab_size=128)
    begin, end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(
        ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"]
    )
    assert stop_token_ids(tokenizer, tmp_path) == (end_of_turn,)
    for named in ([end_of_text, end_of_turn], end_of_text):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_token_ids(tokenizer, tmp_path) == (end_of_turn, end_of_text)
    assert turn_end(tokenizer) == "<|eot_id|>"
    assert bos_ids(tokenizer, "im_start") == (begin,)
    assert bos_ids(tokenizer, "none") == ()
    assert tokenizer.decode(bos_ids(tokenizer, "assistant")) == "assistant\n"
    with pytest.raises(UserError, match="the context '<.im_start.>Hm' needs <.im_start.>"):
        context_token_ids(tokenizer, "<|im_start|>Hm")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json cannot be read"):
        stop_token_ids(tokenizer, tmp_path)


def test_a_chat_template_that_puts_nothing_before_a_response() -> None:
    """As Llama 2's."""
    tokenizer = build_llama_tokenizer("{% for message in messages %}{{ message.content }}{% endfor %}")
    with pytest.raises(UserError, match="chat template puts nothing before a response; use im_start or none"):
        bos_ids(tokenizer, "assistant")


def test_vocabulary_beyond_the_models(tokenizer_folder) -> None:
    with pytest.raises(UserError, match="ids up to 109 .* only 109 embedding rows"):
        load_tokenizer(str(tokenizer_folder), vocab_size=109)


def test_missing_folder() -> None:
    with pytest.raises(UserError, match="no such folder: ./no/such/model"):
        load_tokenizer("./no/such/model")


def test_folder_without_tokenizer(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))


def test_damaged_tokenizer(tokenizer_folder) -> None:
    file = tokenizer_folder / "tokenizer.json"
    file.write_text(file.read_text()[:-100])
    with pytest.raises(
        UserError, match=r"(?s)cannot load a tokenizer from .*The folder needs the model's tokenizer.json"
    ):
        load_tokenizer(str(tokenizer_folder))


def test_tokenizer_of_another_model(tmp_path) -> None:
    folder = save_words(tmp_path, ["<s>", "</s>", "hello"], chat_template="{{ messages }}")
    with pytest.raises(UserError, match=r"neither Qwen's <\|im_start\|> and <\|im_end\|> nor its own bos_token"):
        load_tokenizer(folder)


def test_a_part_of_qwens_special_tokens(tmp_path) -> None:
    folder = save_words(tmp_path, ["<unk>", "<|im_end|>", "<|endoftext|>"], chat_template="{{ messages }}")
    with pytest.raises(UserError, match=r"has no token <\|im_start\|>, which belongs to Qwen's chat format"):
        load_tokenizer(folder)


def test_special_tokens_that_are_plain_words(tmp_path) -> None:
    words = ["<unk>", "<", "|", "im_start", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "a<|im_end|>"]
    from tokenizers.pre_tokenizers import Punctuation

    bare = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = Punctuation()
    PreTrainedTokenizerFast(tokenizer_object=bare, chat_template="x").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not read .* as one token"):
        load_tokenizer(str(tmp_path))


def test_missing_chat_template(tokenizer_folder) -> None:
    (tokenizer_folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(str(tokenizer_folder))
