"""Plans a config: compiles it for its hardware, and variations of it."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from jax.sharding import Mesh

from fjft import sharding
from fjft.build import build_experiment, override
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.planning.compiling import compile_experiment
from fjft.planning.report import Report, make_report
from fjft.planning.targets import HERE, Target, find_target
from fjft.training.program import UNKNOWN_STEPS

_MOST_COMPILES = 12


def plan(
    config: ml_collections.ConfigDict,
    target: str = HERE,
    *,
    num_rows: int | None = None,
    price_per_hour: float | None = None,
) -> Report:
    """Compiles a config's own train step for some hardware, which need not be there.

    Args:
      config: A config, see `load_config`; no weights and no data are read.
      target: `v5e-8`, `2xv6e-64`, `h100x8`, ..., or `here` for this process's devices.
      num_rows: Rows of the training data, if known: what an epoch is made of.
      price_per_hour: Dollars of the whole target, instead of the table's.

    Returns:
      What it takes: `.fits`, `.peak_bytes`, `.limit_bytes`, `.step_seconds`,
      `.max_batch` and more; `.describe()` gives it in words.

    Raises:
      UserError: The config will not do, the target is unknown, or its compiler is not
        installed.
    """
    return Planner(config, target, num_rows, price_per_hour).plan()


class Planner:
    """Plans variations of one config on one target, each of them once.

    Attributes:
      config: The config that is varied.
      target: The hardware.
      limit_bytes: Of one device; None is not known.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        target: str,
        num_rows: int | None = None,
        price_per_hour: float | None = None,
    ):
        self.config = config
        self._num_rows = num_rows
        found = find_target(target)
        if price_per_hour is not None:
            found = dataclasses.replace(found, price=price_per_hour)
        self.target: Target = found
        experiment = build_experiment(config)
        self._files = experiment.model.open_info()
        self._known: dict[tuple, Report] = {}

    def plan(self, changes: Mapping[str, Any] | None = None) -> Report:
        """Plans the config with some options changed.

        Args:
          changes: Values by dotted key.

        Raises:
          UserError: The changed config will not do.
        """
        changes = dict(changes or {})
        e, mesh = self._change(changes), self.mesh(changes)
        key = mesh, repr(dataclasses.replace(e, mesh=sharding.Config()))
        if key not in self._known:
            steps = e.train.max_steps or None
            if steps is None and self._num_rows is not None:
                batches = -(-self._num_rows // e.train.batch_size)
                steps = max(1, round(e.train.num_epochs * batches))
            compiled = compile_experiment(
                e, self._files, self.target, steps or UNKNOWN_STEPS
            )
            self._known[key] = make_report(
                compiled, self.target, steps, lambda: self.max_batch(changes)
            )
        return self._known[key]

    def least_batch(self, changes: Mapping[str, Any]) -> int:
        """One row for each of the devices that share the rows, times accumulation."""
        pieces = self._change(changes).train.accumulation_steps
        return sharding.data_shards(self.mesh(changes)) * pieces

    def max_batch(
        self, changes: Mapping[str, Any] | None = None, slack: float = 0.0
    ) -> int:
        """The largest `train.batch_size` that fits, 0 if not even the smallest does.

        Args:
          changes: Values by dotted key.
          slack: How far below the largest is near enough, in parts of it.

        Raises:
          UserError: The memory of the target is not known.
        """
        limit = self.target.memory_bytes
        if limit is None:
            raise UserError(
                f"the memory of {self.target.name} is not known, so neither is the "
                "largest batch"
            )
        changes = dict(changes or {})
        unit = self.least_batch(changes)

        def measure(units: int) -> tuple[bool, int]:
            report = self.plan(changes | {"train.batch_size": units * unit})
            return report.fits, report.peak_bytes

        start = self.plan(changes | {"train.batch_size": unit})
        static = sum(start.parts.values()) - start.parts["temporaries"]
        return unit * largest_fitting(measure, static, limit, slack)

    def mesh(self, changes: Mapping[str, Any]) -> Mesh:
        """The target's devices as the config with some options changed has them."""
        return sharding.make_mesh(self._change(changes).mesh, self.target.devices)

    def _change(self, changes: Mapping[str, Any]) -> Experiment:
        """The config with some options changed."""
        config = copy.deepcopy(self.config)
        override(config, changes)
        return build_experiment(config)


def largest_fitting(
    measure: Callable[[int], tuple[bool, int]],
    static: int,
    limit: int,
    slack: float = 0.0,
) -> int:
    """The largest size that fits, in few measurements.

    Memory grows about linearly with the batch, so the line through the last two
    measurements says where to look next; what was seen to fit and not to fit bounds
    the search.

    Args:
      measure: Size -> whether it fits, and its bytes.
      static: Bytes that do not grow.
      limit: Bytes that there are.
      slack: How far below the largest is near enough, in parts of it.
    """
    fits, peak = measure(1)
    if not fits:
        return 0
    fitting, refused = 1, None
    slope, base = max(peak - static, 1), static
    for _ in range(_MOST_COMPILES):
        guess = max(int((limit - base) / slope), fitting + 1)
        if refused is not None:
            guess = min(guess, refused - 1)
        if guess <= fitting * (1 + slack):
            break
        fits, found = measure(guess)
        if found > peak and fits:
            slope, base = (found - peak) / (guess - fitting), found
            base -= slope * guess
        if fits:
            fitting, peak = guess, found
        else:
            refused = guess
            if found > peak:
                # Somewhere between the last two lies the end of what fits.
                slope = (found - peak) / (guess - fitting)
                base = peak - slope * fitting
    return fitting
