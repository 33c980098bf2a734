"""GPUs that a step can be compiled for without one: `h100x8`, `l4x1`."""

import dataclasses
import importlib.util
import os
import re
from typing import ClassVar

import jax

from fjft.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What one card can do, and what its compiler asks of it.

    Attributes:
      kind: Its `device_kind` in JAX, by which its peak FLOP/s are found.
      memory_bytes: What CUDA says that the card has.
      memory_bandwidth: Bytes a second between the card and its memory.
      link_bandwidth: Bytes a second that a card receives from the others of its
        machine.
      price: Dollars an hour of one card.
      float32_flops: FLOP/s in float32, if bfloat16 is computed as that.
      capability: CUDA's number of the architecture.
      cores: Multiprocessors.
      clock_ghz: Their highest rate.
      lanes: Float32 units of a core.
      threads: Of a core, at most.
      core_memory: Bytes shared in a core.
      block_memory: Bytes of them that a block may ask for.
      l2_bytes: Cache of the card.
      devices: JAX devices of a card.
    """

    kind: str
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    price: float
    float32_flops: float | None = None
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    lanes: int
    threads: int
    core_memory: int
    block_memory: int
    l2_bytes: int
    devices: ClassVar[int] = 1


# H100 and A100: openxla/xla, xla/backends/gpu/target_config/specs. L4 and T4: NVIDIA's
# data sheets and CUDA's table of compute capabilities; their memory as PyTorch reports
# it. Links: NVLink of the data sheets in one direction, PCIe 4.0 and 3.0 x16 of L4 and
# T4. Prices: a card of a3-highgpu-8g, a2-highgpu-1g, a2-ultragpu-1g, g2-standard-4 and
# n1-standard-4 with a T4, on demand in us-central1, host and card together, as Google's
# billing told skypilot-org/skypilot-catalog: file catalogs/v8/gcp/vms.csv at 8427bbf;
# for H100 and A100 80GB catalogs/v5 at ddb8695, since the later one has less for A100
# than for its spot price. Give the one you pay with `--price`.
_AMPERE = {
    "capability": (8, 0),
    "cores": 108,
    "clock_ghz": 1.41,
    "lanes": 64,
    "threads": 2048,
    "core_memory": 167936,
    "block_memory": 166912,
    "l2_bytes": 41943040,
}
GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        kind="NVIDIA H100 80GB HBM3",
        memory_bytes=84942979072,
        memory_bandwidth=3352e9,
        link_bandwidth=450e9,
        price=10.98,
        capability=(9, 0),
        cores=132,
        clock_ghz=1.98,
        lanes=128,
        threads=2048,
        core_memory=233472,
        block_memory=232448,
        l2_bytes=52428800,
    ),
    "a100-40g": Gpu(
        kind="NVIDIA A100-SXM4-40GB",
        memory_bytes=42298834944,
        memory_bandwidth=1555e9,
        link_bandwidth=300e9,
        price=3.67,
        **_AMPERE,
    ),
    "a100-80g": Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        memory_bytes=85100068864,
        memory_bandwidth=2039e9,
        link_bandwidth=300e9,
        price=5.03,
        **_AMPERE,
    ),
    "l4": Gpu(
        kind="NVIDIA L4",
        memory_bytes=22478 * 2**20,
        memory_bandwidth=300e9,
        link_bandwidth=32e9,
        price=0.71,
        capability=(8, 9),
        cores=58,
        clock_ghz=2.04,
        lanes=128,
        threads=1536,
        core_memory=102400,
        block_memory=101376,
        l2_bytes=50331648,
    ),
    "t4": Gpu(
        kind="Tesla T4",
        memory_bytes=15079 * 2**20,
        memory_bandwidth=320e9,
        link_bandwidth=16e9,
        price=0.54,
        float32_flops=8.1e12,
        capability=(7, 5),
        cores=40,
        clock_ghz=1.59,
        lanes=64,
        threads=1024,
        core_memory=65536,
        block_memory=65536,
        l2_bytes=4194304,
    ),
}
MOST_CARDS = 8  # of one machine; between machines the network decides
_NAME = re.compile(r"(\w+(?:-\w+)?)x(\d+)")
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def parse_name(name: str) -> tuple[Gpu, int] | None:
    """The card and how many of them; None if it is no such name.

    Raises:
      UserError: No machine has so many.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in GPUS:
        return None
    cards = int(found[2])
    if not 1 <= cards <= MOST_CARDS:
        raise UserError(
            f"target {name!r}: GPUs are planned for one machine, {found[1]}x1 to "
            f"{found[1]}x{MOST_CARDS}"
        )
    return GPUS[found[1]], cards


def granted_bytes(gpu: Gpu) -> int:
    """What a program gets of a card's memory.

    JAX takes three quarters of it when it starts, or the share that the variable
    XLA_CLIENT_MEM_FRACTION says; CUDA and the libraries live in the rest.
    """
    said = next((os.environ[name] for name in _FRACTIONS if os.environ.get(name)), 0.75)
    return int(gpu.memory_bytes * float(said))


def gpu_devices(name: str, gpu: Gpu, cards: int) -> list:
    """Devices to compile for.

    Raises:
      UserError: The compiler is missing, or jax was started without it.
    """
    from jax.experimental import topologies

    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise UserError(
            f"to plan for {name} its compiler is needed, which runs on any Linux "
            "machine: pip install 'fjft[plan-gpu]'"
        )
    # Without a driver the plugin would refuse to be loaded.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{cards}", target_config=_describe(gpu)
        )
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"target {name!r}: jax cannot compile for it ({first}); start anew with "
            "JAX_PLATFORMS=cpu, and see that jax and its CUDA plugin have one version"
        ) from error
    return list(found.devices)


def _describe(gpu: Gpu) -> str:
    """The card as XLA's `GpuTargetConfigProto`, in protobuf's text format.

    What is the same for all cards has CUDA's numbers; the versions are the least that
    jax takes.
    """
    major, minor = gpu.capability
    # Instructions of sm_90a, which no later card has.
    feature = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  core_count: {gpu.cores}
  clock_rate_ghz: {gpu.clock_ghz}
  fpus_per_core: {gpu.lanes}
  threads_per_core_limit: {gpu.threads}
  shared_memory_per_core: {gpu.core_memory}
  shared_memory_per_block_optin: {gpu.block_memory}
  shared_memory_per_block: 49152
  l2_cache_size: {gpu.l2_bytes}
  memory_bandwidth: {gpu.memory_bandwidth:.0f}
  device_memory_size: {gpu.memory_bytes}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.kind}"
"""
