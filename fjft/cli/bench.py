"""`fjft bench`: how fast a config trains here, and how much memory it takes."""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fjft.cli import STARTED, flags
from fjft.errors import UserError


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured; None is not known on this device.

    Attributes:
      device: Its kind.
      devices: How many.
      rows: Rows of a batch.
      length: Tokens in a row, padding included.
      useful_tokens: Tokens of the mean timed batch that are not padding.
      load_seconds: From the program's start until data and weights were ready.
      compile_seconds: Tracing and compiling the step.
      first_step_seconds: From the program's start to the end of the first step.
      step_seconds: Median of the timed steps; so the next two, fastest and slowest.
      step_cpu_seconds: Processor time that this process took for a timed step, on all
        cores together; other programs on the machine do not blur it.
      useful_tokens_per_second: Padding not counted.
      padded_tokens_per_second: Padding counted.
      first_loss: Of the first batch, in nats a token.
      peak_host_bytes: Most memory that the process ever held.
      peak_device_bytes: Most memory in use on one device.
      step_device_bytes: What the compiler says that the step needs on one device.
      weight_bytes: Weights, trained and frozen, over all devices: each step reads them.
      state_bytes: What the optimizer keeps, over all devices.
      flops_per_token: Model FLOPs of one token, recomputation not counted.
      model_flops_per_second: Of useful tokens.
      mfu: Of the devices' peak bfloat16 FLOP/s.
    """

    device: str
    devices: int
    rows: int
    length: int
    useful_tokens: float
    load_seconds: float
    compile_seconds: float
    first_step_seconds: float
    step_seconds: float
    fastest_step_seconds: float
    slowest_step_seconds: float
    step_cpu_seconds: float
    useful_tokens_per_second: float
    padded_tokens_per_second: float
    first_loss: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    step_device_bytes: int | None
    weight_bytes: int
    state_bytes: int
    flops_per_token: float
    model_flops_per_second: float
    mfu: float | None


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "bench",
        "Times a config's own train step on its own data; writes nothing.",
        "fjft bench --config=configs/smollm2_lora_quickstart.py --steps=5",
    )
    flags.add_config(parser, required=True)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="random tokens in full rows instead of the config's data",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Measures and prints."""
    chosen = flags.parse(parser, argv)
    flags.join_processes()
    if chosen.steps < 1 or chosen.warmup < 1:
        parser.error("--steps and --warmup are at least 1")
    measured = measure(
        flags.load_config(chosen), chosen.steps, chosen.warmup, chosen.synthetic
    )
    if chosen.json:
        print(json.dumps(dataclasses.asdict(measured), indent=2))
    else:
        print("\n".join(describe(measured)))


def measure(config: Any, num_steps: int, warmup: int, synthetic: bool) -> Measured:
    """Takes steps of a config's run.

    Args:
      config: A config, see `fjft.load_config`.
      num_steps: Timed steps.
      warmup: Steps before them, at least one.
      synthetic: Random tokens in full rows instead of the config's data.
    """
    import jax

    from fjft import sharding, tree
    from fjft.build import build_experiment
    from fjft.programs import keep_programs
    from fjft.telemetry_speed import peak_flops
    from fjft.training.fit import peak_bytes
    from fjft.training.placing import place

    experiment = build_experiment(config)
    keep_programs(experiment.train.compilation_cache)
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        run, state = _build(experiment, mesh, synthetic)
        weight_bytes = tree.num_bytes((run.frozen, state.params))
        state_bytes = tree.num_bytes(state.opt_state)
        batches = _forever(run.loader)
        batch = next(batches)
        placed = place(batch, mesh)
        jax.block_until_ready((run.frozen, state, placed))
        loaded = time.perf_counter()
        compiled = run.train_step.lower(state, run.frozen, placed).compile()
        compile_seconds = time.perf_counter() - loaded
        times, useful, first, cpu_seconds = [], [], None, 0.0
        for number in range(warmup + num_steps):
            if batch["input_ids"].shape != placed["input_ids"].shape:
                raise UserError(
                    "bench needs batches of one shape; set data.packing=True, or one "
                    "length in data.buckets"
                )
            placed = place(batch, mesh)
            started, cpu_started = time.perf_counter(), time.process_time()
            state, metrics = compiled(state, run.frozen, placed)
            jax.block_until_ready((state, metrics))
            ended = time.perf_counter()
            if first is None:
                first = ended, float(metrics.loss_sum) / float(metrics.weight_sum)
            if number >= warmup:
                times.append(ended - started)
                cpu_seconds += time.process_time() - cpu_started
                useful.append(float(metrics.num_tokens))
            batch = next(batches)
    assert first is not None
    first_ended, first_loss = first
    device = mesh.devices.flat[0]
    # Batches are not equally full, so all tokens are divided by all seconds.
    speed = sum(useful) / sum(times)
    rows, length = placed["input_ids"].shape
    flops_per_second = speed * run.flops_per_token
    peak = peak_flops(device.device_kind)
    step_memory = compiled.memory_analysis()
    return Measured(
        device=device.device_kind,
        devices=mesh.size,
        rows=rows,
        length=length,
        useful_tokens=statistics.mean(useful),
        load_seconds=loaded - STARTED,
        compile_seconds=compile_seconds,
        first_step_seconds=first_ended - STARTED,
        step_seconds=statistics.median(times),
        fastest_step_seconds=min(times),
        slowest_step_seconds=max(times),
        step_cpu_seconds=cpu_seconds / len(times),
        useful_tokens_per_second=speed,
        padded_tokens_per_second=rows * length * len(times) / sum(times),
        first_loss=first_loss,
        peak_host_bytes=_peak_host_bytes(),
        peak_device_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        step_device_bytes=step_memory and peak_bytes(step_memory, mesh),
        weight_bytes=weight_bytes,
        state_bytes=state_bytes,
        flops_per_token=run.flops_per_token,
        model_flops_per_second=flops_per_second,
        mfu=flops_per_second / (peak * mesh.size) if peak else None,
    )


def _build(experiment: Any, mesh: Any, synthetic: bool) -> tuple[Any, Any]:
    """The run and its first state, with data of the config's or random rows."""
    from fjft.training.run import build_run

    files = experiment.open_model()
    if synthetic:
        if experiment.objective_module.EXAMPLES != "text":
            raise UserError(
                "--synthetic makes text without labels, which is not what this "
                "objective learns from; leave it out"
            )
        rows = _random_rows(experiment, files.config.vocab_size)
        held_out = {"": rows}
    else:
        rows, held_out, _ = experiment.load_examples(files.load_tokenizer())
    return build_run(experiment, mesh, files, rows, held_out)


def _random_rows(experiment: Any, vocab_size: int) -> Any:
    import numpy as np

    from fjft.data.examples import Example, Spool
    from fjft.data.pack import Rows

    rng = np.random.default_rng(experiment.train.seed)
    shape = experiment.train.batch_size, experiment.data.max_length
    spool = Spool()
    ids = rng.integers(0, vocab_size, shape, dtype=np.int32)
    examples = [Example({"input_ids": row, "labels": row}) for row in ids]
    spool.add(examples, range(len(ids)))
    return Rows(spool.finish(), experiment.data)


def _forever(loader: Any) -> Iterator[dict[str, Any]]:
    """The run's batches, once around again when they end."""
    while True:
        yield from loader.batches()


def _peak_host_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(m: Measured) -> list[str]:
    """The measurements as lines of text."""
    share = m.useful_tokens / (m.rows * m.length)
    range_ = f"{m.fastest_step_seconds:.3g} to {m.slowest_step_seconds:.3g}"
    device_memory = [
        f"{said} {_gib(count)}"
        for said, count in (
            ("peak", m.peak_device_bytes),
            ("by the compiler's account", m.step_device_bytes),
        )
        if count
    ]
    rows = {
        "device": f"{m.devices} x {m.device}",
        "batch": f"{m.rows} x {m.length} tokens, {share:.1%} of them useful",
        "time to first step": f"{m.first_step_seconds:.1f} s, of it loading "
        f"{m.load_seconds:.1f} s, compiling {m.compile_seconds:.1f} s",
        "step": f"{m.step_seconds:.3g} s ({range_}), {m.step_cpu_seconds:.3g} s of "
        "host processors",
        "tokens/s": f"{m.useful_tokens_per_second:,.0f} useful, "
        f"{m.padded_tokens_per_second:,.0f} with padding",
        "host memory": f"peak {_gib(m.peak_host_bytes)}",
        "device memory": "one device, " + (", ".join(device_memory) or "not known"),
        "floor": f"{m.flops_per_token / 1e9:.3g} GFLOP a token, weights "
        f"{_gib(m.weight_bytes)}, optimizer {_gib(m.state_bytes)}",
        "model FLOP/s": f"{m.model_flops_per_second / 1e12:.3g} T"
        + (f", {m.mfu:.1%} of the peak" if m.mfu else ", the peak is not known"),
        "first loss": f"{m.first_loss:.4f}",
    }
    return [f"{name:20}{text}" for name, text in rows.items()]


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
