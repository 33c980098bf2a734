"""What GGUF calls the tensors of each architecture, and how it stores them."""

import dataclasses
import re
from collections.abc import Mapping

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
QK_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
# Gemma's head is its embedding; only Gemma 3 has a name for one of its own.
GEMMA_NAMES = {name: hf for name, hf in LLAMA_NAMES.items() if name != "output"}
GEMMA2_NAMES = GEMMA_NAMES | {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores one architecture.

    Attributes:
      names: Its tensor names to Hugging Face's, `{}` for the layer; without suffix.
      permuted: Whether each head's rows of q and k are interleaved (first of the lower
        half, first of the upper half, second of the lower ...) for its form of RoPE.
      norm_shift: What is added to the weights of norms before they are stored.
      biased: Whether llama.cpp looks for biases, without which it loads no file that
        has some.
    """

    names: Mapping[str, str]
    permuted: bool = False
    norm_shift: float = 0.0
    biased: bool = False

    def hf_name(self, name: str) -> str | None:
        """`blk.3.attn_q.weight` gives `model.layers.3.self_attn.q_proj.weight`."""
        return _translate(name, self.names)

    def gguf_name(self, hf_name: str) -> str | None:
        """The other way round; None for a tensor that the architecture has not."""
        if hf_name.endswith(".bias") and not self.biased:
            return None
        return _translate(hf_name, {hf: name for name, hf in self.names.items()})

    def heads(self, hf_name: str, heads: int, kv_heads: int) -> int:
        """The number of heads whose rows are interleaved in a tensor; 0: none are."""
        if not self.permuted:
            return 0
        q, k = (f".self_attn.{part}_proj." in hf_name for part in "qk")
        return heads if q else kv_heads if k else 0

    def shift(self, hf_name: str) -> float:
        """What a tensor is stored with on top of its values."""
        return self.norm_shift if hf_name.endswith("norm.weight") else 0.0


def _translate(name: str, names: Mapping[str, str]) -> str | None:
    stem, _, suffix = name.rpartition(".")
    number = re.search(r"\d+", stem)
    found = names.get(re.sub(r"\d+", "{}", stem))
    return found and f"{found.format(number and number.group())}.{suffix}"


ARCHITECTURES = {
    "llama": Architecture(LLAMA_NAMES, permuted=True, biased=True),
    "qwen2": Architecture(LLAMA_NAMES, biased=True),
    "qwen3": Architecture(LLAMA_NAMES | QK_NORMS),
    "gemma": Architecture(GEMMA_NAMES, norm_shift=1.0),
    "gemma2": Architecture(GEMMA2_NAMES, norm_shift=1.0),
    "gemma3": Architecture(
        GEMMA2_NAMES | QK_NORMS | {"output": "lm_head"}, norm_shift=1.0
    ),
}
