"""Trains the vectors of chosen tokens, and of no others.

As PEFT's `TrainableTokensConfig`: for tokens that are new, or get a new meaning. Where
the output head is the table of embeddings, it has the trained vectors too. (And still
its bias, if it has one, as BERT's has; PEFT 0.21 leaves that out.)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fjft.errors import UserError
from fjft.models.layers import Embedding, Maker, Rngs, Terms
from fjft.models.weights import Site, module_at
from fjft.peft import existing, options, targets
from fjft.peft.lora_adapter import ADAPTER
from fjft.peft.targets import PeftTensor

PEFT_TYPE = "TRAINABLE_TOKENS"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      token_indices: The ids of the tokens whose vectors are trained.
    """

    token_indices: tuple[int, ...] = ()

    def __post_init__(self):
        ids = self.token_indices
        if not ids:
            raise UserError(
                "peft.method=trainable_tokens needs peft.token_indices, the ids of the "
                "tokens to train, such as (32000, 32001)"
            )
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if list(ids).count(i) > 1)
            raise UserError(f"peft.token_indices names {twice} twice; name it once")


class Rows(nnx.Module):
    """Puts trained vectors in the place of some of a table's.

    Attributes:
      weight: Float32[n, D].
      ids: The tokens that they are of.
    """

    def __init__(self, rngs: Rngs, table: Embedding, ids: tuple[int, ...]):
        axis = table.weight.get_metadata()["axes"][1]
        zeros = jax.nn.initializers.zeros  # until `start`
        make = Maker(rngs, jnp.float32)
        self.weight = make((len(ids), table.weight.shape[1]), (None, axis), zeros)
        self.ids = ids

    def __call__(
        self, table: Embedding, ids: Int[Array, "*B"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "*B D"]:
        order = np.argsort(self.ids)
        ordered = np.array(self.ids, np.int32)[order]
        place = jnp.minimum(jnp.searchsorted(ordered, ids), len(ordered) - 1)
        is_trained = jnp.asarray(ordered)[place] == ids
        rows = self.weight[...][jnp.asarray(order)[place]]
        return jnp.where(
            is_trained[..., None], rows.astype(dtype), table.base(ids, dtype)
        )

    def terms(self, table: Embedding, x: Float[Array, "*B D"]) -> Terms:
        """What the trained vectors change in the logits of their tokens."""
        ids = jnp.array(self.ids, jnp.int32)
        change = self.weight[...] - table.weight[...][ids].astype(jnp.float32)
        is_of_token = jax.nn.one_hot(ids, table.weight.shape[0], axis=0, dtype=x.dtype)
        return ((jnp.einsum("...i,ni->...n", x, change.astype(x.dtype)), is_of_token),)

    def merge(self, table: Embedding) -> None:
        """Writes the vectors into the table."""
        old = table.weight[...]
        new = self.weight[...].astype(old.dtype)
        table.weight[...] = old.at[jnp.array(self.ids)].set(new)


cuts = existing.cuts


def attach(model: Any, sites: Sequence[Site], config: Config, rngs: Rngs) -> None:
    """Puts vectors beside the table of tokens.

    Raises:
      UserError: The table has no such token, or PEFT would train those of another one
        with it.
    """
    site = targets.table_site(sites)
    table = module_at(model, site.module)
    vocab_size = table.weight.shape[0]
    beyond = [i for i in config.token_indices if not 0 <= i < vocab_size]
    if beyond:
        raise UserError(
            f"peft.token_indices has {beyond[0]}, but this model's tokens are 0 to "
            f"{vocab_size - 1}"
        )
    is_pair = hasattr(model, "decoder_embedding")
    # PEFT does not find the table that Marian's halves share.
    if is_pair and (not model.arch.ties_head or model.arch.positions == "sinusoidal"):
        raise UserError(
            f"PEFT trains tokens of both halves and the output head at once, and does "
            f"not do so in this encoder-decoder; train all of {site.hf_modules[0]} "
            "with peft.method=select"
        )
    table.adapter = nnx.data(Rows(rngs, table, tuple(config.token_indices)))


def start(
    model: nnx.Module,
    sites: Sequence[Site],
    config: Config,
    read: Callable[[Site], jax.Array],
) -> None:
    """The vectors as the table has them."""
    del read
    table = module_at(model, targets.table_site(sites).module)
    ids, trained = jnp.array(config.token_indices), table.adapter.weight
    begin = jax.jit(
        lambda weight: weight[ids].astype(jnp.float32),
        out_shardings=trained[...].sharding,
    )
    trained[...] = begin(table.weight[...])


def is_trainable(config: Config, sites: Sequence[Site]) -> Callable[[str], bool]:
    """The vectors."""
    return lambda path: path == _path(sites)


def num_trainable(model: nnx.Module, sites: Sequence[Site], config: Config) -> int:
    """The number of trained scalars."""
    return existing.count(model, [_path(sites)])


def peft_config(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> dict[str, Any]:
    """What PEFT's `adapter_config.json` says of the method."""
    return {
        "token_indices": list(config.token_indices),
        "target_modules": targets.table_site(sites).hf_modules[0],
        "init_weights": True,
    }


def peft_tensors(
    model: nnx.Module, sites: Sequence[Site], config: Config
) -> list[PeftTensor]:
    """PEFT's tensors: the vectors, once for each module that the table is."""
    site = targets.table_site(sites)
    names = [site.hf_modules[0], *targets.tied_names(site)]
    leaf = "trainable_tokens_delta"
    return [
        PeftTensor(f"{targets.PEFT_PREFIX}{name}.{leaf}", _path(sites), ())
        for name in names
    ]


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's trainable tokens that is not implemented.
    """
    # Were the target another module, the tensors' names would tell.
    harmless = "target_modules", "init_weights"
    return options.read(Config, adapter_config, patterns=(), harmless=harmless)


def _path(sites: Sequence[Site]) -> str:
    return f"{targets.table_site(sites).module}{ADAPTER}weight"
