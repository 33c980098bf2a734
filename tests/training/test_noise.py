"""The gradient's noise, against gradients whose noise is known, and against parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_experiment import make_config, start, take_steps

from fjft.training import noise
from fjft.training.loop import train


def test_estimates_are_right_on_average():
    """Microbatches of unequal weight, and one without any."""
    random, size = np.random.default_rng(0), 50
    gradient = random.standard_normal(size).astype(np.float32)
    weights = np.array([3.0, 5.0, 0.0, 8.0], np.float32)
    variance = 7.0  # of one unit of weight, in each number

    @jax.jit
    def estimate(noises):
        sums = (
            weights[:, None] * gradient + jnp.sqrt(weights * variance)[:, None] * noises
        )
        parts = [noise.measure({"w": s}, w) for s, w in zip(sums, weights, strict=True)]
        spread = jax.tree.map(lambda *x: sum(x), *parts)
        mean = {"w": jnp.sum(sums, axis=0) / weights.sum()}
        return noise.estimate(spread, mean, jnp.float32(16), jnp.float32(4))

    draws = random.standard_normal((4000, len(weights), size)).astype(np.float32)
    found = jax.vmap(estimate)(draws)
    # A row has a weight of four, so a quarter of the variance.
    expected = variance * size / 4
    assert np.mean(found.variance) == pytest.approx(expected, rel=0.02)
    assert np.mean(found.square) == pytest.approx(np.sum(gradient**2), rel=0.05)


def test_a_step_measures_its_microbatches(llama, tmp_path):
    """Each microbatch by itself gives the norm that it has as a part."""
    config = make_config(llama, tmp_path, train__accumulation_steps=4)
    started = start(config)
    rows = started.run.loader.assemble(0)
    _, (whole,) = take_steps(started, 1)
    norms, weights = [], []
    single = start(make_config(llama, tmp_path, train__batch_size=2))
    for number in range(4):
        part = {name: column[number::4] for name, column in rows.items()}
        with jax.set_mesh(single.mesh):
            state = jax.tree.map(jnp.copy, single.state)
            _, metrics = single.run.train_step(state, single.run.frozen, part)
        norms.append(float(metrics.grad_norm))
        weights.append(float(metrics.weight_sum))
    small, inverse = np.mean(np.square(norms)), np.mean(1 / np.array(weights))
    large, total = float(whole.grad_norm) ** 2, sum(weights)
    assert whole.weight_sum == total
    variance = (small - large) / (inverse - 1 / total)
    assert whole.noise.variance == pytest.approx(variance * 8 / total, rel=1e-3)
    assert whole.noise.square == pytest.approx(large - variance / total, rel=1e-3)


def test_it_is_logged_where_batches_are_cut(llama, tmp_path):
    config = make_config(
        llama, tmp_path, train__accumulation_steps=4, train__max_steps=3
    )
    assert train(config).metrics["gradient_noise_scale"] > 0
