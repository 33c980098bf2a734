"""Puts pretrained weights on devices, while the host holds little of them.

A device's part of a matrix is often a strip of its columns, which lie scattered over
the file. So a matrix is read in blocks of whole rows, and every block is dealt out to
the parts of many devices at once, instead of being read for each of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from fjft import tree
from fjft.checkpoint.source import ModelFiles, TensorSource
from fjft.models.weights import Site

HOST_BYTES = 1 << 30  # what the host holds of a parameter before it hands it on
BLOCK_BYTES = 8 << 20  # what one thread reads at a time
THREADS = 4  # some wait for the disk while others copy
ALIGNMENT = 64  # bytes; the CPU backend takes such buffers as they are

Bounds = tuple[tuple[int, int], ...]


def load_params(
    files: ModelFiles,
    sites: Sequence[Site],
    stored: Mapping[str, str],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> tree.Params:
    """Reads the pretrained parameters, only what this process's devices hold of them.

    The host holds a block for each thread, and of one parameter at a time the parts of
    as many devices as `HOST_BYTES` have room for, at least of one; it reads again for
    the next ones. Devices whose memory is the host's take all parts over as they are.

    Args:
      files: The pretrained model.
      sites: Where its tensors lie.
      stored: The checkpoint's name of each tensor.
      abstract: Shape and dtype of each parameter.
      shardings: How each parameter lies on the devices.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return {
            site.path: _load_param(
                files.tensors,
                site,
                stored,
                abstract[site.path],
                shardings[site.path],
                pool,
            )
            for site in sites
        }


def _load_param(
    tensors: TensorSource,
    site: Site,
    stored: Mapping[str, str],
    abstract: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    devices_of: dict[Bounds, list] = {}
    shape = abstract.shape
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    placed, every = [], list(devices_of)
    at_once = len(every)
    if not _share_memory(sharding):
        part = math.prod(sharding.shard_shape(shape)) * abstract.dtype.itemsize
        at_once = max(1, HOST_BYTES // max(1, part))
    for first in range(0, len(every), at_once):
        some = every[first : first + at_once]
        parts = {bounds: _aligned(bounds, abstract.dtype) for bounds in some}
        reads = [
            pool.submit(_read_block, tensors, stored[name], block, views)
            for name, views in _views(site, parts)
            for block in _blocks(views, tensors.dtype(stored[name]).itemsize)
        ]
        for read in reads:
            read.result()
        placed += jax.block_until_ready(
            [
                jax.device_put(parts[bounds], device)
                for bounds in some
                for device in devices_of[bounds]
            ]
        )
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _share_memory(sharding: NamedSharding) -> bool:
    """Whether what lies on the devices lies in the host's memory."""
    return all(device.platform == "cpu" for device in sharding.addressable_devices)


def _aligned(bounds: Bounds, dtype: Any) -> np.ndarray:
    shape = [stop - start for start, stop in bounds]
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


def _views(
    site: Site, parts: Mapping[Bounds, np.ndarray]
) -> Iterator[tuple[str, dict[Bounds, np.ndarray]]]:
    """Each tensor that is needed, and where its parts go, by their bounds in it."""
    depth = len(site.lead)
    for name, place in site.tensors():
        views = {}
        for bounds, part in parts.items():
            ahead = list(zip(place, bounds[:depth], strict=True))
            if all(start <= i < stop for i, (start, stop) in ahead):
                view = part[tuple(i - start for i, (start, _) in ahead)]
                if site.transpose:
                    views[bounds[depth:][::-1]] = view.T
                else:
                    views[bounds[depth:]] = view
        if views:
            yield name, views


def _blocks(views: Mapping[Bounds, np.ndarray], itemsize: int) -> Iterator[Bounds]:
    """The smallest box around all parts, cut into blocks of whole rows."""
    if () in views:
        yield ()
        return
    first, last = zip(*(zip(*bounds, strict=True) for bounds in views), strict=True)
    (start, stop), *rest = zip(
        map(min, zip(*first, strict=True)),
        map(max, zip(*last, strict=True)),
        strict=True,
    )
    row_bytes = itemsize * int(np.prod([b - a for a, b in rest]))
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for row in range(start, stop, step):
        yield ((row, min(row + step, stop)), *rest)


def _read_block(
    tensors: TensorSource, name: str, block: Bounds, views: Mapping[Bounds, np.ndarray]
) -> None:
    """Reads a block of a tensor and copies what each part has in common with it."""
    values = tensors.read(name, tuple(slice(*span) for span in block))
    for bounds, view in views.items():
        both = [
            (max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, bounds, strict=True)
        ]
        if any(start >= stop for start, stop in both):
            continue
        source = values[_relative(both, block)]
        target = view[_relative(both, bounds)]
        if source.dtype == target.dtype:
            # Of its own types numpy copies faster, and without Python's lock.
            bits = f"u{source.dtype.itemsize}"
            source, target = source.view(bits), target.view(bits)
        target[...] = source


def _relative(spans: Sequence[tuple[int, int]], origin: Bounds) -> tuple[slice, ...]:
    return tuple(
        slice(start - zero, stop - zero)
        for (start, stop), (zero, _) in zip(spans, origin, strict=True)
    )
