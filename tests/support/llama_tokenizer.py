"""The tiny task's tokenizer with Llama 3's special tokens and chat format."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from examples.tiny_dsrl.tokenizer import build_tokenizer

RENAMED = {
    "<|im_start|>": "<|begin_of_text|>",
    "<|im_end|>": "<|eot_id|>",
    "<|endoftext|>": "<|end_of_text|>",
}
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- message.role + '\\n' + message.content + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'assistant\\n' -}}
{%- endif -%}
"""


def build_llama_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Like `build_tokenizer`, but with BOS, an end of turn and an end of text instead of ChatML's special tokens."""
    text = build_tokenizer().backend_tokenizer.to_str()
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
