"""Loading Qwen3's tokenizer: the ids that training needs, and a clear message for every wrong tokenizer."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_dsrl.algorithms.spaces import PreTrain
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.tokenizer import context_token_ids, load_tokenizer, stop_token_ids


def save_words(folder, words, **arguments):
    """A tokenizer that knows these words only."""
    bare = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=bare, **arguments).save_pretrained(folder)
    return str(folder)


def bos_ids(tokenizer: PreTrainedTokenizerBase, bos: str) -> tuple[int, ...]:
    return context_token_ids(tokenizer, PreTrain(bos=bos).context_text)


def test_stop_and_bos_ids(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder), vocab_size=128)
    im_start, im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert stop_token_ids(tokenizer) == (im_end, end_of_text)
    assert bos_ids(tokenizer, "im_start") == (im_start,)
    assert bos_ids(tokenizer, "none") == ()
    assert tokenizer.decode(bos_ids(tokenizer, "assistant")) == "<|im_start|>assistant\n"


@pytest.mark.needs_data
def test_ids_of_the_real_qwen3(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "qwen3-tokenizer"), vocab_size=151936)
    assert stop_token_ids(tokenizer) == (151645, 151643)
    assert bos_ids(tokenizer, "im_start") == (151644,)
    assert bos_ids(tokenizer, "assistant") == (151644, 77091, 198)


def test_vocabulary_beyond_the_models(tokenizer_folder):
    with pytest.raises(UserError, match="ids up to 109 .* only 109 embedding rows"):
        load_tokenizer(str(tokenizer_folder), vocab_size=109)


def test_missing_folder():
    with pytest.raises(UserError, match="there is no folder ./no/such/model"):
        load_tokenizer("./no/such/model")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_of_another_model(tmp_path):
    folder = save_words(tmp_path, ["<s>", "</s>", "hello"], chat_template="{{ messages }}")
    with pytest.raises(UserError, match=r"not Qwen3's: it has no token <\|endoftext\|>, <\|im_start\|>, <\|im_end\|>"):
        load_tokenizer(folder)


def test_special_tokens_that_are_plain_words(tmp_path):
    words = ["<unk>", "<", "|", "im_start", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "a<|im_end|>"]
    from tokenizers.pre_tokenizers import Punctuation

    bare = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = Punctuation()
    PreTrainedTokenizerFast(tokenizer_object=bare, chat_template="x").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not read .* as one token"):
        load_tokenizer(str(tmp_path))


def test_missing_chat_template(tokenizer_folder):
    (tokenizer_folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(str(tokenizer_folder))
