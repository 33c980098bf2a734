"""Parameters as flat dictionaries: dotted path -> array.

Inside the program a model's weights are a plain `dict[str, jax.Array]`, so that masks,
optimizers and checkpoints are ordinary functions of ordinary pytrees; `split` and
`merge` are the border to Flax.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, Any]


def flatten(nested: Mapping) -> Params:
    """Turns nested mappings into one, its keys joined by dots.

    `{"layers": {0: {"weight": w}}}` becomes `{"layers.0.weight": w}`.
    """
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def nest(params: Params) -> dict:
    """Undoes `flatten`; a key of digits becomes an integer, as in an `nnx.List`."""
    nested: dict = {}
    for path, leaf in params.items():
        *parents, last = (int(k) if k.isdigit() else k for k in path.split("."))
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Takes a module apart into its structure and its arrays by dotted path."""
    graphdef, state = nnx.split(module)
    return graphdef, flatten(nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, *params: Params) -> Any:
    """Puts a module together again from its structure and all its arrays."""
    together: Params = {}
    for part in params:
        together |= part
    return nnx.merge(graphdef, nest(together))


def update(module: nnx.Module, params: Params) -> None:
    """Replaces the arrays of `module` in place."""
    nnx.update(module, nest(params))


def logical_axes(module: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """The logical axis names that each parameter of `module` declares, by path."""
    variables = flatten(nnx.state(module))
    return {path: v.get_metadata()["axes"] for path, v in variables.items()}


def partition(params: Params, keep: Callable[[str], bool]) -> tuple[Params, Params]:
    """Splits `params` into those whose path satisfies `keep`, and the others."""
    kept = {path: leaf for path, leaf in params.items() if keep(path)}
    return kept, {path: leaf for path, leaf in params.items() if path not in kept}


def count(params: Params) -> int:
    """The number of scalars in `params`."""
    return sum(int(np.prod(leaf.shape)) for leaf in params.values())


def num_bytes(params: Any) -> int:
    """The bytes that the arrays of any pytree occupy; two codes of 4 bits are one."""
    return sum(
        int(np.prod(leaf.shape)) * num_bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(params)
    )


def num_bits(dtype: Any) -> int:
    """The bits that a number of this type occupies on a device.

    numpy, on the host, gives each a byte at least.
    """
    dtype = jnp.dtype(dtype)
    if dtype in (jnp.uint4, jnp.int4):
        return 4
    return dtype.itemsize * 8
