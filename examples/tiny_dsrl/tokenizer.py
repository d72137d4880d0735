"""A tokenizer from scratch: printable characters, a few whole pieces, Qwen3's special tokens and chat format.

Numbers are read digit by digit. Pieces that the task writes all the time are one token, which keeps responses short.
"""

import string
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from examples.tiny_dsrl.base_settings import VOCAB_SIZE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
PIECES = ("system\n", "user\n", "assistant\n", "\n\n", "\n=", "\n\\boxed{", "\\boxed{", "=?")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"

# The behaviour of Qwen3's own template for system, user and assistant turns, without tools and reasoning content.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' and loop.last -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def build_tokenizer(pieces: Sequence[str] = PIECES, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """The tokenizer; `save_pretrained` writes a folder that `AutoTokenizer` loads.

    Args:
        pieces: strings that are one token each.
        vocab_size: embedding rows of the model; at least the number of tokens.
    """
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    tokens = [*SPECIAL_TOKENS, *THINK_TOKENS, *pieces, *characters, UNKNOWN]
    assert len(tokens) <= vocab_size and len(set(tokens)) == len(tokens)
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join([*map(_escape, longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _escape(piece: str) -> str:
    return "".join(c if c in string.ascii_letters + "\n=" else "\\" + c for c in piece)
