"""What a plan says: does it fit, what takes the room, how long, for how much."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from fjft.planning.compiling import Compiled
from fjft.planning.hlo import Buffer
from fjft.planning.targets import Target
from fjft.training.fit import gib
from fjft.training.flops import attention_flops

# How each estimate is come by.
METHODS = {
    "peak": "the compiler's own account of the compiled step",
    "flops": "matrix products of the traced step, every turn of every loop; model "
    "FLOPs are those of forward and backward pass with nothing recomputed, attention "
    "over whole rows",
    "memory": "operands and results of every instruction of the compiled step",
    "collectives": "what each collective of the compiled step brings to a device",
    "step": "roofline: the longest of FLOPs (in 8 bits where the step has them and the "
    "hardware is faster so), memory and interconnect, each at its "
    "published peak and all at once; no step is faster, unless its attention skips "
    "keys that causality hides, and most take longer; copies from and to the host's "
    "memory are not in it",
    "price": "the price given, or a list price on demand, of 2025 or 2026: check it",
    "time": "steps times the roofline's step; no evaluation, saving or compiling",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A plan of one config on one target; all bytes and seconds are one device's.

    Attributes:
      target: The hardware, as the user says it.
      devices: JAX devices in the mesh.
      mesh: Its axes that are longer than one.
      batch_size: Rows of an optimizer step over all devices.
      length: Tokens of a row.
      fits: Whether the step can run.
      peak_bytes: Most memory in use at a time.
      limit_bytes: What the compiler grants; None is not known.
      parts: What the peak is made of.
      host_bytes: What lies in the host's memory between uses in a step.
      buffers: The largest temporary buffers, which lie in memory one after another.
      model_flops: Of one step over all devices, nothing recomputed.
      hardware_flops: The same with what is recomputed.
      wide_flops: As many in bfloat16 would take as long.
      memory_bytes: Read and written in one step; None if the step was refused.
      collectives: By kind, `(count, bytes)` that arrive in one step.
      compute_seconds: One step's FLOPs at the peak rate; so the next two.
      memory_seconds: Its memory traffic.
      link_seconds: Its collectives.
      price_per_hour: Dollars of all devices.
      total_steps: Optimizer steps of the run; None is not known.
      repeats: Results that the compiler works out again, for want of memory.
      notes: What else is to be known of the program and this hardware.
      compile_seconds: What this plan took.
      find_max_batch: Searches the largest batch that fits, by compiling.
    """

    target: str
    devices: int
    mesh: str
    batch_size: int
    length: int
    fits: bool
    peak_bytes: int
    limit_bytes: int | None
    parts: dict[str, int]
    host_bytes: int
    buffers: list[Buffer]
    model_flops: float
    hardware_flops: float
    wide_flops: float
    memory_bytes: float | None
    collectives: dict[str, tuple[int, float]]
    compute_seconds: float | None
    memory_seconds: float | None
    link_seconds: float | None
    price_per_hour: float | None
    total_steps: int | None
    repeats: int
    notes: list[str]
    compile_seconds: float
    find_max_batch: Callable[[], int] = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def max_batch(self) -> int:
        """The largest `train.batch_size` that fits; 0 is none. Compiles a few times."""
        return self.find_max_batch()

    @property
    def step_seconds(self) -> float | None:
        """The roofline's step; None where the hardware's peaks are not known."""
        times = self.compute_seconds, self.memory_seconds, self.link_seconds
        known = [t for t in times if t is not None]
        return max(known) if self.compute_seconds and known else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of full rows a second, over all devices."""
        seconds = self.step_seconds
        return self.batch_size * self.length / seconds if seconds else None

    @property
    def most_tokens_per_second(self) -> float | None:
        """What no batch is faster than: its products take as long for each token."""
        seconds = self.compute_seconds
        return self.batch_size * self.length / seconds if seconds else None

    @property
    def mfu(self) -> float | None:
        """The share of the peak bfloat16 FLOP/s that the model's own would use."""
        if not self.step_seconds or not self.compute_seconds:
            return None
        useful = self.compute_seconds * self.model_flops / self.wide_flops
        return useful / self.step_seconds

    @property
    def total_seconds(self) -> float | None:
        """The whole run's."""
        if self.step_seconds is None or self.total_steps is None:
            return None
        return self.step_seconds * self.total_steps

    @property
    def total_price(self) -> float | None:
        """The whole run's, in dollars."""
        if self.total_seconds is None or self.price_per_hour is None:
            return None
        return self.total_seconds / 3600 * self.price_per_hour

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        skipped = {"find_max_batch"}
        fields = [f.name for f in dataclasses.fields(self) if f.name not in skipped]
        found = {name: getattr(self, name) for name in fields}
        found["buffers"] = [dataclasses.asdict(b) for b in self.buffers]
        found["collectives"] = {
            kind: {"count": count, "bytes": nbytes}
            for kind, (count, nbytes) in self.collectives.items()
        }
        derived = "step_seconds tokens_per_second mfu total_seconds total_price"
        found |= {name: getattr(self, name) for name in derived.split()}
        if "max_batch" in vars(self):
            found["max_batch"] = self.max_batch
        return found | {"methods": METHODS}

    def describe(self) -> list[str]:
        """The report as lines of text."""
        return [f"{name:20}{text}" for name, text in self._rows()]

    def _rows(self) -> list[tuple[str, str]]:
        batch = f"{self.batch_size} x {self.length} tokens"
        over = f", mesh {self.mesh}" if self.mesh else ""
        verdict = "fits" if self.fits else "does not fit"
        limit = f" of {gib(self.limit_bytes)}" if self.limit_bytes else ""
        rows = [
            ("target", f"{self.target}, {self.devices} devices{over}"),
            ("batch", batch),
            ("memory", f"{verdict}: {gib(self.peak_bytes)}{limit} a device"),
        ]
        rows += [(f"  {part}", gib(size)) for part, size in self.parts.items()]
        rows += [
            ("  largest buffer", f"{gib(b.nbytes)} {b.shape}: {b.made_by}")
            for b in self.buffers
        ]
        if self.host_bytes:
            rows.append(("on the host", f"{gib(self.host_bytes)} for each device"))
        ratio = self.hardware_flops / self.model_flops
        rows.append(
            (
                "FLOPs a step",
                f"{self.model_flops:.3g} of the model, {ratio:.2f} times as many with "
                "what is recomputed",
            )
        )
        if self.memory_bytes is not None:
            rows.append(("memory traffic", f"{gib(self.memory_bytes)} a step"))
        rows += [
            (f"  {kind}", f"{count} times, {gib(nbytes)} a step")
            for kind, (count, nbytes) in self.collectives.items()
        ]
        rows += self._time_rows()
        if "max_batch" in vars(self):
            rows.append(("largest batch", f"{self.max_batch} rows"))
        rows += [("note", note) for note in self.notes]
        return [*rows, ("compiled in", f"{self.compile_seconds:.1f} s")]

    def _time_rows(self) -> list[tuple[str, str]]:
        if self.step_seconds is None or self.tokens_per_second is None:
            return []
        times = [
            f"{name} {seconds:.3g} s"
            for name, seconds in (
                ("FLOPs", self.compute_seconds),
                ("memory", self.memory_seconds),
                ("interconnect", self.link_seconds),
            )
            if seconds is not None
        ]
        rows = [
            ("step, estimate", f"{self.step_seconds:.3g} s ({', '.join(times)})"),
            (
                "speed, estimate",
                f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.0%}, at best",
            ),
        ]
        if self.host_bytes:
            moved = gib(2 * self.host_bytes)
            rows.append(("not in it", f"{moved} a step from and to the host's memory"))
        if self.total_seconds is not None:
            price = self.total_price
            paid = "" if price is None else f", {price:,.2f} dollars"
            hours = f"{self.total_seconds / 3600:.2f} h"
            rows.append(("run, estimate", f"{self.total_steps} steps, {hours}{paid}"))
        elif self.price_per_hour is not None:
            tokens_per_hour = self.tokens_per_second * 3600
            price = self.price_per_hour / tokens_per_hour * 1e6
            rows.append(
                ("price, estimate", f"{price:.3g} dollars for a million tokens")
            )
        if self.price_per_hour is None:
            rows.append(("price", f"of {self.target} not known; give it by --price"))
        return rows


def make_report(
    compiled: Compiled,
    target: Target,
    total_steps: int | None,
    find_max_batch: Callable[[], int],
) -> Report:
    """Puts together what the compiler and the table of hardware say."""
    program, mesh, traffic = compiled.program, compiled.program.mesh, compiled.traffic
    tokens = program.batch_size * compiled.length
    arch = program.blueprint.model.arch
    per_token = program.flops_per_token + attention_flops(arch, compiled.length)
    collectives = {}
    if traffic is not None:
        collectives = {
            kind: (traffic.collective_counts[kind], nbytes)
            for kind, nbytes in traffic.collective_bytes.items()
        }
    arriving = sum(nbytes for _, nbytes in collectives.values())
    return Report(
        target=target.name,
        devices=mesh.size,
        mesh=", ".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1),
        batch_size=program.batch_size,
        length=compiled.length,
        fits=compiled.fit.fits,
        peak_bytes=compiled.fit.peak_bytes,
        limit_bytes=target.memory_bytes,
        parts=compiled.fit.parts,
        host_bytes=compiled.fit.host_bytes,
        buffers=compiled.buffers,
        model_flops=per_token * tokens,
        hardware_flops=compiled.flops,
        wide_flops=compiled.wide_flops,
        memory_bytes=traffic and traffic.memory_bytes,
        collectives=collectives,
        compute_seconds=_divide(
            compiled.wide_flops / mesh.size, target.flops_in(program.dtype)
        ),
        memory_seconds=traffic
        and _divide(traffic.memory_bytes, target.memory_bandwidth),
        link_seconds=traffic and _divide(arriving, target.link_bandwidth),
        price_per_hour=target.price,
        total_steps=total_steps,
        repeats=traffic.repeats if traffic else 0,
        notes=list(_notes(target, program.dtype, traffic.repeats if traffic else 0)),
        compile_seconds=compiled.seconds,
        find_max_batch=find_max_batch,
    )


def _notes(target: Target, dtype: str, repeats: int) -> Iterator[str]:
    if repeats:
        yield (
            f"for want of memory the compiler works {repeats:,} results out again in "
            "each step, whose FLOPs are not counted; fewer rows may be faster"
        )
    if target.devices[0].platform == "gpu":
        yield (
            "what cuDNN and the algorithms chosen on the card take to work in is not "
            "in the peak"
        )
    if target.float32_flops is not None and dtype == "bfloat16":
        yield (
            "this card has no bfloat16 and computes it as float32, "
            f"{target.float32_flops / 1e12:.3g} TFLOP/s at most"
        )


def _divide(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate
