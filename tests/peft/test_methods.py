"""What every method promises; a new entry of `METHODS` gets all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_twins
import pytest
import tiny

from fjft import sharding, tree
from fjft.objectives import causal_lm
from fjft.peft.methods import METHODS
from fjft.training import state as states
from fjft.training import step as steps

CASE = "llama/llama3-rope-biases"
T = 16


@pytest.fixture(scope="module", params=METHODS)
def built(request, get_twins):
    """A method's model as it starts, and the bare model."""
    twins, method = get_twins(CASE), METHODS[request.param]
    return tiny.build_model(twins.directory, method, method.Config()), twins


def _split(model):
    graphdef, params = tree.split(model)
    return graphdef, *tree.partition(params, peft_twins.is_trainable(model))


def test_a_new_method_computes_what_the_bare_model_does(built):
    model, twins = built
    ids = tiny.random_ids(2, T)
    np.testing.assert_allclose(
        tiny.jit_apply(model)(ids), twins.apply(ids), rtol=1e-5, atol=1e-5
    )


def test_what_is_trained_is_float32_whatever_the_base_is(built):
    model, twins = built
    provenance = model.provenance
    half = tiny.build_model(
        twins.directory, provenance.method, provenance.peft_config, dtype="bfloat16"
    )
    _, trained, _ = _split(half)
    assert trained
    assert {p.dtype for p in trained.values()} == {jnp.dtype(jnp.float32)}


def test_num_trainable_counts_what_is_trained(built):
    model, _ = built
    provenance = model.provenance
    _, trained, _ = _split(model)
    counted = provenance.method.num_trainable(
        model, provenance.sites, provenance.peft_config
    )
    assert counted == tree.count(trained) > 0


def test_a_step_changes_what_is_trained_and_nothing_else(built):
    model, _ = built
    graphdef, trained, frozen = _split(model)
    before = {path: np.asarray(p) for path, p in tree.split(model)[1].items()}
    optimizer = optax.sgd(1e-2)
    step = steps.make_train_step(
        graphdef,
        lambda model, batch, rng: causal_lm.loss(
            model, batch, causal_lm.Config(), rng=rng
        ),
        optimizer,
        accumulation_steps=2,
        max_grad_norm=1.0,
    )
    state = states.init_state(jax.tree.map(jnp.copy, trained), optimizer, 0)
    batch = jax.tree.map(jnp.asarray, tiny.make_batch([[T], [7, 9]], T))
    run = jax.jit(step)
    for _ in range(2):  # LoRA's A has no gradient until its B is not zero
        state, _ = run(state, frozen, batch)
    assert state.params.keys() == trained.keys()
    for path, param in state.params.items():
        assert not np.array_equal(param, before[path]), path
    for path, param in frozen.items():
        np.testing.assert_array_equal(param, before[path])


def test_sharded_equals_one_device(built):
    model, twins = built
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    provenance = model.provenance
    spread = tiny.build_model(
        twins.directory, provenance.method, provenance.peft_config, mesh
    )
    _, before, _ = _split(model)
    _, after, _ = _split(spread)
    for path, param in before.items():
        np.testing.assert_array_equal(param, after[path])
    ids = tiny.random_ids(4, T)
    error = tiny.relative_error(tiny.jit_apply(spread)(ids), tiny.jit_apply(model)(ids))
    assert error < 1e-5
