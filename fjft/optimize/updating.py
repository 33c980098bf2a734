"""An optimizer's update, one parameter after the other."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fjft.optimize.optimizer import apply_updates
from fjft.tree import Params

_Held = tuple[jax.Array, Any]  # a parameter and what the optimizer remembers of it


def update_each(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: Any,
    params: Params,
    is_good: jax.Array,
    *,
    stacks_on_host: Mapping[str, int] | None = None,
) -> tuple[Params, Any, jax.Array]:
    """Updates every parameter whose update is finite, if the gradients are good.

    Each parameter is updated by itself, since no optimizer here looks at another one.
    If moments lie in the host's memory, a stack's come to the device one layer's at a
    time, in a loop: nothing else keeps the compiler from fetching all of them at once.

    Args:
      optimizer: What turns gradients into updates.
      grads: By path.
      opt_state: The optimizer's state.
      params: By path.
      is_good: Bool scalar; where it is false everything stays as it is.
      stacks_on_host: If moments of a parameter's shape lie in the host's memory, how
        many of each parameter's leading axes are a stack's; else None.

    Returns:
      Parameters, state, and whether all was good and every update finite.
    """

    def update(path: str, grad: jax.Array, held: _Held) -> tuple[_Held, jax.Array]:
        """Updates one parameter, or a layer of it."""
        param, old = held
        if stacks_on_host is not None:
            old = jax.device_put(old, jax.memory.Space.Device)
        updates: Any
        updates, new = optimizer.update({path: grad}, old, {path: param})
        can_update = is_good & jnp.all(jnp.isfinite(updates[path]))
        changed = apply_updates({path: param}, updates)[path], new
        kept = jax.tree.map(
            lambda new, old: jnp.where(can_update, new, old), changed, (param, old)
        )
        if stacks_on_host is not None:
            kept = jax.tree.map(_to_space_of, kept, held)
        return kept, can_update

    changed, is_finite = {}, is_good
    for path, param in params.items():
        held = param, _part(opt_state, path, params)
        if stacks_on_host is not None and stacks_on_host[path]:
            step = functools.partial(update, path)
            changed[path], can_update = _by_layer(step, grads[path], held)
        else:
            changed[path], can_update = update(path, grads[path], held)
        is_finite &= can_update
    new_params = {path: param for path, (param, _) in changed.items()}
    new_state = _joined([part for _, part in changed.values()], params)
    return new_params, new_state, is_finite


def _by_layer(
    update: Callable[[jax.Array, _Held], tuple[_Held, jax.Array]],
    grads: jax.Array,
    held: _Held,
) -> tuple[_Held, jax.Array]:
    """Updates a stack in place, layer by layer."""
    num_layers = len(grads)

    def is_stacked(x: jax.Array) -> bool:
        return x.shape[:1] == (num_layers,)

    def body(layer: jax.Array, carry: tuple[_Held, jax.Array]) -> Any:
        changing, all_updated = carry
        # What all layers share (a count) is for each of them as it was before.
        one = jax.tree.map(
            lambda x, before: (
                lax.dynamic_slice_in_dim(x, layer, 1) if is_stacked(x) else before
            ),
            changing,
            held,
        )
        changed, updated = update(lax.dynamic_slice_in_dim(grads, layer, 1), one)
        changing = jax.tree.map(
            lambda x, new: (
                lax.dynamic_update_slice_in_dim(x, new, layer, 0)
                if is_stacked(x)
                else new
            ),
            changing,
            changed,
        )
        return changing, all_updated & updated

    return lax.fori_loop(0, num_layers, body, (held, jnp.bool_(True)))


def _to_space_of(new: jax.Array, old: jax.Array) -> jax.Array:
    return jax.device_put(new, jax.typeof(old).memory_space)


def _part(opt_state: Any, path: str, params: Params) -> Any:
    """What a state holds of one parameter, and what is all parameters' (a count)."""
    return jax.tree.map(
        lambda held: {path: held[path]} if _is_by_path(held, params) else held,
        opt_state,
        is_leaf=lambda held: _is_by_path(held, params),
    )


def _joined(parts: list[Any], params: Params) -> Any:
    """The state that these are parts of."""

    def join(*held: Any) -> Any:
        if _is_by_path(held[0], params):
            return {path: value for one in held for path, value in one.items()}
        return held[0]

    return jax.tree.map(join, *parts, is_leaf=lambda held: _is_by_path(held, params))


def _is_by_path(held: Any, params: Params) -> bool:
    return isinstance(held, dict) and bool(held) and held.keys() <= params.keys()
