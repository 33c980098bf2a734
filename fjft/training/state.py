"""What one optimizer step changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fjft import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step takes, changes and gives back; donated to it.

    Attributes:
      step: Int32 scalar, optimizer steps done.
      params: The trainable parameters, float32, by path.
      opt_state: The optimizer's moments, as optax keeps them.
      rng: Uint32 key data, from which each step derives its own key.
    """

    step: jax.Array
    params: tree.Params
    opt_state: Any
    rng: jax.Array


def init_state(
    params: tree.Params, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step; moments lie as their parameters do."""
    sharding = next(iter(params.values())).sharding
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    shardings = {path: p.sharding for path, p in params.items()}
    opt_state = jax.jit(
        optimizer.init,
        out_shardings=optimizer_shardings(optimizer, params, shardings, everywhere),
    )(params)
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), everywhere),
        params=params,
        opt_state=opt_state,
        rng=jax.device_put(jax.random.key_data(jax.random.key(seed)), everywhere),
    )


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    params: tree.Params,
    shardings: dict[str, Any],
    everywhere: jax.sharding.NamedSharding,
) -> Any:
    """How each of the optimizer's arrays lies.

    A moment of a parameter's shape lies as the parameter does; anything smaller
    (counts, factored moments) is on every device.
    """
    abstract = jax.eval_shape(optimizer.init, params)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        names = [str(getattr(key, "key", "")) for key in path]
        owner = next((n for n in reversed(names) if n in params), None)
        if owner is not None and params[owner].shape == leaf.shape:
            return shardings[owner]
        return everywhere

    return jax.tree_util.tree_map_with_path(place, abstract)
