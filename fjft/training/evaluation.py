"""Judging a model on all that is held out, by its objective's own metrics."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from fjft import sharding
from fjft.data.loader import Loader
from fjft.data.pack import Rows
from fjft.errors import UserError
from fjft.evaluate.predictions import Writer
from fjft.evaluate.sums import add_up
from fjft.experiment import Experiment
from fjft.training.placing import place
from fjft.training.step import Batch
from fjft.training.writing import judge_texts


@dataclasses.dataclass(frozen=True)
class Judged:
    """What an evaluation found.

    Attributes:
      metrics: By name: `eval_loss`, or `eval_NAME_loss` of a set that has a name.
      reports: What there is to say beyond them.
      first: What the names of the first set's metrics begin with.
    """

    metrics: dict[str, float]
    reports: list[str]
    first: str

    def check_finite(self, step: int) -> None:
        """Checks the losses.

        Raises:
          UserError: One is no number any more.
        """
        for name, value in self.metrics.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise UserError(
                    f"after step {step} {name} is {value}; that step is not saved: "
                    "lower optimizer.learning_rate, or look at the held-out rows if it "
                    "is so from the start"
                )

    def find_metric(self, name: str) -> str:
        """The full name of a metric that is named in short.

        Args:
          name: `eval_NAME_loss`, or without `eval_`; without `NAME_` the first set's.

        Raises:
          UserError: It is none of them.
        """
        short = name.removeprefix("eval_")
        for full in (f"eval_{short}", f"{self.first}{short}"):
            if full in self.metrics:
                return full
        known = ", ".join(key.removeprefix("eval_") for key in self.metrics)
        raise UserError(
            f"evaluate.metric_for_best_model={name!r} is not measured; use one of "
            f"{known}"
        )


class Evaluation:
    """All that is held out, and how it is judged.

    Args:
      experiment: The config.
      mesh: Where the model lies.
      held_out: Rows by the name of their set.

    Raises:
      UserError: A batch does not fit the mesh.
    """

    def __init__(
        self, experiment: Experiment, mesh: Mesh, held_out: Mapping[str, Rows]
    ):
        self._experiment = experiment
        self._mesh = mesh
        self._held_out = held_out
        self._first = _prefix(next(iter(held_out), ""))
        self._loaders = {
            name: _make_loader(experiment, mesh, rows)
            for name, rows in held_out.items()
        }

    def __len__(self) -> int:
        return len(self._held_out)

    @property
    def loss_name(self) -> str:
        """What the loss of the first set is called."""
        return f"{self._first}loss"

    def judge(
        self,
        eval_step: Callable[[Batch], Any],
        model: Any,
        tokenizer: Any,
        make_writer: Callable[[str, Any], Writer] | None = None,
    ) -> Judged:
        """Judges every set.

        Args:
          eval_step: Batch -> the objective's sums, on the devices.
          model: The same model, for what it writes.
          tokenizer: Its tokenizer.
          make_writer: Takes a set's name and its examples; what it makes writes their
            predictions down.

        Raises:
          UserError: As `writing.judge_texts`.
        """
        module, metrics, reports = self._experiment.metrics_module, {}, []
        for name, rows in self._held_out.items():
            writer = make_writer(name, rows.examples) if make_writer else None
            sums = add_up(
                eval_step,
                (place(batch, self._mesh) for batch in self._loaders[name].batches()),
                module.Tally(rows.examples, self._experiment.objective),
                writer,
            )
            found = module.summarize(sums)
            if self._experiment.evaluate.predict_with_generate:
                found |= judge_texts(
                    self._experiment, model, tokenizer, rows.examples, writer
                )
            metrics |= {f"{_prefix(name)}{key}": found[key] for key in found}
            labels = rows.examples.labels
            report = module.report(sums, labels.names if labels else ())
            if report:
                reports.append(f"{name}:\n{report}" if name else report)
        return Judged(metrics, reports, self._first)


def _prefix(name: str) -> str:
    return f"eval_{name}_" if name else "eval_"


def _make_loader(e: Experiment, mesh: Mesh, held_out: Rows) -> Loader:
    """Serves held-out rows in order."""
    sharding.check_batch(e.eval_batch_size, 1, mesh)
    return Loader(
        held_out,
        e.eval_batch_size,
        shuffle=False,
        shards=sharding.local_shards(mesh),
        num_shards=sharding.data_shards(mesh),
    )
