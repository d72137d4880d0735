"""SGLang's models of the supported families (model/architecture.py), by the name under which it looks for models.

SGLang's plug-in mechanism takes classes, so they get their linear layers for this platform here.
"""

from sglang.srt.models import llama, qwen2, qwen3, qwen3_moe

from megatron_dsrl.platform.sglang_cpu.packed_linear import PackedModel


class LlamaForCausalLM(PackedModel, llama.LlamaForCausalLM):
    """Llama and its relatives, such as SmolLM2."""


class Qwen2ForCausalLM(PackedModel, qwen2.Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class Qwen3ForCausalLM(PackedModel, qwen3.Qwen3ForCausalLM):
    """Dense Qwen3."""


class Qwen3MoeForCausalLM(PackedModel, qwen3_moe.Qwen3MoeForCausalLM):
    """Qwen3 with experts."""


EntryClass = [LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM]
