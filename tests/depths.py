"""Tiny models of every family at any depth, without weights."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import tiny_encoders
import tiny_seq2seq
from flax import nnx

from fjft import tree
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.layers import Maker, Rngs

DEPTHS = 4, 16, 64
NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
# Which layers are of which kind, where it is not as the family has it anyway. Lists are
# continued by the pattern they are made of.
PATTERNS: dict[str, dict[str, Any]] = {
    "qwen3/alternating-biases": {
        "layer_types": ["sliding_attention", "full_attention"]
    },
    "gemma2/no-caps": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]
    },
    "gemma3_text/every-second": {
        "layer_types": ["sliding_attention", "full_attention"]
    },
}
# Their pattern is longer than fits into four layers twice, so that there is less to
# compile then: of Gemma 3's first four layers, say, none is its sixth.
LONG_PATTERNS = {
    "gemma2/no-caps",
    "gemma3_text/two-bases",
    "modernbert/biases-mean/masked_lm",
    "smollm3/every-third",
}
# The first variant of each family.
DECODERS = tuple(
    f"{family}/{next(iter(names))}" for family, names in tiny.CONFIGS.items()
)
ENCODERS = tuple(
    {
        c.partition("/")[0]: f"{c}/masked_lm" for c in reversed(tiny_encoders.CONFIGS)
    }.values()
)
ENCODER_DECODERS = tuple(
    f"{family}/{next(iter(names))}" for family, names in tiny_seq2seq.CONFIGS.items()
)


def make_config(case: str, depth: int) -> Any:
    """The Hugging Face config of a case, with so many layers."""
    family, variant = case.split("/")[:2]
    if case in ENCODERS:
        make, values = tiny_encoders.make_config, tiny_encoders.CONFIGS
        given = values[f"{family}/{variant}"]
    elif case in ENCODER_DECODERS:
        make, given = tiny_seq2seq.make_config, tiny_seq2seq.CONFIGS[family][variant]
    else:
        make, given = tiny.make_config, tiny.CONFIGS[family][variant]
    changes: dict[str, Any] = {name: depth for name in NAMES if name in given}
    for name, pattern in PATTERNS.get(case, {}).items():
        changes[name] = (pattern * depth)[:depth]
    config = make(case, **copy.deepcopy(changes))
    assert config.num_hidden_layers == depth
    return config


def make_model(case: str, depth: int) -> Any:
    """A model whose parameters are shapes."""
    config = make_config(case, depth)
    family = FAMILIES[config.model_type]
    fields = Fields(config, tiny.MemorySource({}))
    arch = family.architecture(fields)

    def make() -> Any:
        return family.MODEL(arch, Maker(Rngs(0), jnp.float32), "float32")

    return nnx.eval_shape(make)


def loss_and_gradient(case: str, depth: int) -> tuple[Any, Any]:
    """A function of parameters, and their shapes."""
    graphdef, abstract = tree.split(make_model(case, depth))
    ids = jnp.asarray(tiny.random_ids(2, 8))
    segments = jnp.asarray(np.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2]), jnp.int32)
    batch = {"input_ids": ids, "segment_ids": segments}
    if case in ENCODER_DECODERS:
        batch |= {"decoder_input_ids": ids, "decoder_segment_ids": segments}

    def loss(params: tree.Params) -> jax.Array:
        return jnp.mean(jnp.square(tree.merge(graphdef, params)(**batch)))

    return jax.value_and_grad(loss), abstract


def count_equations(jaxpr: Any) -> int:
    """The equations of a program, with those of all programs inside it."""
    inner = (
        value
        for equation in jaxpr.eqns
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        if _is_jaxpr(value)
    )
    found = (value.jaxpr if hasattr(value, "jaxpr") else value for value in inner)
    return len(jaxpr.eqns) + sum(map(count_equations, found))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
