"""When a process joins others, and when it does not even ask."""

import os

import jax
import pytest

from fjft import distributed
from fjft.errors import UserError

BY_HAND = {
    "JAX_COORDINATOR_ADDRESS": "host:1",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "1"}
ON_TPU = [
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ({}, True),  # a VM, which knows of its neighbours
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_PROCESS_ADDRESSES": "local"}, False),
    ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"JAX_NUM_PROCESSES": "1"}, False),
]


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
    """What JAX was asked for, in an environment of its own."""
    calls = []

    def initialize(**options):
        del options["shutdown_timeout_seconds"]
        calls.append(options)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "has_tpu", lambda: False)
    foreign = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")
    for name in filter(lambda name: name.startswith(foreign), list(os.environ)):
        monkeypatch.delenv(name)
    return calls


def _set(monkeypatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        (
            BY_HAND,
            [{"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}],
        ),
        ({"JAX_NUM_PROCESSES": "1"}, []),
        (SLURM | {"SLURM_NTASKS": "2"}, [{}]),
        (SLURM | {"SLURM_NTASKS": "1"}, []),
        ({"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "0"}, [{}]),
        ({"KUBERNETES_SERVICE_HOST": "k"}, []),  # a notebook somewhere in a cluster
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, []),  # nothing but names
    ],
)
def test_joins_what_the_environment_tells(joined, monkeypatch, environment, expected):
    _set(monkeypatch, environment)
    assert distributed.start() == bool(expected)
    assert joined == expected


@pytest.fixture
def joined_on_tpu(joined, monkeypatch):
    """JAX as it is set up where chips are."""
    monkeypatch.setattr(distributed, "has_tpu", lambda: True)
    jax.config.update("jax_platforms", "tpu,cpu")
    yield joined
    jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize(("environment", "joins"), ON_TPU)
def test_one_tpu_host_does_not_look_for_others(
    joined_on_tpu, monkeypatch, environment, joins
):
    _set(monkeypatch, environment)
    assert distributed.start() == joins
    assert len(joined_on_tpu) == joins
    jax.config.update("jax_platforms", "cpu")
    assert not distributed.start()


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_COORDINATOR_ADDRESS": "host:1"},
        {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
        BY_HAND | {"JAX_PROCESS_ID": "last"},
    ],
)
def test_half_a_description_is_refused(joined, monkeypatch, environment):
    _set(monkeypatch, environment)
    with pytest.raises(UserError, match=r"does not tell.*set JAX_COORDINATOR_ADDRESS"):
        distributed.start()
    assert not joined


def test_what_jax_cannot_find_is_said(joined, monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    _set(monkeypatch, SLURM | {"SLURM_NTASKS": "2"})
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"cannot join.*coordinator_address.*to run a"):
        distributed.start()
