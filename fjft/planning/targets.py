"""Hardware under the names that its users say: `v5e-8`, `2xv5e-256`, `l4x1`, `here`."""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path

import jax

from fjft.distributed import has_tpu
from fjft.errors import UserError
from fjft.planning import gpus
from fjft.telemetry_speed import peak_flops
from fjft.training.fit import GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip can do.

    Attributes:
      kind: Its `device_kind` in JAX, by which its peak FLOP/s are found.
      memory_bytes: What the compiler grants a program on one device.
      memory_bandwidth: Bytes a second between a device and its memory.
      link_bandwidth: Bytes a second that a chip receives from all its neighbours.
      price: Dollars an hour of one chip; None is not known.
      dimensions: Axes of the torus that chips are connected in.
      cores_named: Cores of a chip, where a slice is named by its number of cores.
      devices: JAX devices of a chip.
    """

    kind: str
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    price: float | None
    dimensions: int = 2
    cores_named: int = 1
    devices: int = 1


# Bandwidths: https://cloud.google.com/tpu/docs, the page of each version ("key chip
# specifications"); what is given there for both directions is halved. Memory: what
# libtpu 0.0.42 grants when it compiles. Prices: on demand in us-central1 (v4's: in
# us-central2), as Google's billing told skypilot-org/skypilot-catalog: file
# catalogs/v8/gcp/vms.csv at 006059e, which has none of tpu7x. Give the one you pay with
# `--price`.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        kind="TPU v4",
        memory_bytes=int(30.75 * GIB),
        memory_bandwidth=1228e9,
        link_bandwidth=300e9,
        price=3.22,
        dimensions=3,
        cores_named=2,
    ),
    "v5e": Chip(
        kind="TPU v5 lite",
        memory_bytes=int(15.75 * GIB),
        memory_bandwidth=819e9,
        link_bandwidth=200e9,
        price=1.20,
    ),
    "v5p": Chip(
        kind="TPU v5",
        memory_bytes=int(95.7 * GIB),
        memory_bandwidth=2765e9,
        link_bandwidth=600e9,
        price=4.20,
        dimensions=3,
        cores_named=2,
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        memory_bytes=int(31.2 * GIB),
        memory_bandwidth=1638e9,
        link_bandwidth=400e9,
        price=2.70,
    ),
    "tpu7x": Chip(
        kind="TPU7x",
        memory_bytes=int(94.7 * GIB),
        memory_bandwidth=7380e9 / 2,
        link_bandwidth=600e9,
        price=None,
        dimensions=3,
        cores_named=2,
        devices=2,
    ),
}
HERE = "here"
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
DCN_BANDWIDTH = 6.25e9  # bytes a second of one chip between slices (v5p's page)

_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_NAME = re.compile(r"(?:(\d+)x)?([a-z]\w*)-(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices that a step can be compiled for.

    Attributes:
      name: As the user says it.
      devices: JAX devices, which need not be there.
      memory_bytes: What a program gets of one device; None is not known.
      peak_flops: 16-bit FLOP/s of one device; None is not known.
      float32_flops: Float32 FLOP/s of one device, where bfloat16 is computed as that.
      memory_bandwidth: Bytes a second of one device.
      link_bandwidth: Bytes a second that one device receives.
      price: Dollars an hour of all devices.
    """

    name: str
    devices: list
    memory_bytes: int | None
    peak_flops: float | None = None
    float32_flops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    price: float | None = None

    def flops_in(self, dtype: str) -> float | None:
        """FLOP/s of one device in a dtype, at most."""
        emulates = self.float32_flops is not None and dtype != "float16"
        return self.float32_flops if emulates else self.peak_flops


def find_target(name: str) -> Target:
    """Finds the devices that a name stands for.

    Raises:
      UserError: There is no such hardware, or its compiler is not installed.
    """
    if name == HERE:
        return _present()
    if found := gpus.parse_name(name):
        return _of_gpus(name, *found)
    chip, chips, slices = parse_name(name)
    return Target(
        name=name,
        devices=_tpu_devices(name, chip, chips, slices),
        memory_bytes=CHIPS[chip].memory_bytes,
        peak_flops=peak_flops(CHIPS[chip].kind),
        memory_bandwidth=CHIPS[chip].memory_bandwidth,
        link_bandwidth=CHIPS[chip].link_bandwidth / CHIPS[chip].devices,
        price=_times(CHIPS[chip].price, chips * slices),
    )


def _of_gpus(name: str, gpu: gpus.Gpu, cards: int) -> Target:
    return Target(
        name=name,
        devices=gpus.gpu_devices(name, gpu, cards),
        memory_bytes=gpus.granted_bytes(gpu),
        peak_flops=peak_flops(gpu.kind),
        float32_flops=gpu.float32_flops,
        memory_bandwidth=gpu.memory_bandwidth,
        link_bandwidth=gpu.link_bandwidth,
        price=gpu.price * cards,
    )


def parse_name(name: str) -> tuple[str, int, int]:
    """The chip, how many of them a slice has, and how many slices.

    `2xv5p-8` is `("v5p", 4, 2)`, since v5p's slices are named by their cores.

    Raises:
      UserError: It is no such name.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[2] not in CHIPS:
        raise UserError(
            f"target {name!r} is unknown; use {HERE}, or one of "
            f"{', '.join(f'{chip}-N' for chip in CHIPS)} as in v5e-8, 2xv5e-256, or "
            f"{', '.join(f'{gpu}xN' for gpu in gpus.GPUS)} as in h100x8"
        )
    chip = CHIPS[found[2]]
    chips, rest = divmod(int(found[3]), chip.cores_named)
    if rest or chips not in _sizes(chip):
        sizes = ", ".join(str(n * chip.cores_named) for n in _sizes(chip))
        raise UserError(f"target {name!r}: {found[2]} comes in slices of {sizes}")
    return found[2], chips, int(found[1] or 1)


def _sizes(chip: Chip) -> list[int]:
    """Chips of the slices that there are."""
    if chip.dimensions == 2:
        return [1, *(2**n for n in range(2, 9))]
    return [2**n for n in range(2, 13)]


def topology(chips: int, dimensions: int) -> tuple[int, ...]:
    """How chips are laid out: 8 are `(2, 4)` in two dimensions, `(2, 2, 2)` in three.

    Four are `(2, 2)` and, as one host has them, `(2, 2, 1)`.
    """
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)
    power = round(math.log2(chips))
    return tuple(2 ** ((power + axis) // dimensions) for axis in range(dimensions))


def _tpu_devices(name: str, chip: str, chips: int, slices: int) -> list:
    """Devices to compile for.

    Raises:
      UserError: libtpu is missing, or does not know them.
    """
    from importlib.util import find_spec

    from jax.experimental import topologies

    if find_spec("libtpu") is None:
        raise UserError(
            f"to plan for {name} without a TPU its compiler is needed, which runs on "
            "any Linux machine: pip install 'fjft[plan]'"
        )
    if not has_tpu():
        # Otherwise libtpu asks the network what machine this is, and waits for it.
        for variable, value in _NO_MACHINE.items():
            os.environ.setdefault(variable, value)
    options: dict = {}
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    if chip == "v4":
        options["chip_config_name"] = "megacore"
    shape = topology(chips, CHIPS[chip].dimensions)
    layout = f"{chip}:{'x'.join(map(str, shape))}"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=layout, **options
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"target {name!r}: libtpu has no {layout} ({first}); another libtpu may"
        ) from error
    return list(found.devices)


def _present() -> Target:
    """The devices of this process."""
    devices = jax.devices()
    first = devices[0]
    stats = first.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if first.platform == "cpu":
        limit = _host_share()
    tables = *CHIPS.values(), *gpus.GPUS.values()
    known = next((c for c in tables if c.kind == first.device_kind), None)
    return Target(
        name=HERE,
        devices=devices,
        memory_bytes=limit or (known and known.memory_bytes),
        peak_flops=peak_flops(first.device_kind),
        float32_flops=getattr(known, "float32_flops", None),
        memory_bandwidth=known and known.memory_bandwidth,
        link_bandwidth=known and known.link_bandwidth / known.devices,
        price=known and _times(known.price, len(devices) / known.devices),
    )


def _times(price: float | None, count: float) -> float | None:
    return None if price is None else price * count


def _host_share() -> int:
    """What a CPU device has of the machine's memory, or of what this container may use.

    All devices of the process are taken to be alike.
    """
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or `max`
        limit = min(limit, int(_CONTAINER_LIMIT.read_text()))
    return limit // jax.local_device_count()
