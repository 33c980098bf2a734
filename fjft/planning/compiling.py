"""Compiles a config's train step for a target, and reads what the compiler writes."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from fjft import sharding
from fjft.checkpoint.source import ModelInfo
from fjft.experiment import Experiment
from fjft.planning import hlo
from fjft.planning.flops import count_flops
from fjft.planning.targets import HERE, Target
from fjft.telemetry_speed import narrow_rates
from fjft.training.fit import Fit, compile_step
from fjft.training.program import Program, build_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said of a step.

    Attributes:
      program: What was compiled.
      length: Tokens of a row.
      fit: What memory it takes.
      flops: Of all devices, with what is recomputed.
      wide_flops: As many in bfloat16 would take as long.
      traffic: What it moves; None if it was refused.
      buffers: The largest temporary ones.
      seconds: From the config to here.
    """

    program: Program
    length: int
    fit: Fit
    flops: float
    wide_flops: float
    traffic: hlo.Traffic | None
    buffers: list[hlo.Buffer]
    seconds: float


def compile_experiment(
    experiment: Experiment, files: ModelInfo, target: Target, total_steps: int
) -> Compiled:
    """Compiles the longest step of a run: full rows.

    Args:
      experiment: The config.
      files: The pretrained model; its weights are not read.
      target: What to compile for.
      total_steps: Optimizer steps of the whole run.

    Raises:
      UserError: The config cannot be trained on this mesh.
    """
    started = time.perf_counter()
    kind = target.devices[0].device_kind
    mesh = sharding.make_mesh(experiment.mesh, target.devices)
    length = experiment.data.max_length
    uncached = contextlib.nullcontext() if target.name == HERE else _uncached()
    with jax.set_mesh(mesh), uncached, tempfile.TemporaryDirectory() as dump:
        program = build_program(experiment, mesh, files, total_steps)
        traced, compiled, fit = compile_step(program, length, target.memory_bytes, dump)
        traffic = None
        if compiled is not None:
            traffic = hlo.Text(compiled.as_text()).measure()
        buffers = _read_buffers(Path(dump))
    return Compiled(
        program=program,
        length=length,
        fit=fit,
        flops=count_flops(traced.jaxpr),
        wide_flops=count_flops(traced.jaxpr, narrow_rates(kind)),
        traffic=traffic,
        buffers=buffers,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Lets JAX's cache of compiled programs be: it cannot read those of absent devices.

    Whether there is a cache is decided once, unless it is reset.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _read_buffers(directory: Path) -> list[hlo.Buffer]:
    """The largest buffers, which are written even if the program is refused."""
    assignments = sorted(directory.glob("*train_step*buffer-assignment.txt"))
    if not assignments:
        return []
    text = Path(str(assignments[-1]).replace("-buffer-assignment", ""))
    names = hlo.Text(text.read_text()) if text.is_file() else None
    return hlo.largest_buffers(assignments[-1].read_text(), names)
