"""Batches on devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fjft import sharding
from fjft.training.step import Batch


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Puts this process's rows of a batch on its devices."""
    rows, shards = sharding.batch_sharding(mesh), sharding.local_shards(mesh)

    def place_column(local: np.ndarray) -> jax.Array:
        size = len(local) // len(shards)
        shape = size * sharding.data_shards(mesh), *local.shape[1:]

        def read(index: Any) -> np.ndarray:
            first = shards.index((index[0].start or 0) // size) * size
            return local[first : first + size]

        return jax.make_array_from_callback(shape, rows, read)

    return {name: place_column(column) for name, column in batch.items()}
