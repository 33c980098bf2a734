"""Options of methods, read from PEFT's `adapter_config.json`."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from fjft.errors import UserError

C = TypeVar("C")

# Keys that leave what an adapter computes as it is.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)


def as_regex(names: str | Sequence[str] | None) -> str:
    r"""A regex as we have it, from PEFT's regex or list.

    `["q_proj", "mlp.up"]` becomes `mlp\.up|q_proj`, and None or nothing "".
    """
    if isinstance(names, str):
        return names
    return "|".join(map(re.escape, sorted(names or ())))


def read(
    cls: type[C],
    adapter_config: Mapping[str, Any],
    *,
    patterns: Collection[str],
    harmless: Collection[str] = (),
) -> C:
    """The options that an `adapter_config.json` stands for.

    Args:
      cls: The method's `Config`, whose fields are named as PEFT names them.
      adapter_config: What the file says.
      patterns: Fields that are a regex here and a regex or a list of names there.
      harmless: More keys that do not matter.

    Raises:
      UserError: It uses a part of the method that is not implemented.
    """
    names = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    ignored = {*_HARMLESS, *harmless} - names
    rest = {
        key: value
        for key, value in adapter_config.items()
        if key not in ignored and value is not None
    }
    known = {name: rest.pop(name) for name in names & set(rest)}
    unknown = {k: v for k, v in rest.items() if v and (k, v) != ("bias", "none")}
    if unknown:
        kind = adapter_config.get("peft_type")
        raise UserError(f"the adapter uses parts of {kind} that fjft lacks: {unknown}")
    known |= {name: as_regex(known.get(name)) for name in patterns}
    # JSON has lists where options are tuples.
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    return cls(**known)
