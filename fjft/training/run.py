"""A run ready to go: model, data, steps and where they lie, built from a config."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from fjft import sharding, tree
from fjft.blueprint import name_labels
from fjft.checkpoint.source import ModelFiles
from fjft.data.loader import Loader
from fjft.data.pack import Rows
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.pretrained import build_model
from fjft.training import step as steps
from fjft.training.evaluation import Evaluation, Judged
from fjft.training.placing import place
from fjft.training.program import Program, build_program
from fjft.training.state import TrainState, init_state
from fjft.training.teacher import (
    as_teachers,
    has_teacher,
    is_teachers,
    load_teacher,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Program):
    """Everything the loop turns: a program, and what it runs on.

    Attributes:
      graphdef: The model's structure, with the files that it came from.
      frozen: The parameters that are only read.
      loader: Training batches.
      evaluation: All that is held out.
    """

    graphdef: nnx.GraphDef
    frozen: tree.Params
    loader: Loader
    evaluation: Evaluation

    def batches(self) -> Iterator[steps.Batch]:
        """Training batches from where the loader stands, on the devices."""
        return (place(batch, self.mesh) for batch in self.loader)

    def evaluate(self, state: TrainState, tokenizer: Any = None) -> Judged:
        """Judges the model as it is now on all that is held out.

        Args:
          state: Where training stands.
          tokenizer: The model's, where it is judged by what it writes.
        """
        step = functools.partial(self.eval_step, state.result, self.frozen)
        return self.evaluation.judge(step, self.model(state), tokenizer)

    def model(self, state: TrainState) -> Any:
        """The model as it is now."""
        return tree.merge(self.graphdef, self.own_frozen, state.result)

    @property
    def own_frozen(self) -> tree.Params:
        """The parameters that are only read, without a teacher's."""
        return tree.partition(self.frozen, is_teachers)[1]


def build_run(
    experiment: Experiment,
    mesh: Mesh,
    files: ModelFiles,
    train: Rows,
    held_out: Mapping[str, Rows],
) -> tuple[Run, TrainState]:
    """Loads the model and builds its steps.

    Args:
      experiment: The config.
      mesh: Where everything lies.
      files: The pretrained model.
      train: Rows to train on.
      held_out: Rows to judge, by the name of their set.

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
    evaluation = Evaluation(e, mesh, held_out)
    if e.evaluate.eval_steps and not len(evaluation):
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
    for rows in (train, *held_out.values()):
        rows.check_texts(program.blueprint.model.longest_text)
    model = build_model(
        files,
        method=e.method,
        peft_config=e.peft,
        dtype=e.model.dtype,
        mesh=mesh,
        seed=e.train.seed,
        quantization=e.model.quantization,
        matmuls=e.model.matmuls,
        attention=e.model.way,
        head=head,
        num_labels=num_labels,
    )
    graphdef, params = tree.split(model)
    trainable, frozen = tree.partition(params, program.state_shapes.params.__contains__)
    if has_teacher(e):
        teacher = load_teacher(e, mesh, files.load_tokenizer())
        frozen |= as_teachers(tree.split(teacher)[1])
    run = Run(
        **vars(program),
        graphdef=graphdef,
        frozen=frozen,
        loader=loader,
        evaluation=evaluation,
    )
    return run, init_state(
        trainable,
        program.optimizer,
        e.train.seed,
        program.rule,
        on_host=e.optimizer.offload,
        averages=e.train.ema_decay > 0,
    )
