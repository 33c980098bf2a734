"""Several processes that run one program: how they find each other, and who writes.

Each process has some of the devices, and all of them run the same steps on one mesh.
Process 0 writes and speaks for all.
"""

import functools
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fjft.errors import UserError

# A process that failed waits so long for the others, which then are ended too.
SHUTDOWN_SECONDS = 60
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HELP = (
    "set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and "
    "JAX_PROCESS_ID in every process, or JAX_NUM_PROCESSES=1 to run alone"
)


def start() -> bool:
    """Joins this process with the others of its run; alone it does nothing.

    Must come before anything asks JAX for its devices. Processes are found by JAX
    itself: on Cloud TPU VMs, GKE, SLURM and Open MPI, or as `BY_HAND` says.

    Returns:
      Whether there may be others.

    Raises:
      UserError: There must be others, but they cannot be found.
    """
    if jax.distributed.is_initialized():
        return True
    given: dict[str, Any] = _read_environment()
    if given.get("num_processes") == 1 or not (given or _is_in_cluster()):
        return False
    try:
        jax.distributed.initialize(**given, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes of this run ({error}); {_HELP}"
        ) from error
    return True


def _read_environment() -> dict[str, Any]:
    """What was set by hand, as `jax.distributed.initialize` calls it."""
    given = {name: os.environ[name] for name in BY_HAND if os.environ.get(name)}
    if not given or given == {"JAX_NUM_PROCESSES": "1"}:
        return {"num_processes": 1} if given else {}
    numbers = [given.get(name, "") for name in BY_HAND[1:]]
    if len(given) < len(BY_HAND) or not all(map(str.isdecimal, numbers)):
        said = " ".join(f"{name}={text}" for name, text in given.items())
        raise UserError(f"{said} does not tell the processes of this run: {_HELP}")
    count, number = map(int, numbers)
    return {
        "coordinator_address": given["JAX_COORDINATOR_ADDRESS"],
        "num_processes": count,
        "process_id": number,
    }


def _is_in_cluster() -> bool:
    """Whether this may be one of several processes; asks no network.

    JAX's own search may: a notebook's single TPU would wait for hosts that do not
    exist.
    """
    env = os.environ
    if "SLURM_STEP_NODELIST" in env:
        return env.get("SLURM_NTASKS", "1") != "1"
    if "OMPI_MCA_orte_hnp_uri" in env:
        return env["OMPI_COMM_WORLD_SIZE"] != "1"
    if has_tpu() and "tpu" in (jax.config.values["jax_platforms"] or "tpu"):
        hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        if hosts:
            return "," in hosts or env.get("MEGASCALE_NUM_SLICES", "1") != "1"
        # On a VM of its own the number of hosts is in the machine's metadata.
        return "TPU_SKIP_MDS_QUERY" not in env
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= env.keys()


def has_tpu() -> bool:
    """Whether chips are plugged into this machine; asked of the kernel, not of JAX."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def fetch(arrays: Any) -> Any:
    """Brings a tree of arrays into the memory of every process.

    All processes must call it, for parts may lie on the devices of others.
    """

    def fetch_one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (
            x.is_fully_addressable or x.is_fully_replicated
        ):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return jax.tree.map(fetch_one, arrays)


def fetch_part(stacked: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """Brings one layer of a stack, or what is at `place` in it, as `fetch` does.

    The layer's number is an argument of the program that cuts it out, so that there is
    one program for all of a stack. The rest is not, for devices share that axis.
    """
    if not place:
        return fetch(stacked)
    layer, *rest = place
    return fetch(_cut_out(stacked, layer, tuple(rest)))


@functools.partial(jax.jit, static_argnums=2)
def _cut_out(stacked: jax.Array, layer: jax.Array, rest: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)[rest]


def check_same(facts: Mapping[str, bytes]) -> None:
    """Checks that all processes were given the same.

    Raises:
      UserError: In every process, if one of them was not.
    """
    sums = np.array([zlib.crc32(value) for value in facts.values()], np.uint32)
    for name, column in zip(facts, _ask_all(sums).T, strict=True):
        others = np.flatnonzero(column != column[0])
        if len(others):
            raise UserError(
                f"process {others[0]} has another {name} than process 0; start all "
                "with the same command, versions and files"
            )


def check_shared(directory: Path) -> None:
    """Checks that all processes see what process 0 writes.

    Args:
      directory: Made when missing.

    Raises:
      UserError: In every process, if one of them does not.
    """
    if jax.process_count() == 1:
        return
    number = _ask_all(np.array(secrets.randbits(31), np.uint32))[0]
    trace = directory / f".seen-by-all-{number}"
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
        trace.touch()
    wait("check_shared")
    blind = np.flatnonzero(~_ask_all(np.array(trace.exists())))
    if is_first():
        trace.unlink()
    if len(blind):
        raise UserError(
            f"process {blind[0]} does not see what process 0 writes to "
            f"{directory.absolute()}; name a checkpoint.directory that all machines "
            "share, such as a mounted bucket"
        )


def _ask_all(value: np.ndarray) -> np.ndarray:
    """Everyone's value, by number of the process."""
    if jax.process_count() == 1:
        return value[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))
