"""Measures what quantizing an 8B model while loading takes, and keeping its adapter.

    python tests/compare_quantizing.py [--directory=DIR] [--layers=32]

A random checkpoint of Llama 8B's shape is written (16 GB at 32 layers) and read in a
process of its own as `nf4` with a LoRA adapter, r=16 on all linear maps. Printed are
the most memory that this process held, above what the devices hold in the end; then how
long the adapter takes to be written for PEFT, and a run's checkpoint (adapter and
AdamW's moments) to be saved and restored, and how large they are.

A CPU keeps a code of 4 bits in a byte, so what the device holds is counted that way.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compare_loading

LLAMA_8B: dict[str, Any] = compare_loading.LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
}
FORMAT = "nf4"


def main() -> None:
    """Writes the checkpoint, and measures in another process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", help="where there is room for the checkpoint")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        return measure(Path(flags.measure))
    with tempfile.TemporaryDirectory(dir=flags.directory) as name:
        config = LLAMA_8B | {"num_hidden_layers": flags.layers}
        files = compare_loading.write_llama(Path(name) / "llama", config)
        size = sum(file.stat().st_size for file in files)
        print(f"a checkpoint of {size / 1e9:.2f} GB in {len(files)} files", flush=True)
        compare_loading.drop_from_cache(files)
        subprocess.run([sys.executable, __file__, f"--measure={name}"], check=True)


def measure(directory: Path) -> None:
    """Loads, saves and restores."""
    import jax

    import fjft
    from fjft import sharding, tree
    from fjft.checkpoint import orbax
    from fjft.optimize import optimizer as optimizers
    from fjft.peft import lora
    from fjft.pretrained import build_model, open_model
    from fjft.training.state import init_state

    lora_config = lora.Config(r=16, lora_alpha=32.0, target_modules="all-linear")
    files = open_model(str(directory / "llama"))
    assert jax.devices()
    before, started = compare_loading.memory("VmRSS"), time.perf_counter()
    model = build_model(
        files,
        method=lora,
        peft_config=lora_config,
        dtype="bfloat16",
        mesh=sharding.single_device_mesh(),
        quantization=FORMAT,
    )
    params = jax.block_until_ready(tree.split(model)[1])
    seconds = time.perf_counter() - started
    peak = compare_loading.memory("VmHWM")
    device = sum(p.on_device_size_in_bytes() for p in params.values())
    numbers = {"peak": peak, "before": before, "device": device}
    numbers["above"] = peak - device
    print(
        f"quantized to {FORMAT} in {seconds:.0f} s;", in_gigabytes(numbers), flush=True
    )

    trained, _ = tree.partition(params, lambda path: path.endswith((".a", ".b")))
    optimizer = optimizers.make_optimizer(optimizers.Config(), 100)
    state = vars(init_state(trained, optimizer, seed=0))
    # Zeros would be packed to nothing.
    state = jax.tree.map(drawn, state)
    tree.update(model, state["params"])
    timed(
        "adapter written for PEFT", lambda: fjft.save_adapter(model, directory / "peft")
    )
    print(f"  {size_of(directory / 'peft') / 1e6:.0f} MB")
    config = orbax.Config(directory=str(directory / "run"))
    checkpoints = orbax.Checkpoints(config)

    def save() -> None:
        checkpoints.save(1, state, {})
        checkpoints.wait()

    timed("checkpoint saved", save)
    print(f"  {size_of(directory / 'run') / 1e6:.0f} MB")
    timed("checkpoint restored", lambda: checkpoints.restore(1, state))
    checkpoints.close()


def timed(name: str, function: Any) -> None:
    """Runs it and prints its seconds."""
    started = time.perf_counter()
    function()
    print(f"{name} in {time.perf_counter() - started:.1f} s", flush=True)


def drawn(x: Any) -> Any:
    """Random numbers of an array's shape; what are no numbers stays."""
    import jax
    import jax.numpy as jnp

    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)


def in_gigabytes(numbers: dict[str, int]) -> str:
    """`{"peak": 2e9}` as text."""
    return json.dumps({name: round(n / 1e9, 2) for name, n in numbers.items()})


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())


if __name__ == "__main__":
    main()
