"""How fast a run goes: tokens a second, use of the chip, time left, compiles."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

# Peak dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`.
# TPU: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of each
# version, "peak compute per chip". A v2, v3 or 7x chip is two jax devices.
# NVIDIA: the data sheets' "BFLOAT16 Tensor Core" without sparsity; V100 and T4 have
# no bfloat16 and stand with their float16 figure.
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}

# How many times as fast products of 8 bits are; 1 elsewhere. TPUs: by the same pages.
# GPUs: NVIDIA's dense rates as stas00/ml-engineering (compute/accelerator/README.md at
# b9e2972) has them, T4's, A10's and L4's as winston-zhang-orz/gpu-specs (specs.md at
# 097f0fb); fp8 is there from compute capability 8.9 on (NVIDIA's Transformer Engine,
# support matrix).
NARROW_RATES = {
    "TPU v5 lite": {"int8": 2.0},
    "TPU v5e": {"int8": 2.0},
    "TPU v5": {"int8": 2.0},
    "TPU v5p": {"int8": 2.0},
    "TPU v6 lite": {"int8": 2.0},
    "TPU v6e": {"int8": 2.0},
    "TPU7x": {"fp8": 2.0},
    "Tesla T4": {"int8": 2.0},
    "NVIDIA A10": {"int8": 2.0},
    "NVIDIA A100": {"int8": 2.0},
    "NVIDIA B200": {"int8": 2.0, "fp8": 2.0},
    "NVIDIA GH200": {"int8": 2.0, "fp8": 2.0},
    "NVIDIA H100": {"int8": 2.0, "fp8": 2.0},
    "NVIDIA H200": {"int8": 2.0, "fp8": 2.0},
    "NVIDIA L4": {"int8": 2.0, "fp8": 2.0},
    "NVIDIA L40S": {"int8": 2.0, "fp8": 2.0},
}

# One event for each XLA compilation, or its load from the persistent cache.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


def peak_flops(device_kind: str) -> float | None:
    """Looks up the peak bfloat16 FLOP/s of a device.

    Args:
      device_kind: As `jax.devices()[0].device_kind` says it, such as `TPU v5 lite` or
        `NVIDIA A100-SXM4-40GB`.

    Returns:
      FLOP/s of one jax device, or None when it is not known, as for CPUs.
    """
    return _look_up(PEAK_FLOPS, device_kind)


def narrow_rates(device_kind: str) -> Mapping[str, float]:
    """How many times as fast as bfloat16's a device does products of `int8` or `fp8`.

    Args:
      device_kind: As for `peak_flops`.
    """
    return _look_up(NARROW_RATES, device_kind) or {}


def _look_up(table: Mapping[str, T], device_kind: str) -> T | None:
    # The longest name that ends at a word's end: "NVIDIA L4" is no "NVIDIA L40S".
    for name in sorted(table, key=len, reverse=True):
        # "TPU v4 lite" is another chip than "TPU v4".
        if re.match(rf"{re.escape(name)}(?![A-Za-z0-9]| lite)", device_kind):
            return table[name]
    return None


@dataclass(frozen=True)
class Speed:
    """What a meter read: tokens a second over all devices, and MFU in 0..1 or None."""

    tokens_per_second: float
    mfu: float | None


class SpeedMeter:
    """Tokens a second between two readings, and model FLOP utilization.

    Args:
      flops_per_token: Model FLOPs that training on one token takes, recomputation not
        counted.
      peak_flops: Of all devices together; None, like the above, means no MFU.
      clock: Seconds, for tests.
    """

    def __init__(
        self,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._tokens = 0
        self._since = clock()

    def add(self, tokens: int) -> None:
        """Counts tokens that were trained on."""
        self._tokens += tokens

    def read(self, excluded_seconds: float = 0.0) -> Speed:
        """Reads the speed since the last reading, and starts anew.

        Steps run asynchronously: read after the last one's result has arrived.

        Args:
          excluded_seconds: Time in between that was no training: compiling,
            evaluating, saving.
        """
        now = self._clock()
        seconds = max(now - self._since - excluded_seconds, 1e-9)
        tokens_per_second = self._tokens / seconds
        self._since, self._tokens = now, 0
        mfu = None
        if self._flops_per_token and self._peak_flops:
            mfu = tokens_per_second * self._flops_per_token / self._peak_flops
        return Speed(tokens_per_second, mfu)


class StepClock:
    """Time left, from the pace of the steps after the first, which compiles."""

    def __init__(
        self,
        start_step: int,
        total_steps: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total_steps = total_steps
        self._step = start_step
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last = (start_step, clock())

    def tick(self, step: int) -> None:
        """Notes that `step` steps are done now."""
        self._last = (step, self._clock())
        if self._first is None and step > self._step:
            self._first = self._last

    def seconds_left(self) -> float | None:
        """Seconds until the last step; None before there is a pace."""
        if self._first is None or self._last[0] == self._first[0]:
            return None
        steps = self._last[0] - self._first[0]
        pace = (self._last[1] - self._first[1]) / steps
        return pace * max(0, self.total_steps - self._last[0])


def format_seconds(seconds: float) -> str:
    """`75` becomes `1:15`, `3671` becomes `1:01:11`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class Compile:
    """One XLA compilation: the name of the jitted function, and how long it took."""

    name: str
    seconds: float


class CompileWatcher:
    """Counts what XLA compiles, from its making until `close`.

    Eager operations compile too, in milliseconds each.
    """

    def __init__(self):
        import jax.monitoring

        self.count = 0
        self.seconds = 0.0
        self.cache_hits = 0
        self._new: list[Compile] = []
        self._is_open = True
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def drain(self, min_seconds: float = 0.0) -> list[Compile]:
        """Takes the compilations since the last call that took `min_seconds` or more.

        The shorter ones are forgotten here, though `count` and `seconds` have them.
        """
        new, self._new = self._new, []
        return [compile_ for compile_ in new if compile_.seconds >= min_seconds]

    def close(self) -> None:
        """Stops counting."""
        # Older jax cannot unregister a listener, so it only falls silent.
        self._is_open = False

    def _on_duration(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if self._is_open and event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs
            # jit(step) or jit_step, depending on the version of jax.
            name = str(kwargs.get("fun_name", ""))
            name = re.sub(r"^jit\((.*)\)$|^jit_(.*)$", r"\1\2", name)
            self._new.append(Compile(name, duration_secs))

    def _on_event(self, event: str, **kwargs: Any) -> None:
        del kwargs
        if self._is_open and event == CACHE_HIT_EVENT:
            self.cache_hits += 1
