"""Which modules a config means, by their Hugging Face names."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from fjft.errors import UserError
from fjft.models.layers import Linear
from fjft.models.weights import Site, module_at

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class PeftTensor:
    """A tensor of PEFT's file, and the part of a parameter that it is.

    Attributes:
      name: The key in `adapter_model.safetensors`.
      path: The parameter's path in our model.
      index: The part of it: a layer of a stack, the used rows of a padded matrix.
    """

    name: str
    path: str
    index: tuple[int | slice, ...]


def linear_sites(model: nnx.Module, sites: Iterable[Site]) -> list[Site]:
    """The sites of all linear maps' weights."""
    return [
        site
        for site in sites
        if site.path.endswith(".weight")
        and isinstance(module_at(model, site.module), Linear)
    ]


def adapters(model: nnx.Module, sites: Iterable[Site]) -> Iterator[tuple[Site, Any]]:
    """The linear maps that carry an adapter, and it."""
    for site in linear_sites(model, sites):
        adapter = module_at(model, site.module).adapter
        if adapter is not None:
            yield site, adapter


def holders(name: str) -> list[str]:
    """A module and those that hold it, outermost first: `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def matches(pattern: str, name: str) -> bool:
    r"""Whether a regex means a module: its whole name, or its last parts.

    `q_proj` and `layers\.[0-3]\..*` match `model.layers.0.self_attn.q_proj`, as they
    do in PEFT as an entry of a list and as a pattern key.
    """
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def select(
    pattern: str, names: Sequence[str], option: str, what: str = "module"
) -> set[str]:
    """The names that `pattern` means.

    Args:
      pattern: A regex, or `all-linear` for every name but `lm_head`.
      names: What could match.
      option: The config key, for the error.
      what: What has these names, for the error.

    Raises:
      UserError: The regex is broken or matches nothing; lists what could match.
    """
    if pattern == ALL_LINEAR:
        return {name for name in names if name.rpartition(".")[2] != "lm_head"}
    try:
        found = {name for name in names if matches(pattern, name)}
    except re.error as error:
        raise UserError(f"{option}={pattern!r} is not a regex: {error}") from error
    if not found:
        could = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"{option}={pattern!r} matches no {what}; {what} names end in {could}, "
            f"for example {names[0]!r}"
        )
    return found


def select_linears(pattern: str, linears: Sequence[Site]) -> set[str]:
    """The linear maps that `peft.target_modules` means, by their modules' names.

    Args:
      pattern: A regex, or `all-linear` for every map but those of the head.
      linears: The sites of all linear maps' weights.

    Raises:
      UserError: The regex is broken, matches nothing, or means the output head.
    """
    is_all = pattern == ALL_LINEAR
    # Not every family calls its head so.
    lm_head = {m for s in linears if s.path == "lm_head.weight" for m in s.hf_modules}
    names = [m for s in linears if not (is_all and s.head) for m in s.hf_modules]
    if is_all:
        names = [m for m in names if m not in lm_head]
    chosen = select(pattern, names, "peft.target_modules")
    if lm_head & chosen:
        head = "".join(lm_head)
        raise UserError(
            f"peft.target_modules={pattern!r} means {head}, which this method does not "
            f"adapt; train it whole with peft.modules_to_save={head}"
        )
    return chosen


def whole_stacks(
    chosen: Collection[str],
    sites: Iterable[Site],
    option: str,
    names_of: Callable[[Site], Sequence[str]] = lambda site: site.hf_modules,
) -> list[Site]:
    """The sites of chosen modules, whose stacks must be chosen whole.

    Args:
      chosen: Names.
      sites: Where they may lie.
      option: The config key that chose them, for the error.
      names_of: The names that a site has, by default those of its modules.

    Raises:
      UserError: Some layers of a stack are chosen and others are not.
    """
    found = []
    for site in sites:
        inside = [name in chosen for name in names_of(site)]
        if any(inside) and not all(inside):
            raise UserError(
                f"{option} means some layers of {site.path} and not others, which "
                "this program trains together; name all of them, or train the last "
                "ones with peft.method=last_layers"
            )
        if any(inside):
            found.append(site)
    return found


def short_names(modules: Collection[str], sites: Iterable[Site]) -> list[str]:
    """Names of modules for a list of PEFT's: the last parts, if they mean no others."""
    leaves = {name.rpartition(".")[2] for name in modules}
    every = {name for site in sites for name in site.hf_modules}
    same = {name for name in every if name.rpartition(".")[2] in leaves}
    return sorted(leaves if same == set(modules) else modules)


def peft_names(
    adapted: Sequence[str], model: nnx.Module, sites: Sequence[Site]
) -> list[str]:
    """Names of linear maps as PEFT's `target_modules` lists them.

    The last parts alone, `["q_proj", "v_proj"]`, if they mean no other linear map.
    """
    return short_names(adapted, linear_sites(model, sites))


def lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that means `name`, else `default`."""
    return next((v for key, v in patterns.items() if matches(key, name)), default)
