"""Every optimizer takes steps on stacked parameters, and its state comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_experiment import make_config, start, take_steps

from fjft.checkpoint.orbax import Checkpoints, Config
from fjft.optimize.optimizer import OPTIMIZERS


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_steps_and_state_round_trip(llama, tmp_path, name, method):
    momentum = {"optimizer__sgd_momentum": 0.9} if name == "sgd" else {}
    config = make_config(
        llama,
        tmp_path,
        peft__method=method,
        optimizer__name=name,
        optimizer__learning_rate=1e-3,
        optimizer__warmup_steps=0.0,
        **momentum,
    )
    started = start(config, (1, 2, 1))
    before = jax.device_get(started.state.params)
    state, metrics = take_steps(started, 3)
    assert all(m.is_finite for m in metrics)
    assert metrics[-1].loss_sum > 0
    moved = {
        path: np.abs(np.asarray(p) - before[path]).max()
        for path, p in state.params.items()
    }
    # LoRA's A stands still until B has left zero, that is for one step of three.
    assert all(np.isfinite(m) and m > 0 for m in moved.values()), moved
    assert all(
        leaf.dtype in (np.float32, np.int32)
        for leaf in jax.tree.leaves(state.opt_state)
    )

    saved = {"params": state.params, "opt_state": state.opt_state}
    checkpoints = Checkpoints(Config(directory=str(tmp_path)))
    checkpoints.save(3, saved, {})
    checkpoints.wait()
    # Restored onto other values, of which only shapes, types and places are read.
    restored = checkpoints.restore(3, jax.tree.map(jnp.zeros_like, saved))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, restored)) == (
        jax.tree.leaves(jax.tree.map(lambda x: x.sharding, saved))
    )
