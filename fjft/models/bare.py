"""A model without what a method has put into it."""

from typing import Any

from flax import nnx

from fjft import tree


def without_adapters(model: Any) -> Any:
    """The same model with the same weights, but no adapters and no virtual tokens."""
    bare = tree.merge(*tree.split(model))
    module: Any
    for _, module in list(nnx.iter_modules(bare)):
        for slot in ("adapter", "prompt"):
            if getattr(module, slot, None) is not None:
                setattr(module, slot, nnx.data(None))
    return bare
