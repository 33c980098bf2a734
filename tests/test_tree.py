"""Trees of parameters by dotted path."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fjft import tree


class Leaf(nnx.Module):
    def __init__(self, value):
        self.weight = nnx.Param(jnp.full((2, 3), value), axes=("heads", "embed"))


class Root(nnx.Module):
    def __init__(self):
        self.parts = nnx.List(Leaf(float(i)) for i in range(12))
        self.bias = nnx.Param(jnp.zeros(3, jnp.bfloat16), axes=("embed",))
        self.label = "a static attribute"


def test_flatten_joins_and_nest_undoes_it():
    nested = {"layers": {0: {"weight": 1}, 10: {"weight": 2}}, "norm": {"weight": 3}}
    flat = tree.flatten(nested)
    assert flat == {"layers.0.weight": 1, "layers.10.weight": 2, "norm.weight": 3}
    assert tree.nest(flat) == nested


def test_split_and_merge_give_the_same_module():
    root = Root()
    graphdef, params = tree.split(root)
    assert set(params) == {"bias", *(f"parts.{i}.weight" for i in range(12))}
    kept, rest = tree.partition(params, lambda path: path.startswith("parts.1"))
    assert set(kept) == {"parts.1.weight", "parts.10.weight", "parts.11.weight"}
    assert set(kept) | set(rest) == set(params)
    merged = tree.merge(graphdef, rest, kept)
    for i, part in enumerate(merged.parts):
        np.testing.assert_array_equal(part.weight[...], np.full((2, 3), float(i)))
    assert merged.label == root.label


def test_merge_without_all_parameters_fails():
    graphdef, params = tree.split(Root())
    del params["bias"]
    with pytest.raises(ValueError, match="expected 13 leaves, but got 12"):
        tree.merge(graphdef, params)


def test_later_parameters_win_and_update_is_in_place():
    root = Root()
    graphdef, params = tree.split(root)
    ones = {"bias": jnp.ones(3, jnp.bfloat16)}
    assert tree.merge(graphdef, params, ones).bias[...].tolist() == [1, 1, 1]
    tree.update(root, ones)
    assert root.bias[...].tolist() == [1, 1, 1]
    assert root.parts[3].weight[0, 0] == 3


def test_axes_come_by_path():
    axes = tree.logical_axes(Root())
    assert axes["bias"] == ("embed",)
    assert axes["parts.11.weight"] == ("heads", "embed")


def test_scalars_and_bytes_are_counted():
    _, params = tree.split(Root())
    assert tree.count(params) == 12 * 6 + 3
    assert tree.num_bytes(params) == 4 * 12 * 6 + 2 * 3
    assert tree.num_bytes({"a": [params["bias"]], "b": ()}) == 6
