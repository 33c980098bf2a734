"""A config's train step from shapes alone: what it computes, on what, lying where.

Nothing here has numbers, so a step can be compiled for devices that are not there.
`run.py` fills it with weights and data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from fjft import sharding, tree
from fjft.blueprint import Blueprint, choose_head, draw_model, most_common_dtype
from fjft.checkpoint.source import ModelInfo
from fjft.data.encoders import find_layout
from fjft.data.examples import Layout
from fjft.data.pack import empty_batch
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.models.bare import without_adapters
from fjft.optimize.optimizer import make_optimizer, make_schedule
from fjft.peft import virtual
from fjft.peft.rule import StepRule
from fjft.programs import compiler_options
from fjft.training import step as steps
from fjft.training.flops import multiplied
from fjft.training.groups import find_decayed, find_rates
from fjft.training.state import TrainState, abstract_state
from fjft.training.teacher import (
    as_teachers,
    draw_teacher,
    has_teacher,
    with_teacher,
)

# Stands for the steps of a run whose data has not been read; it is only the schedule's
# numbers that depend on it.
UNKNOWN_STEPS = 10_000
# About what an example in a packed row has.
_EXAMPLE_TOKENS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything about a run but its numbers.

    Attributes:
      blueprint: The model with its adapters.
      state_shapes: Shape, dtype and sharding of each array that a step changes.
      frozen_shapes: The same of each parameter that is only read, a teacher's too.
      optimizer: What turns gradients into updates.
      rule: What the method adds to the step, or None.
      train_step: `(state, frozen, batch) -> (state, metrics)`, compiled when called.
      eval_step: `(params, frozen, batch) -> sums`.
      schedule: Step -> learning rate.
      total_steps: Optimizer steps of the whole run.
      num_trainable: Scalars that are trained.
      flops_per_token: Model FLOPs of training on one token.
      batch_size: Rows of a batch.
      dtype: Of activations and frozen weights.
      layout: What a batch holds besides positions and segments.
      is_packed: Whether a row holds several examples.
      mesh: Where everything lies.
    """

    blueprint: Blueprint
    state_shapes: TrainState
    frozen_shapes: dict[str, jax.ShapeDtypeStruct]
    optimizer: optax.GradientTransformation
    rule: StepRule | None
    train_step: Any
    eval_step: Any
    schedule: Callable[[Any], Any]
    total_steps: int
    num_trainable: int
    flops_per_token: float
    batch_size: int
    dtype: str
    layout: Layout
    is_packed: bool
    mesh: Mesh

    def batch_shapes(self, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of a batch whose rows have `length` tokens.

        How many examples a packed row holds at most is the data's to say; it is the
        shape of a label or two, and guessed.
        """
        num_examples = max(length // _EXAMPLE_TOKENS, 1) if self.is_packed else 1
        rows = sharding.batch_sharding(self.mesh)
        batch = empty_batch(self.batch_size, length, self.layout, num_examples)
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
            for name, array in batch.items()
        }


def build_program(
    experiment: Experiment,
    mesh: Mesh,
    files: ModelInfo,
    total_steps: int,
    num_labels: int | None = None,
) -> Program:
    """Draws a run's model and makes its steps; nothing is loaded or compiled.

    Args:
      experiment: The config.
      mesh: Where everything would lie; its devices need not be there.
      files: The pretrained model; its weights are not read.
      total_steps: Optimizer steps of the whole run.
      num_labels: How many labels the head tells apart, where it does.

    Raises:
      UserError: The model cannot be trained so, or does not fit the mesh.
    """
    e = experiment
    sharding.check_batch(e.train.batch_size, e.train.accumulation_steps, mesh)
    sharding.check_length(e.data.max_length, mesh)
    dtype = most_common_dtype(files) if e.model.dtype == "auto" else e.model.dtype
    files = choose_head(files, e.objective_module.HEAD, num_labels or e.count_labels())
    blueprint = draw_model(
        files,
        method=e.method,
        peft_config=e.peft,
        dtype=dtype,
        mesh=mesh,
        quantization=e.model.quantization,
        matmuls=e.model.matmuls,
        attention=e.model.way,
    )
    is_trainable = e.method.is_trainable(e.peft, blueprint.sites)
    trainable, frozen = tree.partition(blueprint.params, is_trainable)
    _check_reference(e, blueprint.model, trainable)
    _check_packing(e, blueprint.model)
    axes = tree.logical_axes(blueprint.model)
    stack_axes = {path: _stack_axes(axes[path]) for path in trainable}
    optimizer = make_optimizer(
        e.optimizer,
        total_steps,
        find_decayed(e, blueprint, trainable),
        stack_axes=stack_axes,
        muon_mask={path: "vocab" not in axes[path] for path in trainable},
        rates=find_rates(e, blueprint, stack_axes),
    )
    rule = None
    if hasattr(e.method, "step_rule"):
        rule = e.method.step_rule(blueprint.model, blueprint.sites, e.peft, total_steps)
    averages = e.train.ema_decay > 0
    if averages and rule is not None:
        raise UserError(
            "train.ema_decay averages parameters that this method prunes, and an "
            "average of what was pruned would come back; use train.ema_decay=0"
        )
    state = abstract_state(
        trainable, optimizer, rule, on_host=e.optimizer.offload, averages=averages
    )
    flops = 6 * multiplied(trainable, blueprint) + 4 * multiplied(frozen, blueprint)
    if hasattr(e.objective_module, "REFERENCE"):
        flops += 2 * multiplied(frozen, blueprint)
    graphdef = blueprint.graphdef
    if has_teacher(e):
        teacher = draw_teacher(e, mesh)
        graphdef, _ = tree.split(with_teacher(blueprint.model, teacher.model))
        frozen |= as_teachers(teacher.params)
        flops += 2 * multiplied(teacher.params, teacher)
    train_step = steps.make_train_step(
        graphdef,
        _make_loss(e),
        optimizer,
        accumulation_steps=e.train.accumulation_steps,
        max_grad_norm=e.optimizer.max_grad_norm,
        rule=rule,
        stacks_on_host=stack_axes if e.optimizer.offload else None,
        ema_decay=e.train.ema_decay,
    )
    return Program(
        blueprint=blueprint,
        state_shapes=state,
        frozen_shapes=frozen,
        optimizer=optimizer,
        rule=rule,
        train_step=steps.jit_train_step(train_step, state, mesh),
        eval_step=jit_eval_step(e, graphdef, mesh),
        schedule=make_schedule(e.optimizer, total_steps),
        total_steps=total_steps,
        num_trainable=e.method.num_trainable(blueprint.model, blueprint.sites, e.peft),
        flops_per_token=flops,
        batch_size=e.train.batch_size,
        dtype=dtype,
        layout=find_layout(
            e.objective_module.EXAMPLES,
            e.data,
            getattr(files.config, "type_vocab_size", 0) > 1,
            files.config.num_labels or 0,
        ),
        is_packed=e.data.packing,
        mesh=mesh,
    )


def _make_loss(e: Experiment) -> steps.Loss:
    """Makes the objective's `(model, batch, rng) -> sums` of a training step."""

    def loss(model: Any, batch: steps.Batch, rng: jax.Array | None) -> Any:
        return e.objective_module.loss(
            model,
            batch,
            e.objective,
            rng=rng,
            remat=e.model.remat,
            **_besides(e, model),
        )

    return loss


def jit_eval_step(e: Experiment, graphdef: nnx.GraphDef, mesh: Mesh) -> Any:
    """Makes the `(params, frozen, batch) -> sums` that judges such a model.

    Args:
      e: The config.
      graphdef: The model's structure, its teacher's too where it has one.
      mesh: Where it lies.
    """
    step = steps.make_eval_step(graphdef, _make_judge(e))
    return jax.jit(step, compiler_options=compiler_options(mesh))


def _make_judge(e: Experiment) -> steps.Judge:
    """Makes the objective's `(model, batch) -> sums` of an evaluation."""

    def judge(model: Any, batch: steps.Batch) -> Any:
        return e.objective_module.evaluate(
            model, batch, e.objective, **_besides(e, model)
        )

    return judge


def _besides(e: Experiment, model: Any) -> dict[str, Any]:
    """What an objective that compares takes besides."""
    if has_teacher(e):
        return {"teacher": model.teacher}
    if hasattr(e.objective_module, "REFERENCE"):
        return {"reference": without_adapters(model)}
    return {}


def _check_reference(e: Experiment, model: Any, trainable: tree.Params) -> None:
    """Refuses to compare with what is trained itself, or is another from the start."""
    if not hasattr(e.objective_module, "REFERENCE"):
        return
    trained = sorted(trainable.keys() & tree.split(without_adapters(model))[1].keys())
    if trained:
        raise UserError(
            "the objective compares with the model without its adapter, but this "
            f"method trains {trained[0]!r}, which is a part of that; use "
            "peft.method=lora, or another with adapters, and no modules_to_save"
        )
    if getattr(e.peft, "is_loftq", False):
        raise UserError(
            f"peft.init_lora_weights={e.peft.init_lora_weights!r} makes up for what "
            "quantization took from the model, and the objective compares with the "
            "model without its adapter, which would be another from the start; use "
            "peft.init_lora_weights=default"
        )


def _check_packing(e: Experiment, model: Any) -> None:
    """Refuses packed texts of which each would need virtual tokens of its own."""
    is_virtual = isinstance(getattr(model, "prompt", None), virtual.Tokens)
    if e.data.packing and is_virtual and hasattr(model, "encode"):
        raise UserError(
            "virtual tokens before an encoder see the text behind them, so each text "
            "of a packed row would need its own; use data.packing=False"
        )


def _stack_axes(axes: tuple[str | None, ...]) -> int:
    """How many leading axes only lay matrices side by side."""
    return axes.count("layers") + axes.count("expert")
