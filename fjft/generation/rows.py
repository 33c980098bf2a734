"""How a model and its prompts are laid out for decoding: few shapes, on its devices."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fjft import tree
from fjft.sharding import batch_sharding, data_shards

SMALLEST_BUCKET = 16


def structure(model: Any) -> tuple[Any, tree.Params]:
    """Structure and arrays; equal structures compare equal, wherever they came from."""
    graphdef, params = tree.split(model)
    if model.provenance is not None:
        # What is compiled must neither hang on to files nor differ because of them.
        bare = tree.merge(graphdef, params)
        bare.provenance = None
        graphdef, params = tree.split(bare)
    return graphdef, params


def mesh_of(params: tree.Params) -> Mesh | None:
    """The mesh that the weights lie on, if they lie on one."""
    for leaf in params.values():
        if isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh  # type: ignore[return-value]
    return None


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Makes it the current mesh for a while."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def pad_left(
    prompts: Sequence[Sequence[int]], num_rows: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and segments, [B, T], padded on the left and with empty rows."""
    shards = 1 if mesh is None else data_shards(mesh)
    num_rows = -(-num_rows // shards) * shards
    length = bucket(max(len(prompt) for prompt in prompts))
    input_ids = np.zeros((num_rows, length), np.int32)
    segment_ids = np.zeros((num_rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    return input_ids, segment_ids


def pad_stop_ids(ids: tuple[int, ...]) -> np.ndarray:
    """Fills up to a multiple of 8 with what no token is."""
    return np.array([*ids, *[-1] * (8 - len(ids) % 8)], np.int32)


def bucket(size: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def put(array: np.ndarray, mesh: Mesh | None) -> Any:
    """Puts rows over the devices; every process has all of them and gives its own."""
    if mesh is None:
        return array
    return jax.make_array_from_callback(
        array.shape, batch_sharding(mesh), lambda index: array[index]
    )
