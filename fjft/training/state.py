"""What one optimizer step changes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fjft import tree
from fjft.peft.rule import StepRule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step takes, changes and gives back; donated to it.

    Attributes:
      step: Int32 scalar, optimizer steps done.
      params: The trainable parameters, float32, by path.
      opt_state: The optimizer's moments, as optax keeps them.
      rng: Uint32 key data, from which each step derives its own key.
      rule: What the method's own rule keeps from step to step; of most, nothing.
      average: Averages of `params` over the steps; empty where none are kept.
    """

    step: jax.Array
    params: tree.Params
    opt_state: Any
    rng: jax.Array
    rule: Any
    average: tree.Params = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> tree.Params:
        """The parameters that are judged and written."""
        return self.average or self.params


def init_state(
    params: tree.Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    rule: StepRule | None = None,
    *,
    on_host: bool = False,
    averages: bool = False,
) -> TrainState:
    """The state before the first step, lying as `abstract_state` says."""
    shapes = {
        path: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding)
        for path, p in params.items()
    }
    abstract = abstract_state(shapes, optimizer, rule, on_host=on_host)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params),
        rng=jax.device_put(key, shardings.rng),
        rule=jax.jit(rule.init, out_shardings=shardings.rule)(params) if rule else {},
        average=jax.tree.map(jnp.copy, params) if averages else {},
    )


def abstract_state(
    params: dict[str, jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    rule: StepRule | None = None,
    *,
    on_host: bool = False,
    averages: bool = False,
) -> TrainState:
    """Shape, dtype and sharding of each array of a state.

    Args:
      params: Those of the trainable parameters.
      optimizer: Whose moments these are.
      rule: What the method adds to the step, or None.
      on_host: Keeps moments in the hosts' memory between steps.
      averages: Keeps averages of the parameters.
    """
    sharding = next(iter(params.values())).sharding
    assert isinstance(sharding, NamedSharding)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes: dict[str, Any] = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        "params": params,
        "opt_state": _lay_out(optimizer.init, params, everywhere, on_host),
        "rng": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
        "rule": _lay_out(rule.init, params, everywhere, False) if rule else {},
        "average": dict(params) if averages else {},
    }
    return TrainState(**shapes)


def _lay_out(
    init: Callable[[tree.Params], Any],
    params: dict[str, jax.ShapeDtypeStruct],
    everywhere: NamedSharding,
    on_host: bool,
) -> Any:
    """The arrays that `init` makes for the parameters.

    A moment of a parameter's shape lies as the parameter does; anything smaller
    (counts, factored moments) is on every device.
    """

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [str(getattr(key, "key", "")) for key in path]
        owner = next((n for n in reversed(names) if n in params), None)
        sharding = everywhere
        if owner is not None and params[owner].shape == leaf.shape:
            sharding = params[owner].sharding
            if on_host:
                sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(init, params)
    return jax.tree_util.tree_map_with_path(place, shapes)
