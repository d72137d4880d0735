"""Chat models' tokenizers: loading and checking them, and the token ids that training needs.

Tokenizers in Qwen's format (ChatML: Qwen, SmolLM2) share the three special tokens below. Others, such as Llama 3's,
have their own BOS, and their stop tokens are those that the tokenizer and generation_config.json name.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import asking_hub, can_reach_hub
from megatron_dsrl.model.source import is_hub_name, no_folder

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHATML = (END_OF_TEXT, TURN_START, TURN_END)
ASSISTANT_START = TURN_START + "assistant\n"


def load_tokenizer(path: str, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an HF folder or hub name and check that it has what training needs. Raises UserError if the
    folder or tokenizer does not exist, a special token or the chat template is missing, or the tokenizer has ids
    outside the model's vocabulary.

    Args:
        path: folder with tokenizer files, or a hub name (`model.path`).
        vocab_size: rows of the model's embedding (`vocab_size` in its config.json); checked if given. The model may
            have more rows than the tokenizer has tokens (Qwen3 does), but not fewer.
    """
    tokenizer = _from_folder(path) if Path(path).is_dir() else _from_hub(path)
    _require_special_tokens(tokenizer, path)
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path: the tokenizer in {path} has no chat template, so problems cannot be rendered as prompts. "
            "Take the tokenizer_config.json (and chat_template.jinja, if it has one) of a chat model."
        )
    if vocab_size is not None:
        _require_fitting_vocabulary(tokenizer, vocab_size, path)
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> tuple[int, ...]:
    """Tokens that end a response: the end of the assistant's turn and the end of the text.

    In ChatML these are `<|im_end|>` and `<|endoftext|>`. Otherwise they are the tokenizer's EOS and all values of
    `eos_token_id` in generation_config.json in `model_folder`; Llama 3 has several. Raises UserError if that file
    cannot be read.
    """
    vocabulary = tokenizer.get_vocab()
    if TURN_START in vocabulary:
        return vocabulary[TURN_END], vocabulary[END_OF_TEXT]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *_generation_stop_ids(model_folder)]))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the token that ends the assistant's turn."""
    return TURN_END if TURN_START in tokenizer.get_vocab() else str(tokenizer.eos_token)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Text of a token sequence."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str), "one sequence decodes to one string"
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text. Special tokens in it are recognised, and none are added."""
    return tokenizer.encode(text, add_special_tokens=False)


def context_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of the text that replaces the prompt in a space; see `algorithms.spaces.Space.context_text`.

    For tokenizers without `<|im_start|>`, `<|im_start|>` is replaced by their BOS, and `<|im_start|>assistant\\n` by
    what their chat template puts before a response. Raises UserError if the text needs a chat template that puts
    something before a response, or contains `<|im_start|>` in another place.
    """
    if TURN_START in text and TURN_START not in tokenizer.get_vocab():
        text = _own_text(tokenizer, text)
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def _own_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The equivalent of a ChatML text for a tokenizer of another format."""
    if text == TURN_START:
        return str(tokenizer.bos_token)
    if text != ASSISTANT_START:
        raise UserError(f"the context {text!r} needs <|im_start|>, which this model's tokenizer does not have")
    turns = [{"role": "user", "content": "x"}]
    asked, opened = (
        str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))
        for generation_prompt in (False, True)
    )
    if opened == asked or not opened.startswith(asked):
        raise UserError("bos: this model's chat template puts nothing before a response; use im_start or none")
    return opened.removeprefix(asked)


def _generation_stop_ids(model_folder: Path) -> list[int]:
    path = model_folder / "generation_config.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    ids = found if isinstance(found, list) else [found]
    return [token for token in ids if isinstance(token, int)]


def _from_folder(folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged tokenizer.json raises exactly this class
        raise UserError(
            f"model.path: cannot load a tokenizer from {folder}: {error}\n"
            "The folder needs the model's tokenizer.json and tokenizer_config.json."
        ) from error


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    if not is_hub_name(name):
        raise no_folder("model.path", name)
    with asking_hub("model.path", name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, local_files_only=not can_reach_hub())


def _require_special_tokens(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    vocabulary = tokenizer.get_vocab()
    chatml = any(token in vocabulary for token in (TURN_START, TURN_END))
    needed = CHATML if chatml else (tokenizer.bos_token, tokenizer.eos_token)
    missing = [token for token in needed if token not in vocabulary]
    if missing and not chatml:
        raise UserError(
            f"model.path: the tokenizer in {path} has neither Qwen's <|im_start|> and <|im_end|> nor its own bos_token "
            "and eos_token. Use the tokenizer that came with the chat model."
        )
    if missing:
        raise UserError(
            f"model.path: the tokenizer in {path} has no token {', '.join(missing)}, which belongs to Qwen's chat "
            "format. Use the tokenizer that came with the chat model."
        )
    split = [token for token in needed if tokenizer.encode(token, add_special_tokens=False) != [vocabulary[token]]]
    if split:
        raise UserError(
            f"model.path: the tokenizer in {path} does not read {', '.join(split)} as one token. "
            "Declare it as a special token in tokenizer_config.json."
        )


def _require_fitting_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, path: str) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"model.path: the tokenizer in {path} has token ids up to {largest} ({token!r}), but the model has only "
            f"{vocab_size} embedding rows (vocab_size in its config.json). Use the model's own tokenizer."
        )
