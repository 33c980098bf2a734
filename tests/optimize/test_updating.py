"""Parameters updated one after the other are those updated at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjft.optimize import optimizer as optimizers
from fjft.optimize.updating import update_each

SHAPES = {"stack": (3, 4, 5), "norms": (3, 5), "table": (7, 4), "norm": (4,)}
STACK_AXES = {"stack": 1, "norms": 1, "table": 0, "norm": 0}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}


def make(name):
    config = optimizers.Config(name=name, learning_rate=0.1, weight_decay=0.1)
    return optimizers.make_optimizer(config, 10, stack_axes=STACK_AXES)


@pytest.mark.parametrize("stacks_on_host", [None, STACK_AXES], ids=["here", "host"])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_one_by_one_is_all_at_once(name, stacks_on_host):
    optimizer = make(name)

    @jax.jit
    def each(grads, state, params):
        good = jnp.bool_(True)
        return update_each(
            optimizer, grads, state, params, good, stacks_on_host=stacks_on_host
        )

    @jax.jit
    def at_once(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optimizers.apply_updates(params, updates), state

    ours = theirs = draw(0)
    our_state = their_state = optimizer.init(ours)
    for seed in (1, 2):
        ours, our_state, is_finite = each(draw(seed), our_state, ours)
        theirs, their_state = at_once(draw(seed), their_state, theirs)
        assert is_finite
    assert jax.tree.structure(our_state) == jax.tree.structure(their_state)
    for our, their in zip(
        jax.tree.leaves((ours, our_state)),
        jax.tree.leaves((theirs, their_state)),
        strict=True,
    ):
        # Muon's iterations enlarge what two programs round differently.
        rtol = 1e-5 if name == "muon" else 1e-6
        np.testing.assert_allclose(our, their, rtol=rtol, atol=1e-7)


def test_what_is_not_finite_is_not_added():
    """One parameter's update overflows; the others and the rest of its step stand."""
    optimizer, params = make("sgd"), draw(0)
    grads = draw(1) | {"norm": jnp.full((4,), np.inf)}
    state = optimizer.init(params)
    after, _, is_finite = update_each(optimizer, grads, state, params, jnp.bool_(True))
    assert not is_finite
    np.testing.assert_array_equal(after["norm"], params["norm"])
    assert (after["table"] != params["table"]).all()
    after, kept, is_finite = update_each(
        optimizer, grads, state, params, jnp.bool_(False)
    )
    assert not is_finite
    jax.tree.map(np.testing.assert_array_equal, (after, kept), (params, state))
