"""Hardware under its users' names."""

import pytest

from fjft import sharding
from fjft.errors import UserError
from fjft.planning import targets


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
        ("h100x8", "compiled on the GPU itself.*--target=here"),
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


def test_a_missing_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fjft\[plan\]'"):
        targets.find_target("v5e-8")


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v5p-8", "2xv6e-8", "tpu7x-8"])
def test_the_compiler_knows_the_targets(name):
    pytest.importorskip("libtpu")
    target = targets.find_target(name)
    chip, chips, slices = targets.parse_name(name)
    assert len(target.devices) == chips * slices * targets.CHIPS[chip].devices
    assert {d.device_kind for d in target.devices} == {targets.CHIPS[chip].kind}
    assert target.peak_flops
    assert target.price == targets.CHIPS[chip].price * chips * slices


def test_only_data_lies_across_slices():
    pytest.importorskip("libtpu")
    devices = targets.find_target("2xv6e-8").devices
    mesh = sharding.make_mesh(sharding.Config(data=4, fsdp=-1, tensor=2), devices)
    assert mesh.shape["fsdp"] == 2
    slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"2 slices.*use mesh.data=2"):
        sharding.make_mesh(sharding.Config(), devices)
