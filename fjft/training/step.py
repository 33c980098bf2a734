"""The optimizer step: a pure function of pytrees."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fjft import tree
from fjft.optimize.optimizer import clip_by_global_norm
from fjft.optimize.updating import update_each
from fjft.peft.rule import StepRule
from fjft.programs import compiler_options
from fjft.sharding import constrain
from fjft.training.noise import Noise, estimate, measure
from fjft.training.state import TrainState

Batch = dict[str, jax.Array]
# (model, batch, rng) -> sums with `loss`, `weight`, `correct`.
Loss = Callable[[Any, Batch, jax.Array | None], Any]
# (model, batch) -> an evaluation's sums.
Judge = Callable[[Any, Batch], Any]


class StepMetrics(NamedTuple):
    """What a step reports; float32 scalars.

    Attributes:
      loss_sum: Summed loss, in nats.
      weight_sum: What the loss is divided by: the number of trained tokens or labels.
      correct_sum: The part of it that was predicted right.
      num_tokens: Tokens that are not padding.
      grad_norm: Global norm of the mean loss's gradient, before clipping.
      is_finite: Whether loss, gradient and update were. Without a finite loss or
        gradient nothing was updated, and never a parameter by what is not finite.
      noise: What microbatches tell of the gradient's noise; None without any.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    correct_sum: jax.Array
    num_tokens: jax.Array
    grad_norm: jax.Array
    is_finite: jax.Array
    noise: Noise | None = None


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulation_steps: int,
    max_grad_norm: float,
    rule: StepRule | None = None,
    stacks_on_host: Mapping[str, int] | None = None,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, tree.Params, Batch], tuple[TrainState, StepMetrics]]:
    """Makes the step `(state, frozen, batch) -> (state, metrics)`, to be jitted.

    The batch is cut into microbatches whose losses, token counts and gradients are
    summed in float32 and divided once, so the cut does not change the result. The
    frozen weights are only read: returned, they would be copied.

    Args:
      graphdef: The model's structure.
      loss: The objective.
      optimizer: What turns gradients into updates; its state is in the train state.
      accumulation_steps: Microbatches a batch.
      max_grad_norm: Gradients are scaled down to this global norm; 0 leaves them.
      rule: What the method adds; most add nothing.
      stacks_on_host: See `update_each`.
      ema_decay: Share of the averaged parameters that stays in each step; 0 averages
        none.
    """
    gradient = jax.value_and_grad(
        lambda params, frozen, batch, rng: _with_sums(
            loss(tree.merge(graphdef, frozen, params), batch, rng)
        ),
        has_aux=True,
    )

    def train_step(
        state: TrainState, frozen: tree.Params, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def microstep(number: jax.Array, microbatch: Batch) -> tuple[Any, ...]:
            key = jax.random.fold_in(rng, number)
            (_, sums), grads = gradient(state.params, frozen, microbatch, key)
            if accumulation_steps == 1:
                return sums, grads, None
            return sums, grads, measure(grads, sums.weight)

        sums, grads, spread = _sum_over(microstep, batch, accumulation_steps)
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        is_token = batch["segment_ids"] != 0
        noisy = None
        if spread is not None:
            num_rows = jnp.sum(jnp.any(is_token, axis=1), dtype=jnp.float32)
            noisy = estimate(spread, grads, weight, num_rows)
        if rule is not None:
            penalty = jax.grad(rule.penalty)(state.params)
            grads = jax.tree.map(jnp.add, grads, penalty)
        grads, grad_norm = clip_by_global_norm(grads, max_grad_norm)
        is_good = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        # A learning rate that is far too large shows in the update, a step before it
        # shows in the loss.
        params, opt_state, is_finite = update_each(
            optimizer,
            grads,
            state.opt_state,
            state.params,
            is_good,
            stacks_on_host=stacks_on_host,
        )
        rule_state = state.rule
        if rule is not None:
            changed = rule.after_update(rule_state, params, grads, state.step)
            rule_state, params = jax.tree.map(
                lambda new, old: jnp.where(is_good, new, old),
                changed,
                (rule_state, params),
            )
        metrics = StepMetrics(
            loss_sum=sums.loss,
            weight_sum=sums.weight,
            correct_sum=sums.correct,
            num_tokens=jnp.sum(is_token, dtype=jnp.float32),
            grad_norm=grad_norm,
            is_finite=is_finite,
            noise=noisy,
        )
        new = TrainState(
            state.step + 1,
            params,
            opt_state,
            state.rng,
            rule_state,
            _average(state, params, ema_decay),
        )
        return new, metrics

    return train_step


def _average(state: TrainState, params: tree.Params, decay: float) -> tree.Params:
    """The averaged parameters after a step; as in torch the first step's begin them."""
    kept = jnp.where(state.step == 0, 0.0, decay)
    return {
        path: params[path] + kept * (average - params[path])
        for path, average in state.average.items()
    }


def _with_sums(sums: Any) -> tuple[jax.Array, Any]:
    return sums.loss, sums


def _sum_over(microstep: Callable, batch: Batch, num_parts: int) -> Any:
    """Sums `microstep(number, microbatch)` over equal parts of a batch.

    Microbatch m is every row whose number is m modulo `num_parts`, so each has rows of
    every device and none has to move.
    """
    if num_parts == 1:
        return microstep(jnp.int32(0), batch)

    def cut(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", *(None,) * (x.ndim - 1))

    def add(totals: Any, xs: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, totals, microstep(*xs)), None

    numbers, parts = jnp.arange(num_parts, dtype=jnp.int32), jax.tree.map(cut, batch)
    first = numbers[0], jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(microstep, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (numbers, parts))[0]


def jit_train_step(step: Callable, state: TrainState, mesh: Mesh) -> Callable:
    """Compiles a train step: donates the state, and lays the new one out as the old."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(state_shardings, everywhere),
        compiler_options=compiler_options(mesh),
    )


def make_eval_step(
    graphdef: nnx.GraphDef, judge: Judge
) -> Callable[[tree.Params, tree.Params, Batch], Any]:
    """Makes `(params, frozen, batch) -> sums`, without anything random in it."""

    def eval_step(params: tree.Params, frozen: tree.Params, batch: Batch) -> Any:
        return judge(tree.merge(graphdef, frozen, params), batch)

    return eval_step
