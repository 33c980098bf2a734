"""The mesh, and the one table that says which tensor axis lies on which mesh axis."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fjft.errors import UserError

AXES = ("data", "fsdp", "sequence", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis of a tensor -> mesh axes. Everything that is sharded is sharded by
# this table; an axis that is not in it is an error.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "sequence": "sequence",
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "router": None,  # a score for each expert
    "norm": None,
    "rank": None,
    "hidden": "tensor",  # the outputs of a square map; its inputs are "embed"
    "positions": None,
    "types": None,
    "labels": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the mesh axes; one of them may be -1, "all the other devices".

    Attributes:
      data: Copies of the weights, each with its own part of the batch.
      fsdp: Devices that share the weights, each with its own part of the batch.
      tensor: Devices that share each matrix product.
      sequence: Devices that share each row, a stretch of its tokens each, and the
        weights, as in `fsdp`: for rows too long for one device.
      expert: Devices that share the routed experts of each layer, and have a copy of
        all other weights, each with its own part of the batch.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1


def make_mesh(config: Config, devices: list | None = None) -> Mesh:
    """Makes the mesh that `config` describes.

    Args:
      config: Axis sizes.
      devices: All of this run's devices when None.

    Raises:
      UserError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    wanted = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(
            f"mesh {wanted}: sizes are positive, and one of them may be -1 for the rest"
        )
    if -1 in sizes:
        rest, left = divmod(len(devices), math.prod(s for s in sizes if s != -1))
        if left or not rest:
            raise UserError(
                f"mesh {wanted} does not divide the {len(devices)} devices of this run"
            )
        sizes[sizes.index(-1)] = rest
    if math.prod(sizes) > len(devices):
        raise UserError(
            f"mesh {wanted} needs {math.prod(sizes)} devices, this run has "
            f"{len(devices)}; set one axis to -1 to use them all"
        )
    if math.prod(sizes) < len(devices):
        if jax.process_count() > 1:
            raise UserError(
                f"mesh {wanted} uses {math.prod(sizes)} of {len(devices)} devices; "
                "over several processes it must use them all"
            )
        arranged = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    else:
        arranged = _arrange(devices, sizes)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: list, sizes: list[int]) -> np.ndarray:
    """All devices in a mesh's shape, so that what talks most is connected best.

    Raises:
      UserError: They are slices of TPUs, and not only `data` would lie across them.
    """
    slices = count_slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    data, rest = divmod(sizes[0], slices)
    if rest:
        raise UserError(
            f"mesh.data={sizes[0]} does not divide over the "
            f"{slices} slices of this run; between slices the network is slow, so "
            f"that only data may lie across them: use mesh.data={slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [data, *sizes[1:]],
        [slices, *(1 for _ in sizes[1:])],
        devices,
        allow_split_physical_axes=True,
    )


def count_slices(devices: list) -> int:
    """How many slices of TPUs these are, with a slow network between them."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def single_device_mesh() -> Mesh:
    """The mesh of the first local device alone."""
    return make_mesh(Config(1, 1, 1), jax.local_devices()[:1])


def spec(axes: tuple[str | None, ...]) -> P:
    """The partition of a tensor with these logical axes.

    `("heads", "embed")` becomes `P("tensor", "fsdp")`.
    """
    return P(*(RULES[axis] if axis is not None else None for axis in axes))


def data_shards(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """The number of parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def current_device() -> tuple[str, str]:
    """Platform and kind of what will run this, which need not be this machine's.

    Both are "" where no mesh is set.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return ("", "") if device is None else (device.platform, device.device_kind)


def sequence_shards(length: int) -> int:
    """The number of stretches that the current mesh cuts rows of this length into."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["sequence"]
    return shards if length % shards == 0 else 1


def local_shards(mesh: Mesh) -> list[int]:
    """The numbers of the parts that lie on this process's devices, in order.

    Devices of several processes may hold the same part.
    """
    rows = batch_sharding(mesh)
    held = rows.addressable_devices_indices_map((data_shards(mesh),)).values()
    return sorted({index[0].start or 0 for index in held if index})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies: rows over data, fsdp and expert."""
    return NamedSharding(mesh, spec(("batch",)))


def param_shardings(
    axes: Mapping[str, tuple[str | None, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mesh,
) -> dict[str, NamedSharding]:
    """The sharding of every parameter.

    Args:
      axes: Logical axes by path.
      shapes: Shapes by path.
      mesh: The mesh.

    Raises:
      UserError: No rule covers an axis, or a dimension does not divide.
    """
    shardings = {}
    for path, names in axes.items():
        for name, size in zip(names, shapes[path], strict=True):
            if name is not None and name not in RULES:
                raise UserError(
                    f"{path}: no sharding rule for axis {name!r}; known: {list(RULES)}"
                )
            _check_divides(path, name, size, mesh)
        parts = _spread_factor(names, shapes[path], mesh)
        parts = _over_sequence(parts, shapes[path], mesh)
        shardings[path] = NamedSharding(mesh, parts)
    return shardings


def _over_sequence(parts: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """What `fsdp` cuts is cut further over devices that share rows, if it divides."""
    if mesh.shape["sequence"] == 1:
        return parts

    def further(axes: str | tuple[str, ...] | None, size: int) -> Any:
        names = axes if isinstance(axes, tuple) else (axes,)
        shards = math.prod(mesh.shape[name] for name in names if name)
        if "fsdp" not in names or size % (shards * mesh.shape["sequence"]):
            return axes
        return (*names, "sequence")

    return P(*map(further, parts, shape))


def _spread_factor(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> P:
    """The partition of a parameter, with both factors of a product cut over `fsdp`.

    Of the two matrices that a low-rank product is made of only one has the axis that
    `fsdp` cuts. So that not every device keeps the other one whole, with its gradient
    and moments, the axis that `tensor` cuts is cut further, where it divides.
    """
    parts = spec(names)
    if "rank" not in names or "fsdp" in parts or "tensor" not in parts:
        return parts
    axis = parts.index("tensor")
    if shape[axis] % (mesh.shape["tensor"] * mesh.shape["fsdp"]):
        return parts
    return P(*parts[:axis], ("tensor", "fsdp"), *parts[axis + 1 :])


def _check_divides(path: str, name: str | None, size: int, mesh: Mesh) -> None:
    mesh_axis = RULES[name] if name is not None else None
    if mesh_axis is None:
        return
    names = (mesh_axis,) if isinstance(mesh_axis, str) else mesh_axis
    shards = math.prod(mesh.shape[n] for n in names)
    if size % shards:
        fitting = [n for n in range(1, mesh.size + 1) if size % n == 0]
        raise UserError(
            f"{path}: axis {name!r} of size {size} is not divisible by "
            f"mesh.{'*'.join(names)} = {shards}; sizes that work: {fitting}"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fixes how an activation lies, by logical axes; without a mesh it does nothing.

    Tokens that do not divide over `sequence`, such as a single one, lie on all of its
    devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    kept = (
        None if axis == "sequence" and size % mesh.shape["sequence"] else axis
        for axis, size in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, spec(tuple(kept)))


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Checks that a batch cuts evenly into microbatches and over devices.

    Raises:
      UserError: It does not; the message names the nearest sizes that do.
    """
    unit = accumulation_steps * data_shards(mesh)
    if batch_size < 1 or batch_size % unit:
        lower = batch_size // unit * unit
        near = [size for size in (lower, lower + unit) if size]
        raise UserError(
            f"batch {batch_size} is not divisible by accumulation_steps * data * fsdp "
            f"* expert = {unit}; use {' or '.join(map(str, near))}"
        )


def check_length(length: int, mesh: Mesh) -> None:
    """Checks that full rows cut evenly into stretches.

    Raises:
      UserError: They do not.
    """
    shards = mesh.shape["sequence"]
    if length % shards:
        raise UserError(
            f"rows of length {length} are not divisible by mesh.sequence = {shards}; "
            f"use data.max_length={max(length // shards, 1) * shards}"
        )
