"""Flags that commands share, and `--config.KEY=VALUE`."""

import argparse
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from fjft.errors import UserError

OVERRIDE = "--config."


def make_parser(command: str, what: str, example: str) -> argparse.ArgumentParser:
    """A command's parser, with `--debug` and, at the end of its help, an example."""
    parser = argparse.ArgumentParser(
        prog=f"fjft {command}",
        description=what,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A shortened flag would change its meaning when a flag is added.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the stack trace of every error"
    )
    return parser


def add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds `--config`, and with it `--config.KEY=VALUE`."""
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        required=required,
        help="a config file; ARG, such as smoke, is passed to its get_config; "
        f"{OVERRIDE}KEY=VALUE sets any of its options, as in "
        f"{OVERRIDE}train.max_steps=10",
    )
    parser.set_defaults(overrides={})


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses flags; `overrides` are the texts by dotted key."""
    overrides, rest = {}, []
    for flag in argv:
        if not flag.startswith(OVERRIDE):
            rest.append(flag)
            continue
        key, equals, text = flag.removeprefix(OVERRIDE).partition("=")
        if not equals:
            parser.error(f"{flag} has no value; write {flag}=VALUE")
        overrides[key] = text
    flags = parser.parse_args(rest)
    if overrides and "overrides" not in flags:
        parser.error(f"there are no {OVERRIDE}KEY flags here")
    if overrides:
        flags.overrides = overrides
    return flags


def join_processes() -> None:
    """Joins the other processes of this run, if there are any; one speaks for all.

    Raises:
      UserError: There must be others, but they cannot be found.
    """
    from fjft import distributed

    if distributed.start() and not distributed.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def load_config(flags: argparse.Namespace, **more: Any) -> Any:
    """The config that `--config` names, with what the command line sets.

    Args:
      flags: From `parse`.
      **more: Further options by dotted key.

    Raises:
      UserError: No such file, an unknown key, or a value of the wrong type.
    """
    from fjft import build

    config = build.load_config(flags.config)
    apply_overrides(config, flags)
    build.override(config, more)
    return config


def apply_overrides(config: Any, flags: argparse.Namespace) -> None:
    """Sets what `--config.KEY=VALUE` says, in place.

    Raises:
      UserError: An unknown key, or a value of the wrong type.
    """
    from fjft import build

    # One at a time: an option's type may depend on a choice that stands before it.
    choices = sorted(flags.overrides, key=lambda key: key not in build.CHOICES)
    for key in choices:
        hint = build.option_type(config, key)
        value = parse_value(key, flags.overrides[key], hint)
        build.override(config, {key: value})


def parse_value(key: str, text: str, hint: Any) -> Any:
    """The value that a text stands for, in the type of the option.

    `1e-4` is a float, `true` a bool, `128,256` a tuple of integers.

    Raises:
      UserError: It is not of that type.
    """
    from fjft.options import say_type

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_one_of(key, text, args)
    if origin is tuple:
        parts = re.split(r"\s*,\s*", text.strip("()[] "))
        return tuple(parse_value(key, part, args[0]) for part in parts if part)
    try:
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if hint in (int, float):
            return hint(text)
    except (KeyError, ValueError):
        raise UserError(f"{OVERRIDE}{key}={text}: use {say_type(hint)}") from None
    if hint is str:
        return text
    raise UserError(f"{OVERRIDE}{key}={text}: set one entry, {OVERRIDE}{key}.NAME=...")


def _parse_one_of(key: str, text: str, hints: Sequence[Any]) -> Any:
    """The value in the first of these types that it is of."""
    errors = []
    for hint in hints:
        try:
            return parse_value(key, text, hint)
        except UserError as error:
            errors.append(error)
    raise errors[0]
