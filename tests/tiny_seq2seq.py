"""Tiny random encoder-decoders, with numbers nobody would guess, and their twins.

As `tiny.py` for decoders: a new family needs an entry in `CONFIGS`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import fjft
from fjft import tree

T5: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 17,
    "layer_norm_epsilon": 3e-3,
    "initializer_factor": 0.7,
    "decoder_start_token_id": 4,
    "dropout_rate": 0.0,
}
BART: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 28,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 40,
    "init_std": 0.2,
    "scale_embedding": True,
    "dropout": 0.0,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 5,
}

# model_type -> variant -> fields of the Hugging Face config. A variant named `own-head`
# has an output head that differs from its embeddings, as no config says.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "t5": {
        "relu-tied": T5,
        "gated-own-head": T5
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    },
    "mt5": {"gated-own-head": T5 | {"feed_forward_proj": "gated-silu"}},
    "bart": {"post-norm": BART},
    "mbart": {"pre-norm": BART | {"activation_function": "relu"}},
    "marian": {
        "shared": BART | {"activation_function": "swish"},
        "two-vocabularies": BART
        | {
            "scale_embedding": False,
            "share_encoder_decoder_embeddings": False,
            "decoder_vocab_size": 50,
        },
    },
}
CASES = [f"{family}/{name}" for family, names in CONFIGS.items() for name in names]


def make_config(case: str, **changes: Any) -> Any:
    """The Hugging Face config of `family/variant`."""
    import transformers

    family, _, variant = case.partition("/")
    return transformers.AutoConfig.for_model(
        family, **(CONFIGS[family][variant] | changes)
    )


def make_torch(config: Any, own_head: bool = False, seed: int = 0) -> Any:
    """A random torch model in which no norm is 1 and no bias is 0."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            is_scale = "norm" in name and name.endswith("weight")
            torch.nn.init.normal_(parameter, float(is_scale), 0.3)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    if own_head:
        head = torch.randn(config.vocab_size, config.d_model) * 0.3
        model.lm_head.weight = torch.nn.Parameter(head)
    return model


@functools.cache
def torch_model(case: str) -> Any:
    """The twin; shared by all tests, which leave it as it is."""
    return make_torch(make_config(case), own_head=case.endswith("own-head"))


@dataclasses.dataclass(frozen=True)
class Twins:
    """One tiny model, here and in torch, with the same weights."""

    case: str
    directory: Path
    torch: Any
    model: Any

    @functools.cached_property
    def apply(self) -> Any:
        """Our forward pass, compiled; keyword arguments in numpy."""
        return jit_apply(self.model)


def make_twins(case: str, directory: Path) -> Twins:
    """Saves the torch model of a case and loads it here."""
    twin = torch_model(case)
    twin.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    return Twins(case, directory, twin, fjft.load_model(str(directory)))


def jit_apply(model: Any) -> Any:
    """A model's forward pass, compiled, from and to numpy."""
    graphdef, params = tree.split(model)
    apply = jax.jit(lambda params, batch: tree.merge(graphdef, params)(**batch))

    def call(**batch: Any) -> np.ndarray:
        arrays = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
        return np.asarray(apply(params, arrays))

    return call


def torch_logits(model: Any, **batch: np.ndarray) -> np.ndarray:
    """The oracle's logits."""
    import torch

    with torch.no_grad():
        out = model(
            **{name: torch.tensor(x).long() for name, x in batch.items()},
            use_cache=False,
        )
    return out.logits.float().numpy()


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    """Token ids that every vocabulary here has, and none of which is special."""
    return np.random.default_rng(seed).integers(6, 50, shape).astype(np.int32)


def make_tokenizer(num_sentinels: int) -> Any:
    """`tiny.make_tokenizer` whose last words are T5's sentinels, from the last down."""
    import tokenizers

    tokenizer = tiny.make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    last = len(vocabulary) - 1
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    for i in range(num_sentinels):
        names[last - i] = f"<extra_id_{i}>"
    tokenizer.backend_tokenizer.model = tokenizers.models.WordLevel(
        {name: i for i, name in enumerate(names)}, unk_token="<unk>"
    )
    return tokenizer
