"""How AdaLoRA shares a budget of ranks among its adapters, inside the compiled step.

A triplet is a row of A, the entry of E and the column of B that belong together. Its
importance is how much the loss would change without it, smoothed over steps (Zhang et
al. 2023, equations 8 to 10); at a step that allocates, the least important triplets of
the whole model lose their entry of E, as many as the cubic schedule says (equation 13).
They may come back until the schedule ends. PEFT's `RankAllocator` is the reference to
the last rule of rounding and order.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fjft.peft.adalora_config import Config
from fjft.peft.rule import StepRule
from fjft.tree import Params

# The path before an adapter's `a`, `e` and `b` -> which of the stacked layers have one.
Adapters = Mapping[str, tuple[bool, ...]]


def make_rule(config: Config, adapters: Adapters) -> StepRule:
    """Makes what AdaLoRA adds to the step.

    Args:
      config: The options, `total_step` filled in.
      adapters: Where the adapters are.
    """
    num_adapters = sum(map(sum, adapters.values()))
    budgets, allocates = schedule(config, num_adapters)
    last = config.total_step - config.tfinal

    def after_update(
        state: Any, params: Params, grads: Params, step: jax.Array
    ) -> tuple[Any, Params]:
        number = step + 1  # PEFT counts from one.
        at = jnp.minimum(number, config.total_step)
        state = state | _follow(state, params, grads, config, number < last)
        least = config.init_r * num_adapters - jnp.asarray(budgets)[at]
        fresh = _choose(state, adapters, least)
        does_allocate = jnp.asarray(allocates)[at]
        kept = {
            path: jnp.where(does_allocate, fresh[path], old)
            for path, old in state["kept"].items()
        }
        masks = does_allocate | (number > last)
        pruned = {
            path: jnp.where(masks & ~keep, 0.0, params[path])
            for path, keep in kept.items()
        }
        return state | {"kept": kept}, params | pruned

    return StepRule(
        penalty=lambda params: config.orth_reg_weight * orthogonality(params, adapters),
        init=lambda params: _init(params, adapters),
        after_update=after_update,
    )


def schedule(config: Config, num_adapters: int) -> tuple[np.ndarray, np.ndarray]:
    """The budget of every step, counted from one, and whether it is allocated then.

    Worked out once in float64, since float32 would round some budgets down by one.

    Returns:
      int32 and bool [total_step + 1]; entry 0 is before the first step.
    """
    c = config
    most, least = c.init_r * num_adapters, c.target_r * num_adapters
    last = c.total_step - c.tfinal
    budgets = np.full(c.total_step + 1, most, np.int32)
    allocates = np.zeros(c.total_step + 1, bool)
    for step in range(c.tinit + 1, last + 1):
        left = 1 - (step - c.tinit) / (last - c.tinit)
        budgets[step] = int((most - least) * (left**3) + least)
        allocates[step] = step % c.deltaT == 0 or step == last
    budgets[last + 1 :] = least
    return budgets, allocates


def orthogonality(params: Params, adapters: Adapters) -> jax.Array:
    """The mean, over all A and B, of `|A A^T - I|` and `|B^T B - I|` (equation 4).

    As in PEFT the norms are Frobenius's, where the paper has their squares.
    """
    total = jnp.float32(0)
    for path, adapted in adapters.items():
        a, b = params[f"{path}a"], params[f"{path}b"]
        for gram in (
            jnp.einsum("...Ri,...Si->...RS", a, a, precision="highest"),
            jnp.einsum("...oR,...oS->...RS", b, b, precision="highest"),
        ):
            eye = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
            off = jnp.sum(jnp.square(gram - eye), axis=(-2, -1))
            # A norm of zero has no derivative; torch takes zero.
            norm = jnp.where(off > 0, jnp.sqrt(jnp.where(off > 0, off, 1.0)), 0.0)
            used = jnp.array(adapted).reshape(norm.shape)
            total += jnp.sum(jnp.where(used, norm, 0.0))
    return total / (2 * sum(map(sum, adapters.values())))


def _init(params: Params, adapters: Adapters) -> dict[str, Params]:
    followed = [f"{path}{name}" for path in adapters for name in "aeb"]
    zeros = {path: jnp.zeros_like(params[path]) for path in followed}
    return {
        "sensitivity": zeros,
        "uncertainty": jax.tree.map(jnp.copy, zeros),
        "kept": {
            f"{path}e": jnp.ones(params[f"{path}e"].shape, bool) for path in adapters
        },
    }


def _follow(
    state: Any, params: Params, grads: Params, config: Config, goes_on: jax.Array
) -> dict[str, Params]:
    """Updates the running means, where `goes_on`."""
    sensitivity, uncertainty = {}, {}
    for path, old in state["sensitivity"].items():
        now = jnp.abs(params[path] * grads[path])
        mean = config.beta1 * old + (1 - config.beta1) * now
        old_spread = state["uncertainty"][path]
        spread = jnp.abs(now - mean)
        spread = config.beta2 * old_spread + (1 - config.beta2) * spread
        sensitivity[path] = jnp.where(goes_on, mean, old)
        uncertainty[path] = jnp.where(goes_on, spread, old_spread)
    return {"sensitivity": sensitivity, "uncertainty": uncertainty}


def _choose(state: Any, adapters: Adapters, least: jax.Array) -> dict[str, jax.Array]:
    """Which triplets stay when the `least` least important ones go.

    Returns:
      Bool[..., R, 1] for each E.
    """
    scores = {}
    for path, adapted in adapters.items():
        a, e, b = (
            state["sensitivity"][f"{path}{name}"]
            * state["uncertainty"][f"{path}{name}"]
            for name in "aeb"
        )
        score = e[..., 0] + (jnp.mean(a, axis=-1) + jnp.mean(b, axis=-2))
        used = jnp.array(adapted).reshape(*score.shape[:-1], 1)
        # What only fills up a stack counts among those that stay.
        scores[f"{path}e"] = jnp.where(used, score, jnp.inf)
    ranking = jnp.sort(jnp.concatenate([s.ravel() for s in scores.values()]))
    threshold = ranking[jnp.maximum(least, 1) - 1]
    return {path: (score > threshold)[..., None] for path, score in scores.items()}
