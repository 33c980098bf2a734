"""Opens a model that starts from random weights: its config, and a tokenizer."""

import copy
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fjft.checkpoint.source import ModelFiles, load_tokenizer, open_info
from fjft.errors import UserError
from fjft.options import fits

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class NoTensors:
    """The weights of a model that has none yet."""

    names: Collection[str] = ()

    def shape(self, name: str) -> tuple[int, ...]:
        """There is no such tensor."""
        raise KeyError(name)

    def dtype(self, name: str) -> np.dtype:
        """There is no such tensor."""
        raise KeyError(name)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """There is no such tensor."""
        del index
        raise KeyError(name)


def open_untrained(
    source: str, revision: str | None, sizes: Mapping[str, float]
) -> ModelFiles:
    """Opens a model for its config and its tokenizer: its weights are to be made.

    Args:
      source: As in `open_model`.
      revision: As in `open_model`.
      sizes: Fields of the config that have another value here.

    Raises:
      UserError: Nothing there, no config, or it has no such field.
    """
    info = open_info(source, revision)
    config = copy.deepcopy(info.config)
    for name, value in sizes.items():
        given = getattr(config, name, None)
        if not fits(given, float) or not fits(value, type(given)):
            raise UserError(
                f"model.sizes.{name}={value}: in the config of {source} it is {given}; "
                "use the name of a number there, and such a number"
            )
        setattr(config, name, value)
    fields: dict[str, Any] = vars(info) | {
        "config": config,
        "config_dict": {**info.config_dict, **sizes},
        "tensors": NoTensors(),
    }
    return ModelFiles(**fields)


def with_tokenizer(files: ModelFiles, directory: Path) -> ModelFiles:
    """An untrained model with another tokenizer, whose special tokens its config names.

    Args:
      files: What `open_untrained` gave.
      directory: Where the tokenizer was saved.

    Raises:
      UserError: There is none.
    """
    tokenizer, config = load_tokenizer(directory), copy.deepcopy(files.config)
    new = {name: getattr(tokenizer, name) for name in _SPECIAL if hasattr(config, name)}
    # A model may start to write from one of these, or be made to end with one.
    roles = {str(getattr(config, name)): id for name, id in new.items()}
    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and value is not None:
            new.setdefault(name, roles.get(str(value), value))
    for name, id in new.items():
        setattr(config, name, id)
    return dataclasses.replace(
        files,
        config=config,
        config_dict={**files.config_dict, **new},
        generation_config=None,
        load_tokenizer=lambda: load_tokenizer(directory),
    )
