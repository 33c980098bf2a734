"""A run ready to go: model, data, steps and where they lie, built from a config."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fjft import sharding, tree
from fjft.build import Experiment
from fjft.checkpoint.source import ModelFiles
from fjft.data.loader import Loader
from fjft.data.pack import Rows
from fjft.errors import UserError
from fjft.evaluate.sums import Tally, add_up
from fjft.pretrained import build_model, name_labels
from fjft.training import step as steps
from fjft.training.program import Program, build_program
from fjft.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Program):
    """Everything the loop turns: a program, and what it runs on.

    Attributes:
      graphdef: The model's structure, with the files that it came from.
      frozen: The parameters that are only read.
      loader: Training batches.
      eval_loader: Held-out batches, or None.
      label_names: What the head tells apart, in the order of ids, where it does.
      make_tally: Makes what adds up an evaluation.
    """

    graphdef: nnx.GraphDef
    frozen: tree.Params
    loader: Loader
    eval_loader: Loader | None
    label_names: tuple[str, ...]
    make_tally: Callable[[], Tally]

    def batches(self) -> Iterator[steps.Batch]:
        """Training batches from where the loader stands, on the devices."""
        return (place(batch, self.mesh) for batch in self.loader)

    def evaluate(self, state: TrainState) -> Any:
        """The objective's sums over the held-out rows; None when there are none."""
        if self.eval_loader is None:
            return None
        judge = functools.partial(self.eval_step, state.params, self.frozen)
        batches = self.eval_loader.batches()
        batches = (place(batch, self.mesh) for batch in batches)
        return add_up(judge, batches, self.make_tally())

    def model(self, state: TrainState) -> Any:
        """The model as it is now."""
        return tree.merge(self.graphdef, self.frozen, state.params)


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> steps.Batch:
    """Puts this process's rows of a batch on its devices."""
    rows, shards = sharding.batch_sharding(mesh), sharding.local_shards(mesh)

    def place_column(local: np.ndarray) -> jax.Array:
        size = len(local) // len(shards)
        shape = size * sharding.data_shards(mesh), *local.shape[1:]

        def read(index: Any) -> np.ndarray:
            first = shards.index((index[0].start or 0) // size) * size
            return local[first : first + size]

        return jax.make_array_from_callback(shape, rows, read)

    return {name: place_column(column) for name, column in batch.items()}


def build_run(
    experiment: Experiment, mesh: Mesh, files: ModelFiles, train: Rows, held_out: Rows
) -> tuple[Run, TrainState]:
    """Loads the model and builds its steps.

    Args:
      experiment: The config.
      mesh: Where everything lies.
      files: The pretrained model.
      train: Rows to train on.
      held_out: Rows to judge; may be empty.

    Raises:
      UserError: The model cannot be loaded, or a batch does not fit the mesh.
    """
    e = experiment
    batch_size, accumulation = e.train.batch_size, e.train.accumulation_steps
    sharding.check_batch(batch_size, accumulation, mesh)
    loader = Loader(
        train,
        batch_size,
        seed=e.train.seed,
        num_epochs=None if e.train.max_steps else math.ceil(e.train.num_epochs),
        shuffle=e.data.shuffle,
        shards=sharding.local_shards(mesh),
        num_shards=sharding.data_shards(mesh),
    )
    eval_loader = make_eval_loader(e, mesh, held_out) if len(held_out) else None
    if e.evaluate.eval_steps and eval_loader is None:
        raise UserError(
            f"evaluate.eval_steps is {e.evaluate.eval_steps}, but no rows are held "
            "out; set data.eval or data.eval_size, or evaluate.eval_steps=0"
        )
    total_steps = e.train.max_steps or math.ceil(
        e.train.num_epochs * loader.batches_per_epoch
    )
    if total_steps < 1:
        raise UserError("train.max_steps and train.num_epochs ask for no step at all")

    labels, head = train.examples.labels, e.objective_module.HEAD
    num_labels = e.count_labels(labels)
    if labels is not None:
        files = name_labels(files, labels)
    program = build_program(e, mesh, files, total_steps, num_labels)
    model = build_model(
        files,
        method=e.method,
        peft_config=e.peft,
        dtype=e.model.dtype,
        mesh=mesh,
        seed=e.train.seed,
        quantization=e.model.quantization,
        head=head,
        num_labels=num_labels,
    )
    graphdef, params = tree.split(model)
    trainable, frozen = tree.partition(params, program.state_shapes.params.__contains__)
    run = Run(
        **vars(program),
        graphdef=graphdef,
        frozen=frozen,
        loader=loader,
        eval_loader=eval_loader,
        label_names=labels.names if labels is not None else (),
        make_tally=lambda: e.metrics_module.Tally(held_out.examples, e.objective),
    )
    return run, init_state(
        trainable,
        program.optimizer,
        e.train.seed,
        program.rule,
        on_host=e.optimizer.offload,
    )


def make_eval_loader(e: Experiment, mesh: Mesh, held_out: Rows) -> Loader:
    """Makes the loader of held-out rows, in order.

    Raises:
      UserError: A batch does not fit the mesh.
    """
    size = e.evaluate.batch_size or e.train.batch_size // e.train.accumulation_steps
    sharding.check_batch(size, 1, mesh)
    return Loader(
        held_out,
        size,
        shuffle=False,
        shards=sharding.local_shards(mesh),
        num_shards=sharding.data_shards(mesh),
    )
