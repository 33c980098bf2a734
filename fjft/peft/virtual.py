"""What the methods share that put virtual tokens before every row."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fjft import tree
from fjft.errors import UserError
from fjft.models.layers import Linear, Maker, Rngs, normal
from fjft.models.weights import Site
from fjft.peft import existing, options, saved
from fjft.peft.targets import PeftTensor

SLOT = "prompt"
TENSOR = "prompt_embeddings"
# PEFT wraps the model of such a method in one module, and of others in two.
PEFT_PREFIX = "base_model."


class Tokens(nnx.Module):
    """Virtual tokens' vectors, each a parameter.

    Attributes:
      tokens: Float32[rows, D].
      num_tokens: The rows that are used.
    """

    def __init__(self, rngs: Rngs, num_rows: int, size: int, num_tokens: int):
        make = Maker(rngs, jnp.float32)
        # As torch's embeddings start.
        self.tokens = make((num_rows, size), ("positions", "embed"), normal(1.0))
        self.num_tokens = num_tokens

    def all_vectors(self) -> Float[Array, "R D"]:
        """Of used and unused rows."""
        return self.tokens[...]

    def vectors(self) -> Float[Array, "N D"]:
        """What stands before a row's token vectors."""
        return self.all_vectors()[: self.num_tokens]

    def keys_values(self) -> None:
        """Nothing stands before keys and values."""


def make_linear(
    rngs: Rngs, name: str, sizes: tuple[int, int], axes: tuple[str, str]
) -> Linear:
    """A linear map that starts as torch's do, from which PEFT starts."""
    make = Maker(rngs, jnp.float32)
    linear = Linear(make, name, sizes, axes, bias=True, std=0.0)
    bound = 1 / math.sqrt(sizes[1])

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    linear.weight = make(sizes, axes, init)
    linear.bias = nnx.data(make(sizes[:1], axes[:1], init))
    return linear


def check_size(num_virtual_tokens: int) -> None:
    """Checks the option that all these methods have.

    Raises:
      UserError: It is not positive.
    """
    if num_virtual_tokens < 1:
        raise UserError(
            f"peft.num_virtual_tokens={num_virtual_tokens} is not positive; "
            "20 is a usual number"
        )


def vector_size(model: Any) -> int:
    """The size of what goes into the first layer, or before that into a projection.

    Raises:
      UserError: Virtual tokens of this model would depend on what comes after them.
    """
    for kind in getattr(model.arch, "kinds", ()):
        if getattr(getattr(kind, "rope", None), "beyond", None) is not None:
            raise UserError(
                "this model's rotary embeddings depend on a sequence's length, so "
                "virtual tokens would differ from one segment to another; use "
                "peft.method=prefix or lora"
            )
    return getattr(model.arch, "embedding_size", model.arch.hidden_size)


cuts = existing.cuts


def is_trainable(config: Any, sites: Sequence[Site]) -> Callable[[str], bool]:
    """The virtual tokens, what makes them, and what `modules_to_save` means."""
    whole = saved.paths(config.modules_to_save, sites)
    return lambda path: path.startswith(f"{SLOT}.") or path in whole


def num_trainable(model: Any, sites: Sequence[Site], config: Any) -> int:
    """The number of trained scalars."""
    whole = saved.paths(config.modules_to_save, sites)
    return tree.count(tree.split(model.prompt)[1]) + existing.count(model, whole)


def with_tokens(model: Any, prompt: Any, values: jax.Array) -> Any:
    """A copy of a model whose virtual tokens are `prompt`'s, with these values."""
    copy = tree.merge(*tree.split(model))
    prompt.tokens[...] = values
    copy.prompt = nnx.data(prompt)
    return copy


def peft_config(sites: Sequence[Site], config: Any, sizes: Mapping) -> dict[str, Any]:
    """What all these methods write into an `adapter_config.json`.

    Args:
      sites: Where each tensor of a checkpoint lies in the model.
      config: The method's options.
      sizes: `token_dim`, `num_layers` and the like.
    """
    modules = set(saved.modules(config.modules_to_save, sites).values())
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "modules_to_save": sorted(modules) or None,
        **sizes,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Any
) -> list[PeftTensor]:
    """PEFT's tensors: the virtual tokens, and modules that are trained whole."""
    del model
    own = PeftTensor(TENSOR, f"{SLOT}.tokens", (slice(None), slice(None)))
    return [own, *saved.tensors(config.modules_to_save, sites, PEFT_PREFIX)]


def from_peft(
    config_class: type,
    adapter_config: Mapping[str, Any],
    harmless: frozenset[str],
) -> Any:
    """The options that an `adapter_config.json` stands for.

    Args:
      config_class: The method's `Config`.
      adapter_config: What PEFT wrote.
      harmless: Keys that are passed over, besides those that are for every method.

    Raises:
      UserError: It uses a part of the method that is not implemented.
    """
    return options.read(
        config_class,
        adapter_config,
        patterns=("modules_to_save",),
        harmless={"num_attention_heads", "token_dim", *harmless},
    )
