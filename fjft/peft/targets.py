"""Which modules a config means, by their Hugging Face names."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from fjft.errors import UserError
from fjft.models.layers import Linear, TiedHead
from fjft.models.weights import Site, module_at

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."
# Where tables of tokens lie: that of a decoder or an encoder, and those of both halves.
_TABLES = ("embedding.weight", "embeddings.words.weight", "decoder_embedding.weight")
_HEAD = "lm_head.weight"


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


def table_site(sites: Iterable[Site]) -> Site:
    """The site of the table of the input's tokens."""
    return next(site for site in sites if site.path in _TABLES)


def head_table(sites: Iterable[Site]) -> Site:
    """The site of the table that an output head may be tied to."""
    return [site for site in sites if site.path in _TABLES][-1]


def is_of_table(path: str) -> bool:
    """Whether a parameter is of a table of tokens, or of its adapter."""
    modules = (table.removesuffix("weight") for table in _TABLES)
    return path.startswith(tuple(modules))


def is_head(site: Site) -> bool:
    """Whether a site is that of a language model's output head."""
    return site.path == _HEAD


def tied_names(site: Site) -> list[str]:
    """The modules that a table of tokens is besides itself.

    A tensor's aliases are these, and itself with and without a prefix.
    """
    own = site.hf_modules[0]
    names = [alias.rpartition(".")[0] for alias in site.aliases[0]]
    return [n for n in names if not (own.endswith(n) or n.endswith(own))]


def low_rank_sites(model: Any, sites: Sequence[Site]) -> list[Site]:
    """The sites of all weights that low-rank adapters may stand beside.

    Those of linear maps; the table of tokens, where there is one only; and the output
    head, even if that is a table, and so has no site of its own.
    """
    found = linear_sites(model, sites)
    tables = [site for site in sites if site.path in _TABLES]
    if not hasattr(model, "decoder_embedding"):
        found = tables + found
    if isinstance(getattr(model, "lm_head", None), TiedHead):
        name = tied_names(head_table(sites))[-1]
        found.append(Site(_HEAD, (f"{name}.weight",), ()))
    return found


def adapters(model: nnx.Module, sites: Sequence[Site]) -> Iterator[tuple[Site, Any]]:
    """The maps and tables that carry an adapter, and it."""
    for site in low_rank_sites(model, sites):
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


def select_linears(
    pattern: str, sites: Sequence[Site], *, adapts_head: bool = False
) -> set[str]:
    """What `peft.target_modules` means, by the modules' names.

    Args:
      pattern: A regex, or `all-linear` for every linear map but those of the head.
      sites: Those of the weights that can be meant.
      adapts_head: Whether the output head of language models is one of them.

    Raises:
      UserError: The regex is broken, matches nothing, or means the output head.
    """
    # Not every family calls its head so.
    lm_head = {m for site in sites if is_head(site) for m in site.hf_modules}
    if pattern == ALL_LINEAR:
        sites = [s for s in sites if not (s.head or is_head(s) or s.path in _TABLES)]
    names = [m for site in sites for m in site.hf_modules]
    chosen = select(pattern, names, "peft.target_modules")
    # Files call GPT-NeoX's head `embed_out`. PEFT goes by the module, which newer
    # versions of transformers call `lm_head`, so no name is right for all of them.
    adapted = {"lm_head"} if adapts_head else set()
    if (lm_head & chosen) - adapted:
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
    """Names of adapted modules as PEFT's `target_modules` lists them.

    The last parts alone, `["q_proj", "v_proj"]`, if they mean no other module.
    """
    return short_names(adapted, low_rank_sites(model, sites))


def lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that means `name`, else `default`."""
    return next((v for key, v in patterns.items() if matches(key, name)), default)
