"""What a method adds to the step is saved, sharded and guarded like parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_experiment import make_config, start, take_steps

from fjft.build import override
from fjft.checkpoint.orbax import Checkpoints, Config
from fjft.training.state import TrainState

STEPS, SAVED = 10, 5


def adalora_config(source: str, directory):
    """Allocates before and after the step at which it is saved."""
    config = make_config(source, directory, train__max_steps=STEPS)
    options = {
        "method": "adalora",
        "init_r": 4,
        "target_r": 2,
        "tinit": 1,
        "tfinal": 2,
        "target_modules": "q_proj|down_proj",
    }
    override(config, {f"peft.{name}": value for name, value in options.items()})
    return config


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """All steps at once, on one device; the state after them."""
    config = adalora_config(llama, tmp_path_factory.mktemp("run"))
    return jax.device_get(take_steps(start(config), STEPS)[0])


def test_a_run_goes_on_with_its_budget_on_another_mesh(llama, whole, tmp_path):
    started = start(adalora_config(llama, tmp_path), (1, 4, 2))
    specs = {path: p.sharding.spec for path, p in started.state.params.items()}
    for name in ("sensitivity", "uncertainty"):
        followed = started.state.rule[name]
        assert {path: x.sharding.spec for path, x in followed.items()} == specs
    state, _ = take_steps(started, SAVED)
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    checkpoints.save(SAVED, vars(state), {})
    checkpoints.wait()

    again = start(adalora_config(llama, tmp_path), (2, 2, 2))
    saved = checkpoints.restore(SAVED, vars(again.state))
    checkpoints.close()
    state = TrainState(**saved)
    with jax.set_mesh(again.mesh):
        for number in range(SAVED, STEPS):
            batch = again.run.loader.assemble(number)
            state, metrics = again.run.train_step(state, again.run.frozen, batch)
            # A step that went wrong allocates nothing either.
            if number == SAVED:
                first = jax.device_get(state)
                bad = {p: x * np.float32(np.nan) for p, x in again.run.frozen.items()}
                state, metrics = again.run.train_step(state, bad, batch)
                assert not metrics.is_finite
                jax.tree.map(np.testing.assert_array_equal, state.rule, first.rule)
                state = dataclasses.replace(state, step=state.step - 1)
    assert again.run.train_step._cache_size() == 1

    found = jax.device_get(state)
    for path, kept in whole.rule["kept"].items():
        np.testing.assert_array_equal(found.rule["kept"][path], kept)
        np.testing.assert_array_equal(found.params[path] == 0, ~kept)
    assert sum(int(kept.sum()) for kept in whole.rule["kept"].values()) == 2 * 6
    for path, param in whole.params.items():
        # float32 sums in another order, through ten steps of Adam.
        largest = np.abs(param).max()
        np.testing.assert_allclose(found.params[path], param, atol=1e-3 * largest)


def test_methods_without_a_rule_carry_nothing(llama, tmp_path):
    assert start(make_config(llama, tmp_path)).state.rule == {}
