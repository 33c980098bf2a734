"""P-tuning: prompt tuning whose vectors come out of a small network (Liu et al. 2021).

The network is thrown away after training: files hold what comes out of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from fjft.errors import UserError
from fjft.models.layers import Rngs
from fjft.models.weights import Site
from fjft.peft import prompt, virtual
from fjft.peft.virtual import cuts, is_trainable, num_trainable, peft_tensors

__all__ = ["Config", "cuts", "is_trainable", "num_trainable", "peft_tensors"]

PEFT_TYPE = "P_TUNING"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      num_virtual_tokens: Vectors before every row.
      encoder_hidden_size: Width of the network; 0 is that of the vectors.
      encoder_reparameterization_type: The network, `MLP`.
      inference_mode: Whether the vectors stand for themselves, without a network, as
        they do once they are in a file.
      num_transformer_submodules: As in prompt tuning.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    num_virtual_tokens: int = 20
    encoder_hidden_size: int = 0
    encoder_reparameterization_type: str = "MLP"
    inference_mode: bool = False
    num_transformer_submodules: int = 1
    modules_to_save: str = ""

    def __post_init__(self):
        virtual.check_size(self.num_virtual_tokens)
        if self.encoder_reparameterization_type != "MLP" and not self.inference_mode:
            raise UserError(
                "peft.encoder_reparameterization_type="
                f"{self.encoder_reparameterization_type!r} is not there; use MLP"
            )


class Encoder(virtual.Tokens):
    """Vectors that go through three linear maps with ReLUs between them."""

    def __init__(
        self, rngs: Rngs, num_rows: int, size: int, num_tokens: int, width: int
    ):
        super().__init__(rngs, num_rows, size, num_tokens)
        self.first = virtual.make_linear(rngs, "first", (width, size), ("mlp", "embed"))
        self.second = virtual.make_linear(
            rngs, "second", (width, width), ("embed", "mlp")
        )
        self.third = virtual.make_linear(rngs, "third", (size, width), ("mlp", "embed"))

    def all_vectors(self) -> Float[Array, "R D"]:
        """Of used and unused rows."""
        hidden = jax.nn.relu(self.first(self.tokens[...]))
        return self.third(jax.nn.relu(self.second(hidden)))


def attach(model: Any, sites: Sequence[Site], config: Config, rngs: Rngs) -> None:
    """Puts the virtual tokens and their network before the model.

    Raises:
      UserError: A pattern matches nothing, or the model cannot have such tokens.
    """
    if config.inference_mode:
        model.prompt = nnx.data(prompt.make_tokens(model, config, rngs))
    else:
        n, size = config.num_virtual_tokens, virtual.vector_size(model)
        rows, width = n * config.num_transformer_submodules, config.encoder_hidden_size
        model.prompt = nnx.data(Encoder(rngs, rows, size, n, width or size))
    virtual.is_trainable(config, sites)


def plain(model: Any, sites: Sequence[Site], config: Config) -> tuple[Any, Config]:
    """A model and options without the network, as files have it."""
    del sites
    if config.inference_mode:
        return model, config
    config = dataclasses.replace(
        config,
        inference_mode=True,
        encoder_hidden_size=model.prompt.first.weight.shape[0],
    )
    tokens = prompt.make_tokens(model, config, Rngs(0))
    return virtual.with_tokens(model, tokens, model.prompt.all_vectors()), config


def peft_config(model: Any, sites: Sequence[Site], config: Config) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    sizes = prompt.prompt_sizes(model, config)
    return virtual.peft_config(sites, config, sizes) | {
        "encoder_hidden_size": config.encoder_hidden_size or sizes["token_dim"],
        "encoder_reparameterization_type": config.encoder_reparameterization_type,
    }


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's method that is not implemented.
    """
    shapes = frozenset({"encoder_num_layers", "encoder_dropout", "num_layers"})
    stored = {**adapter_config, "inference_mode": True}
    return virtual.from_peft(Config, stored, shapes)
