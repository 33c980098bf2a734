"""torch's `.bin` checkpoints: the same numbers as torch's, and nothing is run."""

import collections
import json
import os
import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fjft.checkpoint.source import open_model
from fjft.checkpoint.torch_bin import open_bin
from fjft.errors import UserError


def make_state():
    """A state dict as torch makes them: many types, views, shared storages."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = torch.nn.Linear(3, 2).state_dict()  # has attributes of its own
    state |= {
        "base": base,
        "shared": base,
        "view": base[2:5, 1:4],
        "transposed": base.T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "cube": torch.randn(3, 4, 5).permute(2, 0, 1),
    }
    kinds = ["float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    for kind in kinds:
        state[kind] = (torch.randn(5, 3) * 9).to(getattr(torch, kind))
    return state


@pytest.mark.parametrize("as_zip", [True, False])
def test_tensors_equal_torch(tmp_path, as_zip):
    state, path = make_state(), tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    source = open_bin(path)
    assert list(source.names) == list(state)
    for name, tensor in state.items():
        expected = tensor.detach().numpy()
        assert source.shape(name) == expected.shape
        assert source.dtype(name) == expected.dtype
        every = tuple(slice(0, n) for n in expected.shape)
        part = tuple(slice(n // 3, n - n // 4) for n in expected.shape)
        for index in (every, part):
            read = source.read(name, index)
            assert read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected[index])
            assert read.flags.c_contiguous
    with pytest.raises(UserError, match=r"no tensor 'bace'.*base"):
        source.read("bace", ())


@pytest.mark.parametrize("as_zip", [True, False])
def test_bfloat16(tmp_path, as_zip):
    tensor = torch.randn(7, 3).to(torch.bfloat16)
    path = tmp_path / "x.bin"
    torch.save({"w": tensor}, path, _use_new_zipfile_serialization=as_zip)
    read = open_bin(path).read("w", (slice(None), slice(1, 3)))
    np.testing.assert_array_equal(read.astype("f4"), tensor.float().numpy()[:, 1:3])


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Sneaky:
    """Asks for something harmless under a name that looks like torch's."""

    def __reduce__(self):
        return torch.load, ("/etc/hostname",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, as_zip):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    state = {"w": torch.zeros(2), "x": Malicious(f"touch {trace}")}
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"it asks for (posix|os|nt)\.system"):
        open_bin(path)
    assert not trace.exists()
    torch.save({"x": Sneaky()}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"asks for torch\.serialization\.load"):
        open_bin(path)


def _zip_with_pickle(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(subprocess.Popen), "asks for subprocess.Popen"),
        (pickle.dumps(eval), "asks for .*eval"),
        (pickle.dumps(getattr), "asks for .*getattr"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
            "f",
        ),
        (pickle.dumps(collections.OrderedDict(a=1)), "no tensors at its top"),
        (pickle.dumps([1, 2]), "holds no state dict, but a list"),
        (b"garbage", "no checkpoint of torch|is not read"),
        (b"", "no checkpoint of torch|is not read"),
    ],
)
def test_pickles_of_other_things_are_refused(tmp_path, data, message):
    path = tmp_path / "x.bin"
    _zip_with_pickle(path, data)
    with pytest.raises(UserError, match=message) as raised:
        open_bin(path)
    assert "\n" not in str(raised.value)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    # The shape (4,) becomes (99,): a byte in the pickle.
    data = path.read_bytes()
    where = data.index(b"K\x00K\x04\x85")
    path.write_bytes(data[: where + 3] + b"\x63" + data[where + 4 :])
    with pytest.raises(UserError, match="reaches beyond its storage"):
        open_bin(path)
    path.write_bytes(data[:-3])
    with pytest.raises(UserError, match="cut short"):
        open_bin(path)


def test_the_tar_format_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    (tmp_path / "sys_info").write_bytes(b"")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "sys_info", "sys_info")
    with pytest.raises(UserError, match=r"tar format of torch before 0\.4"):
        open_bin(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"version https://git-lfs"])
def test_files_that_are_nothing(tmp_path, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(UserError):
        open_bin(path)


def test_shards_and_which_format_comes_first(tmp_path):
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for number, name in enumerate(names):
        torch.save({f"w{number}": torch.full((2,), float(number))}, tmp_path / name)
    index = {"weight_map": {"w0": names[0], "w1": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    source = open_model(str(tmp_path)).tensors
    assert sorted(source.names) == ["w0", "w1"]
    assert source.read("w1", (slice(None),)).tolist() == [1, 1]

    save_file({"new": np.zeros(1)}, tmp_path / "model.safetensors")
    assert list(open_model(str(tmp_path)).tensors.names) == ["new"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {names[1]}"):
        open_model(str(tmp_path))
