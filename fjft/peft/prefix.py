"""Prefix tuning: trained keys and values before each layer's (Li and Liang 2021)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fjft.errors import UserError
from fjft.models.encoder_decoder import EncoderDecoder
from fjft.models.layers import Maker, Rngs, normal
from fjft.models.weights import Site
from fjft.peft import virtual
from fjft.peft.virtual import cuts, is_trainable, num_trainable, peft_tensors

__all__ = ["Config", "cuts", "is_trainable", "num_trainable", "peft_tensors"]

PEFT_TYPE = "PREFIX_TUNING"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      num_virtual_tokens: Keys and values before those of every row.
      prefix_projection: Whether they come out of a small network, which is thrown away
        after training: files hold what comes out of it.
      encoder_hidden_size: Width of that network; 0 is that of a layer's keys.
      inference_mode: Whether they stand for themselves all the same, as they do once
        they are in a file.
      num_layers: The layers that there are keys and values for; 0 is all of the model's
        decoder.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int = 0
    inference_mode: bool = False
    num_layers: int = 0
    modules_to_save: str = ""

    def __post_init__(self):
        virtual.check_size(self.num_virtual_tokens)

    @property
    def is_projected(self) -> bool:
        """Whether there is a network."""
        return self.prefix_projection and not self.inference_mode


class Prefix(nnx.Module):
    """Keys and values of virtual tokens, each a parameter.

    Attributes:
      tokens: Float32[N, 2 * L * K * H], each row the layers' keys and values in turn.
      order: For each of the model's layers, whose keys and values it sees.
    """

    def __init__(
        self, rngs: Rngs, num_tokens: int, heads: tuple[int, int, int], order: tuple
    ):
        L, K, H = heads
        make = Maker(rngs, jnp.float32)
        shape = num_tokens, self.token_size(heads)
        # As torch's embeddings start.
        self.tokens = make(shape, ("positions", "embed"), normal(1.0))
        self.num_tokens, self.heads, self.order = num_tokens, (L, K, H), order

    def token_size(self, heads: tuple[int, int, int]) -> int:
        """The size of a virtual token's parameters."""
        L, K, H = heads
        return 2 * L * K * H

    def flat(self) -> Float[Array, "N C"]:
        """What files hold: each token's keys and values of all layers."""
        return self.tokens[...]

    def vectors(self) -> None:
        """Nothing stands before a row's token vectors."""

    def keys_values(self) -> Float[Array, "L 2 N K H"]:
        """What each layer sees before its own keys and values."""
        L, K, H = self.heads
        by_layer = self.flat().reshape(self.num_tokens, L, 2, K, H)
        return by_layer.transpose(1, 2, 0, 3, 4)[jnp.array(self.order)]


class Projected(Prefix):
    """Keys and values that come out of two linear maps with a tanh between them.

    Attributes:
      tokens: Float32[N, K * H].
    """

    def __init__(
        self,
        rngs: Rngs,
        num_tokens: int,
        heads: tuple[int, int, int],
        order: tuple,
        width: int,
    ):
        super().__init__(rngs, num_tokens, heads, order)
        size = self.token_size(heads)
        out = super().token_size(heads)
        self.inner = virtual.make_linear(
            rngs, "inner", (width or size, size), ("mlp", "embed")
        )
        self.outer = virtual.make_linear(
            rngs, "outer", (out, width or size), ("embed", "mlp")
        )

    def token_size(self, heads: tuple[int, int, int]) -> int:
        """The size of a virtual token's parameters."""
        return heads[1] * heads[2]

    def flat(self) -> Float[Array, "N C"]:
        """What files hold: each token's keys and values of all layers."""
        return self.outer(jnp.tanh(self.inner(self.tokens[...])))


def attach(model: Any, sites: Sequence[Site], config: Config, rngs: Rngs) -> None:
    """Puts virtual keys and values before those of a decoder.

    Raises:
      UserError: A pattern matches nothing, or the model has no decoder.
    """
    model.prompt = nnx.data(_make_prefix(model, config, rngs))
    virtual.is_trainable(config, sites)


def _make_prefix(model: Any, config: Config, rngs: Rngs) -> Prefix:
    heads, order = _shape(model, config.num_layers)
    if config.is_projected:
        width = config.encoder_hidden_size
        return Projected(rngs, config.num_virtual_tokens, heads, order, width)
    return Prefix(rngs, config.num_virtual_tokens, heads, order)


def _shape(model: Any, num_layers: int) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The layers, heads and head size of the file, and what each layer takes of it."""
    arch = model.arch
    if isinstance(model, EncoderDecoder):
        # PEFT cuts keys and values as if each layer had four of them, its own and those
        # for the encoder's tokens, and passes over the latter.
        side = arch.decoder
        total = num_layers or side.num_layers
        order = tuple(2 * layer % total for layer in range(side.num_layers))
        if total < side.num_layers:
            raise UserError(
                f"peft.num_layers={total} is less than the decoder's {side.num_layers}"
            )
        return (total, side.num_heads, side.head_dim), order
    if not hasattr(arch, "num_kv_heads"):
        raise UserError(
            f"a {type(model).__name__} has no decoder to put keys and values before; "
            "use peft.method=prompt or p_tuning"
        )
    if num_layers not in (0, arch.num_layers):
        raise UserError(
            f"peft.num_layers={num_layers}, but the model has {arch.num_layers}"
        )
    return (arch.num_layers, arch.num_kv_heads, arch.head_dim), (
        *range(arch.num_layers),
    )


def plain(model: Any, sites: Sequence[Site], config: Config) -> tuple[Any, Config]:
    """A model and options without the network, as files have it."""
    del sites
    if not config.is_projected:
        return model, config
    width = model.prompt.inner.weight.shape[0]
    config = dataclasses.replace(config, inference_mode=True, encoder_hidden_size=width)
    prefix = _make_prefix(model, config, Rngs(0))
    return virtual.with_tokens(model, prefix, model.prompt.flat()), config


def peft_config(model: Any, sites: Sequence[Site], config: Config) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    L, K, H = model.prompt.heads
    sizes = {
        "token_dim": K * H,
        "num_attention_heads": K,
        "num_layers": L,
        "num_transformer_submodules": 1 + isinstance(model, EncoderDecoder),
    }
    return virtual.peft_config(sites, config, sizes) | {
        "prefix_projection": config.prefix_projection,
        "encoder_hidden_size": config.encoder_hidden_size or K * H,
    }


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's method that is not implemented.
    """
    passed_over = frozenset({"init_weights", "num_transformer_submodules"})
    stored = {**adapter_config, "inference_mode": True}
    return virtual.from_peft(Config, stored, passed_over)
