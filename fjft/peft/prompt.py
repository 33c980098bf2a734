"""Prompt tuning: trained vectors before every row (Lester et al. 2021)."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fjft.errors import UserError
from fjft.models.layers import Rngs
from fjft.models.weights import Site
from fjft.options import check_name
from fjft.peft import virtual
from fjft.peft.virtual import cuts, is_trainable, num_trainable, peft_tensors

__all__ = ["Config", "cuts", "is_trainable", "num_trainable", "peft_tensors"]

PEFT_TYPE = "PROMPT_TUNING"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under PEFT's names.

    Attributes:
      num_virtual_tokens: Vectors before every row.
      prompt_tuning_init: What they start as: `RANDOM` numbers, or the vectors of a
        `TEXT`.
      prompt_tuning_init_text: That text, cut or repeated to the number of vectors.
      num_transformer_submodules: How many times as many vectors are held; an
        encoder-decoder's are 2 in PEFT, of which the encoder reads the first.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str = ""
    num_transformer_submodules: int = 1
    modules_to_save: str = ""

    def __post_init__(self):
        virtual.check_size(self.num_virtual_tokens)
        starts = ("RANDOM", "TEXT")
        check_name("peft.prompt_tuning_init", self.prompt_tuning_init, starts)
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise UserError(
                "peft.prompt_tuning_init=TEXT needs peft.prompt_tuning_init_text, and "
                "RANDOM has no use for it"
            )


def attach(model: Any, sites: Sequence[Site], config: Config, rngs: Rngs) -> None:
    """Puts the virtual tokens before the model.

    Raises:
      UserError: A pattern matches nothing, or the model cannot have such tokens.
    """
    model.prompt = nnx.data(make_tokens(model, config, rngs))
    virtual.is_trainable(config, sites)


def make_tokens(model: Any, config: Any, rngs: Rngs) -> virtual.Tokens:
    """The vectors as they start."""
    n = config.num_virtual_tokens
    rows = n * config.num_transformer_submodules
    return virtual.Tokens(rngs, rows, virtual.vector_size(model), n)


def start(
    model: Any,
    sites: Sequence[Site],
    config: Config,
    read: Callable[[Site], jax.Array],
) -> None:
    """Gives the virtual tokens the vectors of a text.

    Raises:
      UserError: The text has no tokens.
    """
    del sites, read
    if config.prompt_tuning_init != "TEXT":
        return
    tokenizer = model.provenance.files.load_tokenizer()
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise UserError(
            f"peft.prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no "
            "tokens"
        )
    tokens = model.prompt.tokens
    filled = [*itertools.islice(itertools.cycle(ids), tokens.shape[0])]
    vectors = model.word_vectors(jnp.array([filled], jnp.int32))[0]
    tokens[...] = vectors.astype(tokens.dtype)


def peft_config(model: Any, sites: Sequence[Site], config: Config) -> dict[str, Any]:
    """The method's part of PEFT's `adapter_config.json`."""
    text = config.prompt_tuning_init_text or None
    return virtual.peft_config(sites, config, prompt_sizes(model, config)) | {
        "prompt_tuning_init": config.prompt_tuning_init,
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": text and model.provenance.files.source,
    }


def prompt_sizes(model: Any, config: Any) -> dict[str, int]:
    """What PEFT would otherwise guess from the model's config."""
    return {
        "token_dim": model.prompt.tokens.shape[-1],
        "num_layers": model.arch.num_layers,
        "num_transformer_submodules": config.num_transformer_submodules,
    }


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that an `adapter_config.json` stands for.

    Raises:
      UserError: It uses a part of PEFT's method that is not implemented.
    """
    starts = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"}
    starts |= {"tokenizer_name_or_path", "inference_mode", "num_layers"}
    return virtual.from_peft(Config, adapter_config, frozenset(starts))
