"""Whether a step fits into a device's memory, asked before anything runs."""

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from fjft import tree
from fjft.checkpoint.source import ModelInfo
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.training.program import UNKNOWN_STEPS, Program, build_program
from fjft.training.teacher import is_teachers

GIB = 2**30
# Several times faster than the default, and memory is laid out much as there.
OPTIMIZATION_LEVEL = "O1"


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the compiler says of a step's memory on one device.

    Attributes:
      fits: Whether the step can run.
      peak_bytes: Most memory in use at a time; of a step that the compiler refused,
        what it says that this would need.
      limit_bytes: What there is; None is not known.
      parts: What the peak is made of, in bytes; `temporaries` are what is left of it:
        activations, gradients and all that the compiler keeps.
      host_bytes: What lies in the host's memory for it; it comes and goes in each step.
    """

    fits: bool
    peak_bytes: int
    limit_bytes: int | None
    parts: dict[str, int]
    host_bytes: int = 0

    def explain(self) -> str:
        """The parts in words, the largest first."""
        ranked = sorted(self.parts.items(), key=lambda item: -item[1])
        return ", ".join(f"{part} {gib(size)}" for part, size in ranked if size)


def compile_step(
    program: Program, length: int, limit_bytes: int | None, dump: str | None = None
) -> tuple[Any, Any, Fit]:
    """Compiles a program's train step; nothing runs, and its devices may be absent.

    Call it with the program's mesh set.

    Args:
      program: What to compile.
      length: Tokens of a row.
      limit_bytes: Memory of a device; None is not known.
      dump: A directory for what the compiler writes about it.

    Returns:
      The traced step, the compiled one (None if the compiler refused it), and how it
      fits.

    Raises:
      UserError: A kernel does not fit the fast memory on a chip.
    """
    batch = program.batch_shapes(length)
    traced = program.train_step.trace(
        program.state_shapes, program.frozen_shapes, batch
    )
    trained = device_bytes(program.state_shapes.params)
    teacher, own = tree.partition(program.frozen_shapes, is_teachers)
    parts = {
        "frozen weights": device_bytes(own),
        "trained weights": trained,
        "optimizer": device_bytes(program.state_shapes) - trained,
        "batch": device_bytes(batch),
    }
    if teacher:
        parts["teacher"] = device_bytes(teacher)
    static, compiled, fits, on_host = sum(parts.values()), None, False, 0
    try:
        with _fast_compiler():
            options = {"xla_dump_to": dump} if dump else None
            compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        _check_kernels(str(error))
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        # It may not say by how much, only that there is too little.
        peak = max(static + needed, (limit_bytes or 0) + 1)
    else:
        memory = compiled.memory_analysis()
        # The peak counts arguments that lie on the host, unlike what else lies there.
        on_host = memory.host_argument_size_in_bytes
        peak = peak_bytes(memory, program.mesh) - on_host
        on_host += memory.host_temp_size_in_bytes
        fits = limit_bytes is None or peak <= limit_bytes
    parts["temporaries"] = max(peak - static, 0)
    return traced, compiled, Fit(fits, peak, limit_bytes, parts, on_host)


def peak_bytes(memory: Any, mesh: Mesh) -> int:
    """Most memory that a compiled program needs on one device.

    Args:
      memory: Its `memory_analysis()`.
      mesh: The devices that it was compiled for.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return memory.peak_memory_in_bytes
    # For CPUs the compiler leaves temporaries out of its peak.
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def check_fits(
    experiment: Experiment,
    mesh: Mesh,
    files: ModelInfo,
    length: int,
    num_labels: int | None = None,
) -> None:
    """Refuses a run that does not fit its devices, before its weights are read.

    Devices that do not tell their memory, such as CPUs, are trusted.

    Args:
      experiment: The config.
      mesh: The devices.
      files: The pretrained model; its weights are not read.
      length: Tokens of the longest row.
      num_labels: Outputs of the head, where the data say it.

    Raises:
      UserError: It does not fit; says what takes the memory and what to change.
    """
    limit = _limit(mesh)
    if limit is None:
        return
    with jax.set_mesh(mesh):
        steps = experiment.train.max_steps or UNKNOWN_STEPS
        program = build_program(experiment, mesh, files, steps, num_labels)
        fit = compile_step(program, length, limit)[2]
    if not fit.fits:
        raise UserError(
            f"a step of {program.batch_size} rows of {length} tokens needs "
            f"{gib(fit.peak_bytes)} on each device, which has {gib(limit)} "
            f"({fit.explain()}); lower train.batch_size or data.max_length, raise "
            "train.accumulation_steps, or let `fjft plan --tune` find what fits"
        )


def _limit(mesh: Mesh) -> int | None:
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit")


def needed_bytes(message: str) -> int | None:
    """Temporaries of a program that was refused; None if that was not the reason.

    `... HLO temporaries (108.21G) exceeds available HBM (15.75G)` is 108.21 GiB.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"\(([\d.]+)G\) exceeds available", message)
    return int(float(found[1]) * GIB) if found else 0


def _check_kernels(message: str) -> None:
    """Tells a kernel that was refused from a program: no smaller batch would help.

    `Ran out of memory in memory space vmem while allocating on stack for %splash_mha...
    Scoped allocation with size 29.91M and limit 16.00M exceeded ...`

    Raises:
      UserError: The message is of such a kernel.
    """
    if "memory space vmem" not in message:
        return
    found = re.search(r"with size ([\d.]+)M and limit ([\d.]+)M", message)
    sizes = f", {found[1]} MiB where {found[2]} are free" if found else ""
    raise UserError(
        f"a kernel needs more fast memory than the chip has{sizes}; lower "
        "model.attention_block, which is chosen by shape where it is 0"
    )


def device_bytes(arrays: Any) -> int:
    """Bytes of a tree of shapes on one device; what lies on the host is none."""
    return sum(
        tree.num_bits(leaf.dtype)
        * math.prod(leaf.sharding.shard_shape(leaf.shape))
        // 8
        for leaf in jax.tree.leaves(arrays)
        if leaf.sharding.memory_kind != "pinned_host"
    )


def gib(nbytes: float) -> str:
    """`3221225472` becomes `3.00 GiB`, what is small is in MiB."""
    if nbytes >= GIB / 16:
        return f"{nbytes / GIB:.2f} GiB"
    return f"{nbytes / 2**20:.2f} MiB"


@contextmanager
def _fast_compiler() -> Iterator[None]:
    level = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", OPTIMIZATION_LEVEL)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", level)
