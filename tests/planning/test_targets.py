"""Hardware under its users' names."""

import pytest

from fjft import sharding
from fjft.errors import UserError
from fjft.planning import gpus, targets
from fjft.telemetry_speed import peak_flops


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("v5e-1", ("v5e", 1, 1)),
        ("v5e-256", ("v5e", 256, 1)),
        ("v6e-8", ("v6e", 8, 1)),
        ("2xv6e-64", ("v6e", 64, 2)),
        # Named by their cores, of which a chip has two.
        ("v4-8", ("v4", 4, 1)),
        ("v5p-128", ("v5p", 64, 1)),
        ("tpu7x-16", ("tpu7x", 8, 1)),
    ],
)
def test_names(name, parsed):
    assert targets.parse_name(name) == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-3", "slices of 1, 4, 8, 16"),
        ("v5p-4", "slices of 8, 16"),
        ("v9-8", r"unknown; use here, or one of .*v5e-N"),
        ("v5e", "unknown"),
        ("", "unknown"),
        ("h100", r"unknown.*h100xN.*as in h100x8"),
        ("h100x16", "planned for one machine, h100x1 to h100x8"),
        ("t4x0", "planned for one machine"),
    ],
)
def test_names_of_nothing(name, message):
    with pytest.raises(UserError, match=message):
        targets.find_target(name)


@pytest.mark.parametrize(
    ("chips", "dimensions", "shape"),
    [
        (1, 2, (1, 1)),
        (8, 2, (2, 4)),
        (128, 2, (8, 16)),
        (256, 2, (16, 16)),
        (4, 3, (2, 2, 1)),
        (8, 3, (2, 2, 2)),
        (32, 3, (2, 4, 4)),
        (64, 3, (4, 4, 4)),
    ],
)
def test_layouts_of_chips(chips, dimensions, shape):
    assert targets.topology(chips, dimensions) == shape


def test_the_devices_of_this_process():
    here = targets.find_target("here")
    assert len(here.devices) == 8
    assert here.peak_flops is None


@pytest.mark.parametrize(
    ("name", "extra"), [("v5e-8", "plan"), ("l4x1", "plan-gpu"), ("h100x8", "plan-gpu")]
)
def test_a_missing_compiler_says_how_to_get_it(monkeypatch, name, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"pip install 'fjft\[{extra}\]'"):
        targets.find_target(name)


@pytest.mark.parametrize("name", gpus.GPUS)
def test_what_is_known_of_gpus(name):
    """The peaks stand in another table, under the name that the card has in JAX."""
    gpu, cards = gpus.parse_name(f"{name}x2") or pytest.fail(name)
    assert (gpu, cards) == (gpus.GPUS[name], 2)
    assert peak_flops(gpu.kind)
    assert gpu.block_memory <= gpu.core_memory
    assert gpu.float32_flops is None or gpu.capability < (8, 0)


def test_how_much_of_a_card_a_program_gets(monkeypatch):
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)
    gpu = gpus.GPUS["l4"]
    assert gpus.granted_bytes(gpu) == gpu.memory_bytes * 3 // 4
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert gpus.granted_bytes(gpu) == gpu.memory_bytes // 2


def test_bfloat16_where_a_card_has_none():
    target = targets.Target(
        name="t4x1", devices=[], memory_bytes=None, peak_flops=65e12, float32_flops=8e12
    )
    speeds = [target.flops_in(d) for d in ("float16", "bfloat16", "float32")]
    assert speeds == [65e12, 8e12, 8e12]


@pytest.mark.parametrize("name", ["h100x8", "a100-80gx2", "l4x1", "t4x1"])
def test_the_compiler_knows_the_gpus(name):
    pytest.importorskip("jax_cuda12_plugin")
    gpu, cards = gpus.parse_name(name) or pytest.fail(name)
    target = targets.find_target(name)
    assert len(target.devices) == cards
    [capability] = {device.compute_capability for device in target.devices}
    assert capability == "{}.{}".format(*gpu.capability)
    assert {device.device_kind for device in target.devices} == {gpu.kind}
    assert target.price == gpu.price * cards


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v5p-8", "2xv6e-8", "tpu7x-8"])
def test_the_compiler_knows_the_targets(name):
    pytest.importorskip("libtpu")
    target = targets.find_target(name)
    chip, chips, slices = targets.parse_name(name)
    assert len(target.devices) == chips * slices * targets.CHIPS[chip].devices
    assert {d.device_kind for d in target.devices} == {targets.CHIPS[chip].kind}
    assert target.peak_flops
    price = targets.CHIPS[chip].price
    assert target.price == (price and price * chips * slices)


def test_cpus_share_what_their_container_may_use(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text("8000\n")
    monkeypatch.setattr(targets, "_CONTAINER_LIMIT", limit)
    assert targets.find_target("here").memory_bytes == 1000
    limit.write_text("max\n")
    known = targets.find_target("here").memory_bytes
    assert known is not None
    assert known > 2**20


def test_only_data_lies_across_slices():
    pytest.importorskip("libtpu")
    devices = targets.find_target("2xv6e-8").devices
    mesh = sharding.make_mesh(sharding.Config(data=4, fsdp=-1, tensor=2), devices)
    assert mesh.shape["fsdp"] == 2
    slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"2 slices.*use mesh.data=2"):
        sharding.make_mesh(sharding.Config(), devices)
