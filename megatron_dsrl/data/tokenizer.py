"""Qwen3's tokenizer: loading and checking it, and the token ids that training needs."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import asking_hub, can_reach_hub
from megatron_dsrl.model.source import is_hub_name, no_folder

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"


def load_tokenizer(path: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an HF folder or hub name and check that it fits Qwen3.

    Args:
        path: folder with tokenizer files, or a hub name (`model.path`).
        vocab_size: rows of the model's embedding (`vocab_size` in its config.json); checked if given. The model may
            have more rows than the tokenizer has tokens (Qwen3 does), but not fewer.

    Raises:
        UserError: there is no such folder or tokenizer, a special token of Qwen3 or the chat template is missing, or
            the tokenizer has ids outside the model's vocabulary.
    """
    tokenizer = _from_folder(path) if Path(path).is_dir() else _from_hub(path)
    _require_special_tokens(tokenizer, path)
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path: the tokenizer in {path} has no chat template, so problems cannot be rendered as prompts. "
            "Take the tokenizer_config.json (and chat_template.jinja, if there is one) of a chat model."
        )
    if vocab_size is not None:
        _require_fitting_vocabulary(tokenizer, vocab_size, path)
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: the end of the assistant's turn and the end of the text."""
    return _token_id(tokenizer, TURN_END), _token_id(tokenizer, END_OF_TEXT)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Text of a token sequence."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str), "one sequence decodes to one string"
    return text


def context_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of the text that replaces the prompt in a space; see `algorithms.spaces.Space.context_text`."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _from_folder(folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.path: cannot load a tokenizer from {folder}: {error}\n"
            "The folder needs Qwen3's tokenizer.json and tokenizer_config.json."
        ) from error


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    if not is_hub_name(name):
        raise no_folder("model.path", name)
    with asking_hub("model.path", name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, local_files_only=not can_reach_hub())


def _require_special_tokens(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (END_OF_TEXT, TURN_START, TURN_END) if token not in vocabulary]
    if missing:
        raise UserError(
            f"model.path: the tokenizer in {path} is not Qwen3's: it has no token {', '.join(missing)}. "
            "Use the tokenizer that came with the Qwen3 checkpoint."
        )
    split = [token for token in (END_OF_TEXT, TURN_START, TURN_END) if tokenizer.encode(token) != [vocabulary[token]]]
    if split:
        raise UserError(
            f"model.path: the tokenizer in {path} does not read {', '.join(split)} as one token. "
            "Declare it as a special token in tokenizer_config.json, as Qwen3 does."
        )


def _require_fitting_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, path: str) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"model.path: the tokenizer in {path} has token ids up to {largest} ({token!r}), but the model has only "
            f"{vocab_size} embedding rows (vocab_size in its config.json). Use the model's own tokenizer."
        )


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.get_vocab().get(token)
    assert token_id is not None, f"load_tokenizer refuses tokenizers without {token}"
    return token_id
