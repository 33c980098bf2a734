"""Options of a config against the dataclass fields that they become."""

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from fjft.errors import UserError

T = TypeVar("T")

# What weights and activations may be; `auto` is what the checkpoint has.
DTYPES = ("float32", "bfloat16", "float16", "auto")


def make_section(cls: type[T], name: str, values: Mapping[str, Any]) -> T:
    """Makes one section's dataclass.

    Args:
      cls: The dataclass; its annotations are the types that are allowed.
      name: The section, for messages.
      values: Option -> value.

    Raises:
      UserError: An option is unknown, missing or of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise UserError(f"config key '{name}.{key}' is unknown{hint}")
        check_type(f"{name}.{key}", value, hints[key])
    for key, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            raise UserError(f"config key '{name}.{key}' is missing; the config sets it")
    return cls(**values)


def check_name(option: str, name: str | None, known: Iterable[str | None]) -> None:
    """Checks that a name is in a table.

    Raises:
      UserError: It is not; lists those that are.
    """
    if name not in known:
        raise UserError(f"{option}={name!r} is unknown; use one of {list(known)}")


def check_least(option: str, value: int, least: int) -> None:
    """Checks that a number is not too small.

    Raises:
      UserError: It is.
    """
    if value < least:
        raise UserError(f"{option}={value} is too small; use at least {least}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one, or all."""
    known = list(known)
    # The last part counts most: `train.lr` is not meant as `train.seed`.
    close = difflib.get_close_matches(name, known, n=1)
    last = name.rpartition(".")[2]
    close += [full for full in known if full.rpartition(".")[2] == last]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def check_type(key: str, value: Any, hint: Any) -> None:
    """Checks a value against the type that a dataclass field is declared with.

    Raises:
      UserError: It does not fit.
    """
    if not fits(value, hint):
        raise UserError(f"{key}={value!r} is of the wrong type; use {say_type(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of a type; an int is a float too, a bool is no int."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(v, args[0]) for v in value)
    if origin is Mapping:
        mapping = isinstance(value, Mapping | ConfigDict)
        return mapping and all(fits(v, args[1]) for v in value.values())
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def say_type(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(say_type, args))
    if origin is tuple:
        return f"{say_type(args[0])}, or several with commas"
    if origin is Mapping:
        return f"a mapping of names to: {say_type(args[1])}"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
    }
    return words.get(hint, str(hint))
