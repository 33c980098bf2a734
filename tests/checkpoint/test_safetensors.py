"""safetensors: the safetensors library and transformers are the oracles."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fjft.checkpoint import safetensors as reader
from fjft.checkpoint.safetensors import DTYPES, open_safetensors
from fjft.checkpoint.safetensors_writer import (
    OutTensor,
    write_safetensors,
    write_sharded,
)
from fjft.errors import UserError

TORCH_ONLY = {"BF16", "F8_E4M3", "F8_E5M2"}


def out(name: str, array: np.ndarray) -> OutTensor:
    return OutTensor(name, array.dtype, array.shape, lambda: array)


def whole(source, name: str) -> np.ndarray:
    return source.read(name, (slice(None),) * len(source.shape(name)))


def random_array(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Every bit pattern that is a number: what survives is the bytes themselves."""
    rng = np.random.default_rng(seed)
    if code == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    values = np.asarray(rng.integers(-100, 100, shape))
    if DTYPES[code].kind == "u":
        values = np.abs(values)
    return values.astype(DTYPES[code])


def same_bytes(ours: np.ndarray, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.contiguous().view(torch.uint8).numpy()
    return ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("code", DTYPES)
def test_the_library_reads_what_we_write(code, tmp_path):
    arrays = {
        "matrix": random_array(code, (5, 7)),
        "vector": random_array(code, (3,), 1),
        "scalar": random_array(code, (), 2),
        "nothing": random_array(code, (0, 4), 3),
        'name with " and é': random_array("F32", (2,), 4),
    }
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, [out(name, array) for name, array in arrays.items()])
    library = safetensors.torch if code in TORCH_ONLY else safetensors.numpy
    theirs = library.load_file(str(path))
    assert set(theirs) == set(arrays)
    for name, array in arrays.items():
        assert tuple(theirs[name].shape) == array.shape
        if array.ndim:
            assert same_bytes(array, theirs[name])
        else:
            assert float(theirs[name]) == float(array)
    with safetensors.safe_open(str(path), "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("code", DTYPES)
def test_we_read_what_the_library_writes(code, tmp_path):
    path = tmp_path / "theirs.safetensors"
    array = random_array(code, (6, 5))
    if code in TORCH_ONLY:
        dtypes = {
            "BF16": torch.bfloat16,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
        }
        tensor = torch.from_numpy(array.astype(np.float32)).to(dtypes[code])
        safetensors.torch.save_file({"w": tensor}, str(path), {"format": "pt"})
    else:
        safetensors.numpy.save_file({"w": array}, str(path), {"format": "pt"})
    source = open_safetensors(path)
    assert set(source.names) == {"w"}
    assert source.shape("w") == (6, 5)
    assert source.dtype("w") == DTYPES[code]
    assert source.metadata == {"format": "pt"}
    assert same_bytes(whole(source, "w"), array)


def test_data_is_aligned_and_in_the_given_order(tmp_path):
    arrays = [
        out("half", np.ones(3, np.float16)),
        out("b", np.ones(5, np.float32)),
        out("byte", np.ones(1, np.uint8)),
        out("a", np.ones(2, np.float32)),
    ]
    write_safetensors(tmp_path / "x.safetensors", arrays)
    places = open_safetensors(tmp_path / "x.safetensors").tensors
    assert list(places) == ["b", "a", "half", "byte"]
    assert all(place.offset % place.dtype.itemsize == 0 for place in places.values())
    assert min(place.offset for place in places.values()) % 8 == 0


# Rows cut and read in blocks; rows seeked over one by one; the values of real use.
@pytest.mark.parametrize(("block", "gap"), [(64, 1 << 40), (1 << 20, 1), (None, None)])
@pytest.mark.parametrize("shape", [(40,), (17, 23), (5, 6, 7), (3, 4, 2, 5)])
def test_slices_equal_numpy_slices(block, gap, shape, tmp_path, monkeypatch):
    if block is not None:
        monkeypatch.setattr(reader, "BLOCK_BYTES", block)
        monkeypatch.setattr(reader, "GAP_BYTES", gap)
    rng = np.random.default_rng(0)
    array = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    write_safetensors(
        tmp_path / "x.safetensors", [out("pad", np.ones(3)), out("w", array)]
    )
    source = open_safetensors(tmp_path / "x.safetensors")
    for _ in range(60):
        index = tuple(
            slice(*sorted(rng.integers(0, size + 1, 2)))
            if rng.random() < 0.7
            else slice(None)
            for size in shape
        )
        got = source.read("w", index)
        assert got.dtype == array.dtype
        assert got.flags.c_contiguous
        assert got.flags.writeable
        np.testing.assert_array_equal(got, array[index])


def test_a_step_or_a_missing_axis_is_refused(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", [out("w", np.ones((4, 4)))])
    source = open_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="step"):
        source.read("w", (slice(0, 4, 2), slice(None)))
    with pytest.raises(ValueError, match="one slice per axis"):
        source.read("w", (slice(0, 4),))


def peak_bytes(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("columns", [slice(0, 512), slice(1, 4096), slice(None)])
def test_reading_holds_little_beyond_the_result(columns, tmp_path):
    rows, width = 4096, 4096  # 64 MiB
    piece = np.ones((256, width), np.float32)
    big = OutTensor(
        "w", piece.dtype, (rows, width), lambda: (piece for _ in range(rows // 256))
    )
    path = tmp_path / "x.safetensors"
    assert peak_bytes(lambda: write_safetensors(path, [big])) < 1 << 20
    source = open_safetensors(path)
    index = (slice(0, rows), columns)
    wanted = rows * len(range(*columns.indices(width))) * 4
    peak = peak_bytes(lambda: source.read("w", index))
    assert peak < wanted + reader.BLOCK_BYTES + (1 << 20)


def test_only_one_tensor_is_in_memory_while_writing(tmp_path):
    tensors = [
        OutTensor(
            f"w{number}",
            np.dtype(np.float32),
            (1 << 20,),
            lambda: np.ones(1 << 20, np.float32),
        )
        for number in range(8)
    ]
    peak = peak_bytes(lambda: write_sharded(tmp_path, tensors, 10 << 20))
    assert peak < 3 * (4 << 20)


def test_a_tensor_that_breaks_its_promise_leaves_nothing(tmp_path):
    promised = OutTensor("w", np.dtype(np.float32), (4,), lambda: np.ones(3, "f4"))
    with pytest.raises(ValueError, match="'w'"):
        write_safetensors(tmp_path / "x.safetensors", [promised])
    wrong = promised._replace(produce=lambda: np.ones(4, np.float64))
    with pytest.raises(ValueError, match="float64, not float32"):
        write_sharded(tmp_path, [wrong])
    with pytest.raises(ValueError, match="twice"):
        write_sharded(tmp_path, [out("w", np.ones(2)), out("w", np.ones(2))])
    assert not list(tmp_path.iterdir())


def tiny_llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_transformers_loads_our_shards_and_we_load_theirs(tmp_path):
    import transformers

    model = tiny_llama()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    files = write_sharded(ours, [out(*item) for item in state.items()], 20_000)
    model.config.save_pretrained(ours)
    model.save_pretrained(theirs, max_shard_size=20_000)
    again = transformers.LlamaForCausalLM.from_pretrained(ours)
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name])
    source = open_safetensors(theirs)
    for name, value in state.items():
        np.testing.assert_array_equal(whole(source, name), value)

    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index, other = (
        json.loads((place / "model.safetensors.index.json").read_text())
        for place in (ours, theirs)
    )
    assert index["metadata"] == other["metadata"]
    assert set(index["weight_map"]) == set(other["weight_map"])
    for path in files:
        size = sum(
            state[name].nbytes
            for name, shard in index["weight_map"].items()
            if shard == path.name
        )
        assert 0 < size <= 20_000


def test_saving_over_an_earlier_save_leaves_no_stale_weights(tmp_path):
    first = {f"w{number}": np.full(10, number, np.float32) for number in range(4)}
    write_sharded(tmp_path, [out(*item) for item in first.items()], 40)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not ours")
    # The weights come, lazily, out of the directory that is being written.
    source = open_safetensors(tmp_path)
    lazy = [
        OutTensor(
            name,
            source.dtype(name),
            source.shape(name),
            lambda n=name: whole(source, n) + 1,
        )
        for name in source.names
    ]
    assert [path.name for path in write_sharded(tmp_path, lazy)] == [
        "model.safetensors"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_model.safetensors",
        "model.safetensors",
    ]
    again = open_safetensors(tmp_path)
    for name, value in first.items():
        np.testing.assert_array_equal(whole(again, name), value + 1)
    write_sharded(tmp_path, [out(*item) for item in first.items()], 40)
    assert not (tmp_path / "model.safetensors").exists()
    np.testing.assert_array_equal(whole(open_safetensors(tmp_path), "w3"), first["w3"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(
    number, tmp_path, monkeypatch
):
    write_sharded(tmp_path, [out("w", np.ones(4))])

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left .*model.*GiB"):
        write_sharded(tmp_path, [out("w", np.zeros(4)), out("v", np.ones(4))], 1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    np.testing.assert_array_equal(whole(open_safetensors(tmp_path), "w"), np.ones(4))


def test_a_write_that_the_system_cuts_off(tmp_path):
    pytest.importorskip("resource")
    program = """
        import resource, sys, numpy as np
        from fjft.checkpoint.safetensors_writer import OutTensor, write_sharded
        from fjft.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        big = OutTensor("w", np.dtype("f4"), (1 << 20,), lambda: np.ones(1 << 20, "f4"))
        try:
            write_sharded(sys.argv[1], [big])
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("no space left at")
    assert "0.00391 GiB" in done.stdout
    assert not list(tmp_path.iterdir())


def sharded(directory: Path) -> None:
    write_sharded(directory, [out("a", np.ones(4)), out("b", np.ones(4))], 32)


def rewrite_header(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 2.*model-00002-of-00002"):
        open_safetensors(tmp_path)


def test_a_tensor_listed_but_absent_is_named(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="'c' is in model-00001-of-00002"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_corrupt_index(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="not a safetensors index"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("size", [-1, -30, 40, 9])
def test_a_truncated_file_says_how_much_is_missing(size, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [out("w", np.ones(4))])
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(UserError, match=f"cut short: it has {len(content[:size])} byt"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 40, (4).to_bytes(8, "little") + b"nope", b"\0" * 40],
)
def test_a_corrupt_header(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"header is corrupt.*fetch it again"):
        open_safetensors(path)


def test_a_header_that_contradicts_itself(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [out("w", np.ones(4))])
    rewrite_header(path, lambda header: header["w"].update(shape=[5]))
    with pytest.raises(UserError, match=r"corrupt .*'w' of shape \(5,\)"):
        open_safetensors(path)


def test_an_unknown_dtype_lists_the_known_ones(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [out("w", np.ones(4))])
    rewrite_header(path, lambda header: header["w"].update(dtype="F4"))
    with pytest.raises(UserError, match=r"'w' has dtype 'F4'.*F64, F32, F16, BF16"):
        open_safetensors(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        open_safetensors(path)


def test_an_unknown_tensor_suggests_near_names(tmp_path):
    write_sharded(tmp_path, [out("model.layers.0.q.weight", np.ones(4))])
    source = open_safetensors(tmp_path)
    with pytest.raises(UserError, match=r"layer\.0.*nearest.*model\.layers\.0\.q"):
        source.read("model.layer.0.q.weight", (slice(None),))


def test_other_formats_are_named_as_unread(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*safetensors, GGUF"):
        open_safetensors(tmp_path)
