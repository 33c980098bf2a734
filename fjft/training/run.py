"""A run ready to go: model, data, steps and where they lie, built from a config."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fjft import sharding, tree
from fjft.build import Experiment
from fjft.checkpoint.source import ModelFiles
from fjft.data.loader import Loader
from fjft.data.pack import Rows
from fjft.errors import UserError
from fjft.evaluate.perplexity import evaluate_sums
from fjft.optimize.optimizer import make_optimizer, make_schedule
from fjft.pretrained import build_model
from fjft.training import step as steps
from fjft.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop turns.

    Attributes:
      graphdef: The model's structure.
      frozen: The parameters that are only read.
      train_step: `(state, frozen, batch) -> (state, metrics)`, compiled when called.
      eval_step: `(params, frozen, batch) -> sums`.
      loader: Training batches.
      eval_loader: Held-out batches, or None.
      schedule: Step -> learning rate.
      total_steps: Optimizer steps of the whole run.
      num_trainable: Scalars that are trained.
      flops_per_token: Model FLOPs of training on one token.
    """

    graphdef: nnx.GraphDef
    frozen: tree.Params
    train_step: Callable
    eval_step: Callable
    loader: Loader
    eval_loader: Loader | None
    schedule: Callable[[Any], Any]
    total_steps: int
    num_trainable: int
    flops_per_token: float
    mesh: Mesh

    def batches(self) -> Iterator[steps.Batch]:
        """Training batches from where the loader stands, on the devices."""
        return (place(batch, self.mesh) for batch in self.loader)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Judges the held-out rows; empty when there are none."""
        if self.eval_loader is None:
            return {}
        judge = functools.partial(self.eval_step, state.params, self.frozen)
        batches = self.eval_loader.batches()
        return evaluate_sums(judge, (place(batch, self.mesh) for batch in batches))

    def model(self, state: TrainState) -> Any:
        """The model as it is now."""
        return tree.merge(self.graphdef, self.frozen, state.params)


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> steps.Batch:
    """Puts this process's rows of a batch on its devices."""
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(rows, array)
        for name, array in batch.items()
    }


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
        process_index=jax.process_index(),
        process_count=jax.process_count(),
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

    model = build_model(
        files,
        method=e.method,
        peft_config=e.peft,
        dtype=e.model.dtype,
        mesh=mesh,
        seed=e.train.seed,
    )
    table = model.provenance.sites
    graphdef, params = tree.split(model)
    trainable, frozen = tree.partition(params, e.method.is_trainable(e.peft, table))
    axes = tree.logical_axes(model)
    optimizer = make_optimizer(
        e.optimizer,
        total_steps,
        stack_axes={path: _stack_axes(axes[path]) for path in trainable},
        muon_mask={path: "vocab" not in axes[path] for path in trainable},
    )
    state = init_state(trainable, optimizer, e.train.seed)
    loss = make_loss(e)
    train_step = steps.make_train_step(
        graphdef,
        loss,
        optimizer,
        accumulation_steps=accumulation,
        max_grad_norm=e.optimizer.max_grad_norm,
    )
    run = Run(
        graphdef=graphdef,
        frozen=frozen,
        train_step=steps.jit_train_step(train_step, state, mesh),
        eval_step=jax.jit(steps.make_eval_step(graphdef, loss)),
        loader=loader,
        eval_loader=eval_loader,
        schedule=make_schedule(e.optimizer, total_steps),
        total_steps=total_steps,
        num_trainable=e.method.num_trainable(model, table, e.peft),
        flops_per_token=_flops_per_token(
            trainable, frozen, axes, getattr(model.arch, "experts", None)
        ),
        mesh=mesh,
    )
    return run, state


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
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_loss(e: Experiment) -> steps.Loss:
    """Makes the objective's `(model, batch, rng) -> sums`; rng None is evaluation."""

    def loss(model: Any, batch: steps.Batch, rng: jax.Array | None) -> Any:
        remat = e.model.remat if rng is not None else "none"
        return e.objective_module.loss(model, batch, e.objective, rng=rng, remat=remat)

    return loss


def _stack_axes(axes: tuple[str | None, ...]) -> int:
    """How many leading axes only lay matrices side by side."""
    return axes.count("layers") + axes.count("expert")


def _flops_per_token(
    trainable: tree.Params,
    frozen: tree.Params,
    axes: dict[str, tuple[str | None, ...]],
    experts: Any,
) -> float:
    """Model FLOPs of one token's matrix products, forward and backward.

    Two per weight forward, two for the gradient of its input, and two more for its own
    gradient where it is trained. Of routed experts only those that a token goes to
    count. Attention's own products are left out, as is what the backward pass
    recomputes, so the utilization worked out from it is a lower bound.
    """

    def matrix_size(params: tree.Params) -> float:
        return sum(
            math.prod(p.shape) * _share(path)
            for path, p in params.items()
            if _is_matrix(path, params)
        )

    def _share(path: str) -> float:
        return experts.per_token / experts.count if "expert" in axes[path] else 1.0

    def _is_matrix(path: str, params: tree.Params) -> bool:
        looked_up = path == "embedding.weight" and any(
            p.startswith("lm_head.") for p in (*trainable, *frozen)
        )
        looked_up |= "positions" in axes[path]
        return not looked_up and jnp.ndim(params[path]) >= 2

    return 6.0 * matrix_size(trainable) + 4.0 * matrix_size(frozen)
